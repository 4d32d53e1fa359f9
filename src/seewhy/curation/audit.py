"""Audit a labelled dataset before training: near-duplicates, the leak they cause, label issues and image issues."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd

from seewhy.core.progress import progress
from seewhy.curation.grouping import MANY
from seewhy.curation.image_issues import find_image_issues
from seewhy.curation.label_issues import ISSUE_LOG_ODDS, LabelIssues, fit_lda, out_of_fold, rank_label_issues
from seewhy.curation.near_duplicates import NearPairs, label_groups, near_pairs
from seewhy.curation.split import split_images
from seewhy.data.image_set import ImageSet
from seewhy.errors import SplitError, require
from seewhy.models.features import embed

SEEDS = 5  # splits over which the leak is measured
Indices = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Leak:
    """Effect of near-duplicates on the test accuracy of random splits; one value per seed, 0..1.

    leaked: share of test images with a near-duplicate in train. plain, grouped: test accuracy of one classifier under a split that keeps
    only exact duplicates together, and under one that keeps near-duplicates together. on_leaked, on_others: plain, on the leaked and on
    the other test images; nan where there are none.
    """

    leaked: tuple[float, ...]
    plain: tuple[float, ...]
    grouped: tuple[float, ...]
    on_leaked: tuple[float, ...]
    on_others: tuple[float, ...]


@dataclass(frozen=True, eq=False)
class Audit:
    """Findings on N labelled images.

    groups: (N,) near-duplicate group of each image. leak: None if a class is too small to split. log_probs: (N, C) out of fold.
    image_issues: see `find_image_issues`.
    """

    images: ImageSet
    near: NearPairs
    groups: Indices
    leak: Leak | None
    log_probs: npt.NDArray[np.float64]
    label_issues: LabelIssues
    image_issues: pd.DataFrame

    @property
    def across_labels(self) -> npt.NDArray[np.bool_]:
        """(P,) whether the two images of each near pair have different labels."""
        different: npt.NDArray[np.bool_] = np.diff(self.images.labels[self.near.pairs], axis=1)[:, 0] != 0
        return different

    @property
    def scored(self) -> npt.NDArray[np.bool_]:
        """(N,) whether the image's classifier was fitted on its class."""
        finite: npt.NDArray[np.bool_] = np.isfinite(self.log_probs[np.arange(len(self.images)), self.images.labels])
        return finite

    def pairs_table(self) -> pd.DataFrame:
        """One row per near pair: path_a, class_a, path_b, class_b, kind, bits, cosine."""
        names, paths = np.array(self.images.classes), np.array([str(path) for path in self.images.paths])
        sides = {
            f"{column}_{side}": values[indices]
            for side, indices in zip("ab", self.near.pairs.T, strict=True)
            for column, values in (("path", paths), ("class", names[self.images.labels]))
        }
        return pd.DataFrame({**sides, "kind": self.near.kinds, "bits": self.near.distances, "cosine": self.near.cosines.round(4)})

    def groups_table(self) -> pd.DataFrame:
        """One row per image: path relative to the dataset's folder, and group; the input of `--group-by`."""
        names = [path.relative_to(self.images.root).as_posix() for path in self.images.paths]
        return pd.DataFrame({"path": names, "group": self.groups})

    def labels_table(self) -> pd.DataFrame:
        """One row per image, the least probable label first: path, label, suggested, prob_label, prob_suggested, log_odds."""
        order, suggested, names = self.label_issues.order, self.label_issues.suggested, np.array(self.images.classes)
        labels = self.images.labels[order]
        return pd.DataFrame(
            {
                "path": [str(self.images.paths[i]) for i in order],
                "label": names[labels],
                "suggested": names[suggested],
                "prob_label": np.exp(self.log_probs[order, labels]).round(6),
                "prob_suggested": np.exp(self.log_probs[order, suggested]).round(6),
                "log_odds": self.label_issues.log_odds.round(3),
            }
        )

    def confusions_table(self) -> pd.DataFrame:
        """One row per pair of classes confused out of fold, the most frequent first: label, predicted, images."""
        predicted, names = self.log_probs.argmax(axis=1), np.array(self.images.classes)
        wrong = (predicted != self.images.labels) & self.scored
        table = pd.DataFrame({"label": names[self.images.labels[wrong]], "predicted": names[predicted[wrong]]})
        return table.value_counts().rename("images").reset_index()

    def summary(self) -> dict[str, Any]:
        """The counts, JSON-ready."""
        sizes = np.bincount(self.groups)
        correct = (self.log_probs.argmax(axis=1) == self.images.labels)[self.scored]
        by_class = pd.Series(np.array(self.images.classes)[self.images.labels[self.near.pairs[:, 0]]]).value_counts()
        counts: dict[str, Any] = {
            "images": len(self.images),
            "classes": len(self.images.classes),
            "pairs": {kind: int((self.near.kinds == kind).sum()) for kind in ("exact", "hash", "features")},
            "pairs_across_labels": int(self.across_labels.sum()),
            "groups": int((sizes > 1).sum()),
            "grouped_images": int(sizes[sizes > 1].sum()),
            "largest_group": int(sizes.max()),
            "pairs_by_class": {str(name): int(count) for name, count in by_class.head(10).items()},
            "out_of_fold_accuracy": float(correct.mean()) if len(correct) else None,
            "label_issues": int((self.label_issues.log_odds < ISSUE_LOG_ODDS).sum()),
            "image_issues": {str(name): int(count) for name, count in self.image_issues["issue"].value_counts().items()},
        }
        if self.leak is not None:
            finite = {name: [v for v in values if not math.isnan(v)] for name, values in vars(self.leak).items()}
            counts["leak"] = {name: float(np.mean(values)) if values else None for name, values in finite.items()}
            counts["leak"]["seeds"] = len(self.leak.plain)
        return counts


