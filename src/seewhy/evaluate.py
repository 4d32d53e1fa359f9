"""A fitted network x a part of the pictures -> Evaluation: logits, metrics, confusion matrix."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from seewhy import calibration, distributed, metrics
from seewhy.backbones import Backbone
from seewhy.config import TrainConfig
from seewhy.cutting import Cut, with_vector
from seewhy.errors import DataError
from seewhy.features import Features, extract_features
from seewhy.images import ImageSet, open_images
from seewhy.progress import progress
from seewhy.saved_run import SavedRun
from seewhy.split import read_split
from seewhy.store import StoredRows, take_rows

TOP = 5
BATCH = 128  # pictures that the tail answers at a time
BLOCK = 8  # batches of vectors that are held at a time


@dataclass(frozen=True)
class Evaluation:
    """What a network says of N labelled pictures.

    part: 'train', 'val', 'test' or 'all'. paths: N texts. logits: (N, C), unnormalised. labels: (N,) true classes.
    groups: (N,) a number a group of pictures that show the same. temperature: what divides the logits before the softmax.
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
        """(N, C) calibrated probabilities: softmax(logits / temperature). Of many pictures and classes they are large: 8 bytes each."""
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
        among = metrics.in_top_k(self.labels, self.logits, TOP)

        def headline(weights: npt.NDArray[np.int64]) -> list[float]:
            confusion = metrics.confusion_matrix(self.labels, self.predicted, len(self.classes), weights)
            right = float(np.diag(confusion).sum() / confusion.sum())
            return [
                right,
                float(np.average(among, weights=weights)),
                metrics.mean_per_class_accuracy(confusion),
                metrics.macro_f1(confusion),
            ]

        values = headline(np.ones(n, dtype=np.int64))
        intervals = metrics.group_bootstrap(headline, self.groups)
        count = len(np.unique(self.groups))
        if intervals[0][0] == intervals[0][1]:  # all right or all wrong: drawing again shows no spread, but there is doubt
            intervals[0] = metrics.wilson_interval(round(values[0] * count), count)
        numbers: dict[str, Any] = {"n": n, "groups": count}
        for name, value, interval in zip(metrics.HEADLINE, values, intervals, strict=True):
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
        """How far the probabilities can be believed, and what answering only the surest pictures brings."""
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


def evaluate_network(
    backbone: Backbone,
    cut: Cut,
    images: ImageSet,
    indices: npt.NDArray[np.int64],
    part: str,
    engine: str = "auto",
    workers: int = 2,
    keep: bool = True,
    flip: bool = False,
    groups: npt.NDArray[np.int64] | None = None,
    temperature: float = 1.0,
    kept: str = "auto",
) -> Evaluation:
    """Runs the pictures at `indices` (evaluation view) through the network; the frozen part comes from the cache.

    Processes that train together share the pictures, and each gets all logits.

    flip: logits are the mean of those of the picture and of its mirror image.
    groups: (N,) numbers of the pictures at `indices`; None: each is a group of its own.
    """
    trained_whole = cut.trunk is None
    halves = Cut(backbone.model, nn.Identity(), "logits") if trained_whole else cut
    views = 2 if flip else 1  # view 1 is the mirrored one
    mine = distributed.shard(indices)
    asked = mine if len(mine) else indices[:1]  # of few pictures some processes have none
    features = extract_features(images, asked, views, halves, backbone.preprocessing, engine, workers, keep and not trained_whole, kept)
    logits = tail_logits(halves.tail, features.store, features.rows[:, 0])
    if flip:
        logits += tail_logits(halves.tail, features.store, features.rows[:, 1])
        logits /= views
    return Evaluation(
        part=part,
        paths=[str(images.paths[i]) for i in indices],
        labels=images.labels[indices],
        logits=distributed.all_gather(logits[: len(mine)], len(indices)),
        classes=images.classes,
        groups=np.arange(len(indices)) if groups is None else groups,
        temperature=temperature,
    )


def classifier_vectors(
    backbone: Backbone,
    cut: Cut,
    images: ImageSet,
    indices: npt.NDArray[np.int64],
    engine: str = "auto",
    workers: int = 2,
    keep: bool = True,
    kept: str = "auto",
) -> Iterator[npt.NDArray[np.float32]] | None:
    """(B, K) what the classifier reads of the pictures at `indices` (evaluation view), block after block, (N, K) in all, for every process.

    None where the network has no such vector.
    """
    trained_whole = cut.trunk is None
    tail = with_vector(backbone, backbone.model if trained_whole else cut.tail)
    if tail is None:
        return None
    halves = Cut(tail, nn.Identity(), "vectors") if trained_whole else Cut(cut.trunk, tail, cut.place)
    mine = distributed.shard(indices)
    asked = mine if len(mine) else indices[:1]
    features = extract_features(images, asked, 1, halves, backbone.preprocessing, engine, workers, keep and not trained_whole, kept)
    return _vector_blocks(halves.tail, features, len(indices), len(mine), len(images.classes))


def _vector_blocks(tail: nn.Module, features: Features, n: int, mine: int, classes: int) -> Iterator[npt.NDArray[np.float32]]:
    """n: pictures of all processes. mine: those of this one, whose features they are; of few pictures some processes have none."""
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


def evaluate_part(
    images: ImageSet,
    indices: Any,
    part: str,
    backbone: Backbone,
    cut: Cut,
    config: TrainConfig,
    groups: Any = None,
    temperature: float = 1.0,
) -> Evaluation:
    """The pictures at `indices` as a run of this config answers them; groups: (N,) of all `images`."""
    flip, own = bool(config.test_flip), None if groups is None else groups[indices]
    how = (config.engine, config.workers, config.cache, flip, own, temperature, config.feature_dtype)
    return evaluate_network(backbone, cut, images, indices, part, *how)


def evaluate_run(run: SavedRun, part: str = "test", data: str | None = None) -> Evaluation:
    """A saved run on a part of its own split (found again by content), or on all pictures of `data`.

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
