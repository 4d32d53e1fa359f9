"""A fitted network x a part of the images -> Evaluation: logits, metrics, confusion matrix."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from seewhy.config import TrainConfig
from seewhy.core import distributed
from seewhy.core.progress import progress
from seewhy.curation.split import read_split
from seewhy.data.image_set import ImageSet, open_images
from seewhy.errors import DataError
from seewhy.evaluation import calibration, metrics
from seewhy.models.backbones import Backbone
from seewhy.models.feature_store import StoredRows, take_rows
from seewhy.models.features import Features, FeatureSpec, extract_features
from seewhy.models.saved_run import SavedRun
from seewhy.models.transforms import EVAL_VIEW, MIRRORED_VIEW
from seewhy.models.trunk_tail import TrunkTail, with_penultimate

TOP = 5
BATCH = 128  # images that the tail answers at a time
BLOCK = 8  # batches of vectors that are held at a time


@dataclass(frozen=True, eq=False)
class Evaluation:
    """What a network says of N labelled images.

    part: 'train', 'val', 'test' or 'all'. paths: N texts. logits: (N, C), unnormalised. labels: (N,) true classes.
    groups: (N,) a number a group of images that show the same. temperature: what divides the logits before the softmax.
    """

    part: str
    paths: Sequence[str]
    labels: npt.NDArray[np.int64]
    logits: npt.NDArray[np.float32]
    classes: tuple[str, ...]
    groups: npt.NDArray[np.int64]
    temperature: float = 1.0

    @cached_property
    def probs(self) -> npt.NDArray[np.float64]:
        """(N, C) calibrated probabilities: softmax(logits / temperature). Of many images and classes they are large: 8 bytes each."""
        return self._probs_of(slice(None))

    def _probs_of(self, rows: slice) -> npt.NDArray[np.float64]:
        return metrics.softmax(self.logits[rows] / self.temperature)

    @cached_property
    def predicted(self) -> npt.NDArray[np.int64]:
        """(N,) most probable classes."""
        best: npt.NDArray[np.int64] = self.logits.argmax(axis=1)
        return best

    @cached_property
    def confidence(self) -> npt.NDArray[np.float64]:
        """(N,) probability of the predicted class."""
        return metrics.map_rows(lambda rows: self._probs_of(rows).max(axis=1), len(self.labels))

    @property
    def correct(self) -> npt.NDArray[np.bool_]:
        """(N,) whether the predicted class is the true one."""
        same: npt.NDArray[np.bool_] = self.predicted == self.labels
        return same

    @cached_property
    def confusion(self) -> npt.NDArray[np.int64]:
        """(C, C) counts; row = true, column = predicted."""
        return metrics.confusion_matrix(self.labels, self.predicted, len(self.classes))

    @cached_property
    def metrics(self) -> dict[str, Any]:
        """The entry of `metrics.json` (docs/reference/run.md): headline numbers with intervals over groups, one row a class."""
        n = len(self.labels)
        rows = metrics.per_class(self.confusion)
        names = [name for name in metrics.HEADLINE if name != "top5_accuracy" or len(self.classes) > TOP]
        among = metrics.in_top_k(self.labels, self.logits, TOP)

        def headline(weights: npt.NDArray[np.int64]) -> list[float]:
            confusion = metrics.confusion_matrix(self.labels, self.predicted, len(self.classes), weights)
            found = {
                "accuracy": float(np.diag(confusion).sum() / confusion.sum()),
                "top5_accuracy": float(np.average(among, weights=weights)),
                "mean_per_class_accuracy": metrics.mean_per_class_accuracy(confusion),
                "macro_f1": metrics.macro_f1(confusion),
            }
            return [found[name] for name in names]

        values = headline(np.ones(n, dtype=np.int64))
        intervals = metrics.group_bootstrap(headline, self.groups)
        count = len(np.unique(self.groups))
        if intervals[0][0] == intervals[0][1]:  # all right or all wrong: drawing again shows no spread, but there is doubt
            intervals[0] = metrics.wilson_interval(round(values[0] * count), count)
        numbers: dict[str, Any] = {"n": n, "groups": count}
        for name, value, interval in zip(names, values, intervals, strict=True):
            numbers |= {name: value, f"{name}_ci95": list(interval)}
        return {
            **numbers,
            **self._calibration(),
            "per_class": [
                {
                    "class": name,
                    "precision": float(rows.precision[c]),
                    "recall": float(rows.recall[c]),
                    "f1": float(rows.f1[c]),
                    "n": int(rows.support[c]),
                }
                for c, name in enumerate(self.classes)
            ],
        }

    def _calibration(self) -> dict[str, Any]:
        """How far the probabilities can be believed, and what answering only the surest images brings."""
        labels, n = self.labels, len(self.labels)
        plain = metrics.map_rows(lambda rows: metrics.softmax(self.logits[rows]).max(axis=1), n)
        nats = metrics.map_rows(lambda rows: metrics.sample_nll(labels[rows], self.logits[rows] / self.temperature), n)
        distances = metrics.map_rows(lambda rows: calibration.squared_distances(labels[rows], self._probs_of(rows)), n)
        return {
            "negative_log_likelihood": float(nats.mean()),
            "brier_score": float(distances.mean()),
            "expected_calibration_error": calibration.expected_calibration_error(self.confidence, self.correct),
            "expected_calibration_error_uncalibrated": calibration.expected_calibration_error(plain, self.correct),
            "area_under_risk_coverage": calibration.risk_coverage(self.confidence, self.correct).area,
        }


def evaluate_part(
    images: ImageSet,
    indices: npt.NDArray[np.int64],
    part: str,
    backbone: Backbone,
    cut: TrunkTail,
    config: TrainConfig,
    groups: npt.NDArray[np.int64] | None = None,
    temperature: float = 1.0,
) -> Evaluation:
    """The images at `indices` as a run of this config answers them; the frozen part comes from the cache.

    Processes that train together share the images, and each gets all logits.

    With tta_flip, logits are the mean of those of the image and of its mirror image.
    groups: (N,) a number an image of all `images`; None: each is a group of its own.
    """
    halves, spec = cut, FeatureSpec.of(config)
    if cut.trunk is None:  # trained as a whole
        halves, spec = TrunkTail(backbone.model, nn.Identity(), "logits"), replace(spec, cache=False)
    views = MIRRORED_VIEW + 1 if config.tta_flip else EVAL_VIEW + 1
    mine = distributed.shard(indices)
    asked = mine if len(mine) else indices[:1]  # of few images some processes have none
    features = extract_features(images, asked, views, halves, backbone.preprocessing, spec)
    logits = tail_logits(halves.tail, features.store, features.rows[:, EVAL_VIEW])
    if config.tta_flip:
        logits += tail_logits(halves.tail, features.store, features.rows[:, MIRRORED_VIEW])
        logits /= views
    return Evaluation(
        part=part,
        paths=[str(images.paths[i]) for i in indices],
        labels=images.labels[indices],
        logits=distributed.all_gather(logits[: len(mine)], len(indices)),
        classes=images.classes,
        groups=np.arange(len(indices)) if groups is None else groups[indices],
        temperature=temperature,
    )


def classifier_vectors(
    backbone: Backbone,
    cut: TrunkTail,
    images: ImageSet,
    indices: npt.NDArray[np.int64],
    spec: FeatureSpec,
) -> Iterator[npt.NDArray[np.float32]] | None:
    """(B, K) what the classifier reads of the images at `indices` (evaluation view), block after block, (N, K) in all, for every process.

    None where the network has no such vector.
    """
    trained_whole = cut.trunk is None
    tail = with_penultimate(backbone, backbone.model if trained_whole else cut.tail)
    if tail is None:
        return None
    halves = TrunkTail(tail, nn.Identity(), "vectors") if trained_whole else TrunkTail(cut.trunk, tail, cut.cut_point)
    mine = distributed.shard(indices)
    asked = mine if len(mine) else indices[:1]
    features = extract_features(images, asked, EVAL_VIEW + 1, halves, backbone.preprocessing, spec)
    return _vector_blocks(halves.tail, features, len(indices), len(mine), len(images.classes))


def _vector_blocks(tail: nn.Module, features: Features, n: int, mine: int, classes: int) -> Iterator[npt.NDArray[np.float32]]:
    """n: images of all processes. mine: those of this one, whose features they are; of few images some processes have none."""
    each = BLOCK * BATCH  # rows of a process
    for start in range(0, n, each * distributed.world_size()):
        begin = start // distributed.world_size()
        rows = features.rows[begin : begin + each, 0] if begin < mine else features.rows[:1, 0]
        vectors = tail_logits(tail, features.store, rows)[: max(mine - begin, 0), classes:]
        yield distributed.all_gather(vectors, min(n - start, each * distributed.world_size()))


@torch.inference_mode()
def tail_logits(
    tail: nn.Module, store: npt.NDArray[Any] | StoredRows, rows: npt.NDArray[np.int64], batch: int = BATCH
) -> npt.NDArray[np.float32]:
    """(N, C) logits of stored features; `tail` runs in eval mode."""
    tail.eval()
    found = np.empty((0, 0), dtype=np.float32)
    with progress("evaluating", len(rows)) as advance:
        for start in range(0, len(rows), batch):
            features = torch.from_numpy(take_rows(store, rows[start : start + batch]))
            logits = tail(features).float().numpy()
            if not start:
                found = np.empty((len(rows), logits.shape[1]), dtype=np.float32)
            found[start : start + batch] = logits
            advance(len(features))
    return found


def evaluate_run(run: SavedRun, part: str = "test", data: str | None = None) -> Evaluation:
    """A saved run on a part of its own split (found again by content), or on all images of `data`.

    Raises SplitError if the data has changed since, DataError for classes the run does not know.
    """
    config = run.config
    images = open_images(data or config.data, config.data_root, config.skip_bad, config.workers)
    if data is not None:
        indices, part, groups = np.arange(len(images)), "all", None
    else:
        split = read_split(run.path, images)
        indices, groups = split.part(part), split.groups
    unknown = sorted(set(images.classes) - set(run.classes))
    if unknown:
        raise DataError(
            f"{images.root}: class {unknown[0]!r} is not one of the run's {len(run.classes)} classes; rename or remove its folder"
        )
    if images.classes != run.classes:  # a folder with fewer classes: count in the run's own numbering
        place = np.array([run.classes.index(name) for name in images.classes])
        images = ImageSet(**{**vars(images), "classes": run.classes, "labels": place[images.labels]})
    return evaluate_part(images, indices, part, run.backbone, run.cut, config, groups, run.temperature)