def audit_images(images: ImageSet, seeds: int = SEEDS, workers: int = 2) -> Audit:
    """Audit labelled images, with features of the bundled network; ConfigError without the extra `audit`."""
    require("audit", "seewhy audit", "cleanvision")
    vectors = embed(images, workers=workers)
    near = near_pairs(images, vectors if len(images) <= MANY else None)
    groups = label_groups(len(images), near.pairs)
    with progress("auditing", 3) as advance:
        leak = measure_leak(images, vectors, groups, seeds)
        advance(1)
        log_probs = out_of_fold(vectors, images.labels, groups)
        advance(1)
        image_issues = find_image_issues(images.paths)
        advance(1)
    return Audit(images, near, groups, leak, log_probs, rank_label_issues(images.labels, log_probs), image_issues)


def measure_leak(images: ImageSet, vectors: npt.NDArray[np.float32], groups: Indices, seeds: int) -> Leak | None:
    """Compare a linear discriminant on (N, K) features under plain and grouped splits; None if a class is too small for either."""
    images = replace(images, parts=("",) * len(images))  # random splits, whatever the folders give
    rows = []
    for seed in range(seeds):
        try:
            plain, grouped = (split_images(images, seed=seed, groups=of) for of in (None, groups))
        except SplitError:
            return None
        if min(len(plain.train), len(grouped.train)) <= len(images.classes):  # too few for a covariance
            return None
        leaked = np.isin(groups[plain.test], groups[plain.train])
        correct, correct_grouped = (
            fit_lda(vectors[split.train], images.labels[split.train]).predict(vectors[split.test]) == images.labels[split.test]
            for split in (plain, grouped)
        )
        parts = (correct[inside].mean() if inside.any() else math.nan for inside in (leaked, ~leaked))
        rows.append((leaked.mean(), correct.mean(), correct_grouped.mean(), *parts))
    return Leak(*(tuple(float(value) for value in column) for column in zip(*rows, strict=True)))
