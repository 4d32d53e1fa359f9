"""A fitted network x a part of the pictures -> Evaluation: logits, metrics, confusion matrix."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from seewhy import metrics
from seewhy.backbones import Backbone
from seewhy.cutting import Cut
from seewhy.features import extract_features, take_rows
from seewhy.images import ImageSet


@dataclass(frozen=True)
class Evaluation:
    """What a network says of N labelled pictures.

    part: 'train', 'val', 'test' or 'all'. logits: (N, C), unnormalised. labels: (N,) true classes.
    """

    part: str
    paths: tuple[str, ...]
    labels: npt.NDArray[np.int64]
    logits: npt.NDArray[np.float32]
    classes: tuple[str, ...]

    @cached_property
    def probs(self) -> npt.NDArray[np.float64]:
        """(N, C) softmax probabilities."""
        return metrics.softmax(self.logits)

    @cached_property
    def predicted(self) -> npt.NDArray[np.int64]:
        """(N,) most probable classes."""
        best: npt.NDArray[np.int64] = self.logits.argmax(axis=1)
        return best

    @cached_property
    def confusion(self) -> npt.NDArray[np.int64]:
        """(C, C) counts; row = true, column = predicted."""
        return metrics.confusion_matrix(self.labels, self.predicted, len(self.classes))

    @cached_property
    def metrics(self) -> dict[str, Any]:
        """The entry of `metrics.json`: headline numbers and one row a class."""
        n = len(self.labels)
        correct = int((self.labels == self.predicted).sum())
        rows = metrics.per_class(self.confusion)
        return {
            "n": n,
            "accuracy": correct / n,
            "accuracy_ci95": list(metrics.wilson_interval(correct, n)),
            "top5_accuracy": metrics.top_k_accuracy(self.labels, self.logits, 5),
            "mean_per_class_accuracy": metrics.mean_per_class_accuracy(self.confusion),
            "macro_f1": metrics.macro_f1(self.confusion),
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
) -> Evaluation:
    """Runs the pictures at `indices` (evaluation view) through the network; the frozen part comes from the cache.

    flip: logits are the mean of those of the picture and of its mirror image.
    """
    trained_whole = cut.trunk is None
    halves = Cut(backbone.model, nn.Identity(), "logits") if trained_whole else cut
    views = 2 if flip else 1  # view 1 is the mirrored one
    features = extract_features(images, indices, views, halves, backbone.preprocessing, engine, workers, keep and not trained_whole)
    return Evaluation(
        part=part,
        paths=tuple(str(images.paths[i]) for i in indices),
        labels=images.labels[indices],
        logits=np.mean([tail_logits(halves.tail, features.store, features.rows[:, view]) for view in range(views)], axis=0),
        classes=images.classes,
    )


@torch.inference_mode()
def tail_logits(tail: nn.Module, store: npt.NDArray[Any], rows: npt.NDArray[np.int64], batch: int = 128) -> npt.NDArray[np.float32]:
    """(N, C) logits of stored features; `tail` runs in eval mode."""
    tail.eval()
    parts = []
    for start in range(0, len(rows), batch):
        features = torch.from_numpy(take_rows(store, rows[start : start + batch]))
        parts.append(tail(features).float().numpy())
    return np.concatenate(parts)
