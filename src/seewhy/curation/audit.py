"""Images -> Audit: near-duplicates, what they leak and what that is worth, label issues, image issues."""

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
    """What splitting at random, with equal files alone kept together, does to a test accuracy; one entry a seed, 0..1 each.

    leaked: share of test images with a near-duplicate in train. plain, grouped: test accuracy of the same classifier under that
    split and under one that keeps near-duplicates together. on_leaked, on_others: the former's, on the leaked and the other images.
    """

    leaked: tuple[float, ...]
    plain: tuple[float, ...]
    grouped: tuple[float, ...]
    on_leaked: tuple[float, ...]
    on_others: tuple[float, ...]


@dataclass(frozen=True, eq=False)
class Audit:
    """What is worth knowing of N labelled images before they are trained on.

    near, groups: near-duplicates, and (N,) a number a group of them. leak: None where some class is too small to divide.
    log_probs: (N, C) out of fold. label_issues: labels, the least believable first. image_issues: as `find_image_issues`.
    """

    images: ImageSet
    near: NearPairs
    groups: Indices
    leak: Leak | None
    log_probs: npt.NDArray[np.float64]
    label_issues: LabelIssues
    image_issues: pd.DataFrame

    @property
    def across(self) -> npt.NDArray[np.bool_]:
        """(P,) which near pairs have different labels."""
        labels = self.images.labels
        crossing: npt.NDArray[np.bool_] = labels[self.near.pairs[:, 0]] != labels[self.near.pairs[:, 1]]
        return crossing

    @property
    def asked(self) -> npt.NDArray[np.bool_]:
        """(N,) which images were judged by a classifier that knows their class."""
        own: npt.NDArray[np.bool_] = np.isfinite(self.log_probs[np.arange(len(self.images)), self.images.labels])
        return own

    def pairs_table(self) -> pd.DataFrame:
        """A row a near pair: path_a, class_a, path_b, class_b, kind, bits, cosine."""
        first, second = self.near.pairs.T
        names, paths = np.array(self.images.classes), np.array([str(path) for path in self.images.paths])
        return pd.DataFrame(
            {
                "path_a": paths[first],
                "class_a": names[self.images.labels[first]],
                "path_b": paths[second],
                "class_b": names[self.images.labels[second]],
                "kind": self.near.kinds,
                "bits": self.near.distances,
                "cosine": self.near.cosines.round(4),
            }
        )

    def groups_table(self) -> pd.DataFrame:
        """A row an image, path below the dataset's folder and group: what `--group-by` takes, to be mended by hand."""
        names = [path.relative_to(self.images.root).as_posix() for path in self.images.paths]
        return pd.DataFrame({"path": names, "group": self.groups})

    def labels_table(self) -> pd.DataFrame:
        """A row an image, the least believable label first: path, label, suggested, prob_label, prob_suggested, log_odds."""
        order, names = self.label_issues.order, np.array(self.images.classes)
        own = self.images.labels[order]
        return pd.DataFrame(
            {
                "path": [str(self.images.paths[i]) for i in order],
                "label": names[own],
                "suggested": names[self.label_issues.suggested],
                "prob_label": np.exp(self.log_probs[order, own]).round(6),
                "prob_suggested": np.exp(self.log_probs[order, self.label_issues.suggested]).round(6),
                "log_odds": self.label_issues.log_odds.round(3),
            }
        )

    def confusions_table(self) -> pd.DataFrame:
        """A row a pair of classes, the commonest first: label, predicted (out of fold), images."""
        predicted, names = self.log_probs.argmax(axis=1), np.array(self.images.classes)
        wrong = (predicted != self.images.labels) & self.asked
        table = pd.DataFrame({"label": names[self.images.labels[wrong]], "predicted": names[predicted[wrong]]})
        return table.value_counts().rename("images").reset_index()

    def summary(self) -> dict[str, Any]:
        """The counts, JSON-ready."""
        sizes = np.bincount(self.groups)
        right = (self.log_probs.argmax(axis=1) == self.images.labels)[self.asked]
        by_class = pd.Series(np.array(self.images.classes)[self.images.labels[self.near.pairs[:, 0]]]).value_counts()
        counts: dict[str, Any] = {
            "images": len(self.images),
            "classes": len(self.images.classes),
            "pairs": {kind: int((self.near.kinds == kind).sum()) for kind in ("exact", "hash", "features")},
            "pairs_across_labels": int(self.across.sum()),
            "groups": int((sizes > 1).sum()),
            "grouped_images": int(sizes[sizes > 1].sum()),
            "largest_group": int(sizes.max()),
            "pairs_by_class": {str(name): int(count) for name, count in by_class.head(10).items()},
            "out_of_fold_accuracy": float(right.mean()) if len(right) else None,
            "label_issues": int((self.label_issues.log_odds < ISSUE_LOG_ODDS).sum()),
            "image_issues": {str(name): int(count) for name, count in self.image_issues["issue"].value_counts().items()},
        }
        if self.leak is not None:
            means = {name: [v for v in values if not math.isnan(v)] for name, values in vars(self.leak).items()}
            counts["leak"] = {name: float(np.mean(values)) if values else None for name, values in means.items()}
            counts["leak"]["seeds"] = len(self.leak.plain)
        return counts


def audit_images(images: ImageSet, seeds: int = SEEDS, workers: int = 2) -> Audit:
    """Looks through labelled images; all that needs a network uses the one that comes with the package."""
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
    """The same classifier (a linear discriminant on the vectors) under plain and grouped splits; None where some class is too small."""
    images = replace(images, parts=("",) * len(images))  # what folders give is no random split
    rows = []
    for seed in range(seeds):
        try:
            plain, grouped = (split_images(images, seed=seed, groups=chosen) for chosen in (None, groups))
        except SplitError:
            return None
        if min(len(plain.train), len(grouped.train)) <= len(images.classes):  # too few for a covariance
            return None
        leaked = np.isin(groups[plain.test], groups[plain.train])
        right, right_grouped = (
            fit_lda(vectors[split.train], images.labels[split.train]).predict(vectors[split.test]) == images.labels[split.test]
            for split in (plain, grouped)
        )
        on_leaked = right[leaked].mean() if leaked.any() else np.nan
        rows.append((leaked.mean(), right.mean(), right_grouped.mean(), on_leaked, right[~leaked].mean() if not leaked.all() else np.nan))
    return Leak(*(tuple(float(value) for value in column) for column in zip(*rows, strict=True)))
