"""Evaluate a network on labelled images: logits, metrics, confusion matrix, and penultimate features."""

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
BATCH = 128  # images per forward pass of the tail
BLOCK = 8  # batches of vectors in memory at a time


@dataclass(frozen=True, eq=False)
class Evaluation:
    """Predictions for N labelled images.

    part: 'train', 'val', 'test' or 'all'. paths: N strings. labels: (N,) true classes. logits: (N, C), unnormalised.
    groups: (N,) near-duplicate group of each image. temperature: divisor of the logits before the softmax.
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
        """(N, C) float64 calibrated probabilities: softmax(logits / temperature)."""
        return self._probs_of(slice(None))

    def _probs_of(self, rows: slice) -> npt.NDArray[np.float64]:
        return metrics.softmax(self.logits[rows] / self.temperature)

    @cached_property
    def predicted(self) -> npt.NDArray[np.int64]:
        """(N,) most probable class of each image."""
        best: npt.NDArray[np.int64] = self.logits.argmax(axis=1)
        return best

    @cached_property
    def confidence(self) -> npt.NDArray[np.float64]:
        """(N,) probability of the predicted class."""
        return metrics.map_rows(lambda rows: self._probs_of(rows).max(axis=1), len(self.labels))

    @property
    def correct(self) -> npt.NDArray[np.bool_]:
        """(N,) whether the predicted class is the true class."""
        same: npt.NDArray[np.bool_] = self.predicted == self.labels
        return same

    @cached_property
    def confusion(self) -> npt.NDArray[np.int64]:
        """(C, C) counts; row = true class, column = predicted class."""
        return metrics.confusion_matrix(self.labels, self.predicted, len(self.classes))

    @cached_property
    def metrics(self) -> dict[str, Any]:
        """The entry of `metrics.json` (docs/reference/run.md): headline metrics with intervals, calibration, one row per class."""
        n = len(self.labels)
        rows = metrics.per_class(self.confusion)
        names = [name for name in metrics.HEADLINE if name != "top5_accuracy" or len(self.classes) > TOP]
        in_top5 = metrics.in_top_k(self.labels, self.logits, TOP)

        def headline(weights: npt.NDArray[np.int64]) -> list[float]:
            confusion = metrics.confusion_matrix(self.labels, self.predicted, len(self.classes), weights)
            values = {
                "accuracy": float(np.diag(confusion).sum() / confusion.sum()),
                "top5_accuracy": float(np.average(in_top5, weights=weights)),
                "mean_per_class_accuracy": metrics.mean_per_class_accuracy(confusion),
                "macro_f1": metrics.macro_f1(confusion),
            }
            return [values[name] for name in names]

        values = headline(np.ones(n, dtype=np.int64))
        intervals = metrics.group_bootstrap(headline, self.groups)
        count = len(np.unique(self.groups))
        if intervals[0][0] == intervals[0][1]:  # all correct or all wrong: resampling has no spread
            intervals[0] = metrics.wilson_interval(round(values[0] * count), count)
        entry: dict[str, Any] = {"n": n, "groups": count}
        for name, value, interval in zip(names, values, intervals, strict=True):
            entry |= {name: value, f"{name}_ci95": list(interval)}
        columns = (self.classes, rows.precision.tolist(), rows.recall.tolist(), rows.f1.tolist(), rows.support.tolist())
        keys = ("class", "precision", "recall", "f1", "n")
        return entry | self._calibration() | {"per_class": [dict(zip(keys, row, strict=True)) for row in zip(*columns, strict=True)]}

    def _calibration(self) -> dict[str, Any]:
        """Proper scores, calibration error before and after temperature scaling, and the area under the risk-coverage curve."""
        labels, n = self.labels, len(self.labels)
        uncalibrated = metrics.map_rows(lambda rows: metrics.softmax(self.logits[rows]).max(axis=1), n)
        nats = metrics.map_rows(lambda rows: metrics.sample_nll(labels[rows], self.logits[rows] / self.temperature), n)
        distances = metrics.map_rows(lambda rows: calibration.squared_distances(labels[rows], self._probs_of(rows)), n)
        return {
            "negative_log_likelihood": float(nats.mean()),
            "brier_score": float(distances.mean()),
            "expected_calibration_error": calibration.expected_calibration_error(self.confidence, self.correct),
            "expected_calibration_error_uncalibrated": calibration.expected_calibration_error(uncalibrated, self.correct),
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
    """Evaluate the images at `indices`, with the features of the frozen trunk from the cache.

    With tta_flip, logits are the mean over the image and its mirror image. Distributed processes share the images, and each gets all
    logits.
    groups: (len(images),) near-duplicate group of each image; None: each is its own group.
    """
    spec = FeatureSpec.of(config)
    if cut.trunk is None:  # no frozen part
        cut, spec = TrunkTail(backbone.model, nn.Identity(), "logits"), replace(spec, cache=False)
    views = MIRRORED_VIEW + 1 if config.tta_flip else EVAL_VIEW + 1
    features, local = _local_features(images, indices, views, cut, backbone, spec)
    logits = tail_logits(cut.tail, features.store, features.rows[:, EVAL_VIEW])
    if config.tta_flip:
        logits += tail_logits(cut.tail, features.store, features.rows[:, MIRRORED_VIEW])
        logits /= views
    return Evaluation(
        part=part,
        paths=[str(images.paths[i]) for i in indices],
        labels=images.labels[indices],
        logits=distributed.all_gather(logits[:local], len(indices)),
        classes=images.classes,
        groups=np.arange(len(indices)) if groups is None else groups[indices],
        temperature=temperature,
    )


def _local_features(
    images: ImageSet, indices: npt.NDArray[np.int64], views: int, cut: TrunkTail, backbone: Backbone, spec: FeatureSpec
) -> tuple[Features, int]:
    """Features of this process's shard of `indices`, and its size; of the first image if the shard is empty."""
    shard = distributed.shard(indices)
    return extract_features(images, shard if len(shard) else indices[:1], views, cut, backbone.preprocessing, spec), len(shard)


def classifier_vectors(
    backbone: Backbone, cut: TrunkTail, images: ImageSet, indices: npt.NDArray[np.int64], spec: FeatureSpec
) -> Iterator[npt.NDArray[np.float32]] | None:
    """Blocks (B, K) of the penultimate features of the images at `indices`, (N, K) in all and in every process; None if there are none."""
    tail = with_penultimate(backbone, backbone.model if cut.trunk is None else cut.tail)
    if tail is None:
        return None
    cut = TrunkTail(tail, nn.Identity(), "vectors") if cut.trunk is None else TrunkTail(cut.trunk, tail, cut.cut_point)
    features, local = _local_features(images, indices, EVAL_VIEW + 1, cut, backbone, spec)
    return _vector_blocks(cut.tail, features, len(indices), local, len(images.classes))


def _vector_blocks(tail: nn.Module, features: Features, n: int, local: int, classes: int) -> Iterator[npt.NDArray[np.float32]]:
    """Gather blocks of vectors; n: images of all processes, local: images of this one, possibly 0."""
    processes = distributed.world_size()
    for start in range(0, n, BLOCK * BATCH * processes):
        begin = start // processes
        rows = features.rows[begin : begin + BLOCK * BATCH, 0] if begin < local else features.rows[:1, 0]
        vectors = tail_logits(tail, features.store, rows)[: max(local - begin, 0), classes:]
        yield distributed.all_gather(vectors, min(n - start, BLOCK * BATCH * processes))


@torch.inference_mode()
def tail_logits(
    tail: nn.Module, store: npt.NDArray[Any] | StoredRows, rows: npt.NDArray[np.int64], batch: int = BATCH
) -> npt.NDArray[np.float32]:
    """(N, C) outputs of `tail`, in eval mode, for stored features."""
    tail.eval()
    logits = np.empty((0, 0), dtype=np.float32)
    with progress("evaluating", len(rows)) as advance:
        for start in range(0, len(rows), batch):
            features = torch.from_numpy(take_rows(store, rows[start : start + batch]))
            outputs = tail(features).float().numpy()
            if not start:
                logits = np.empty((len(rows), outputs.shape[1]), dtype=np.float32)
            logits[start : start + batch] = outputs
            advance(len(features))
    return logits


def evaluate_run(run: SavedRun, part: str = "test", data: str | None = None) -> Evaluation:
    """Evaluate a saved run on a part of its own split, matched by content, or on all images of `data`.

    Raises SplitError if the data has changed since, DataError for classes that the run does not have.
    """
    config = run.config
    images = open_images(data or config.data, config.data_root, config.skip_bad, config.workers)
    if data is not None:
        indices, part, groups = np.arange(len(images)), "all", None
    else:
        split = read_split(run.path, images)
        indices, groups = split.part(part), split.groups
    if unknown := sorted(set(images.classes) - set(run.classes)):
        raise DataError(
            f"{images.root}: class {unknown[0]!r} is not one of the run's {len(run.classes)} classes; rename or remove its folder"
        )
    if images.classes != run.classes:  # a folder with fewer classes: use the run's class numbers
        class_numbers = np.array([run.classes.index(name) for name in images.classes])
        images = replace(images, classes=run.classes, labels=class_numbers[images.labels])
    return evaluate_part(images, indices, part, run.backbone, run.cut, config, groups, run.temperature)
