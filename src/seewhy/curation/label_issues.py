"""Vectors and labels -> the labels least to be believed: probabilities out of fold, ranked by their odds."""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy.special import log_softmax
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis
from sklearn.model_selection import StratifiedGroupKFold

FOLDS = 5
ISSUE_LOG_ODDS = -math.log(20)  # log-odds from which a label is an issue: another class is 20 times as probable
LEAST = -1e3  # log-probability that stands for none

Labels = npt.NDArray[np.int64]
LogProbs = npt.NDArray[np.float64]


def fit_lda(vectors: npt.NDArray[np.float32], labels: Labels) -> LinearDiscriminantAnalysis:
    """Linear discriminant analysis with Ledoit and Wolf's shrunken covariance, fitted: a classifier in closed form."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Only one sample available")  # of a class
        return LinearDiscriminantAnalysis(solver="lsqr", shrinkage="auto").fit(vectors, labels)


def log_probabilities(model: LinearDiscriminantAnalysis, vectors: npt.NDArray[np.float32]) -> LogProbs:
    """(N, C) in float64 and without scikit-learn's lower limit, so that very unlikely classes can still be told apart."""
    scores = np.asarray(model.decision_function(vectors), dtype=np.float64)
    if scores.ndim == 1:  # of two classes: the log-odds of the second
        scores = np.stack([np.zeros_like(scores), scores], axis=1)
    found: LogProbs = log_softmax(scores, axis=1)
    return found


def out_of_fold(vectors: npt.NDArray[np.float32], labels: Labels, groups: Labels, folds: int = FOLDS, seed: int = 0) -> LogProbs:
    """(N, K) features, (N,) labels and groups -> (N, C) log-probabilities of each image by a classifier that saw none of its group.

    The classifier is a linear discriminant: one wrong label among many moves a class's mean but little. A class that is missing from a
    fold's training part has -inf there.
    """
    log_probs = np.full((len(labels), int(labels.max()) + 1), -np.inf)
    folds = min(folds, int(np.bincount(labels).max()), len(np.unique(groups)))
    if folds < 2:  # nobody could be asked about anything
        return log_probs
    splitter = StratifiedGroupKFold(folds, shuffle=True, random_state=seed)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The least populated class")  # then some folds do not ask about it
        for train, rest in splitter.split(vectors, labels, groups):
            if not 1 < len(np.unique(labels[train])) < len(train):  # too few images for a covariance
                continue
            model = fit_lda(vectors[train], labels[train])
            log_probs[np.ix_(rest, model.classes_)] = log_probabilities(model, vectors[rest])
    return log_probs


@dataclass(frozen=True, eq=False)
class LabelIssues:
    """The labels of N images, the least believable first.

    order: (N,) images. log_odds: (N,) of the label against the likeliest other class, in nats and in this order; negative where the
    other is likelier, infinite where nobody who knows the class was asked. suggested: (N,) that other class, in this order.
    """

    order: Labels
    log_odds: npt.NDArray[np.float64]
    suggested: Labels


def rank_label_issues(labels: Labels, log_probs: LogProbs) -> LabelIssues:
    """Ranks by the log-odds of the label; log_probs must be out of fold.

    Confident learning ranks by the margin of probabilities (Northcutt 2021, arXiv:1911.00068), which saturates: a classifier that is
    sure gives most wrong labels, and many hard images, the same margin of -1. Of 5% flipped labels of Caltech-101 the first 5% by
    log-odds hold more (benchmarks/trust.py).
    """
    own = log_probs[np.arange(len(labels)), labels]
    others = log_probs.copy()
    others[np.arange(len(labels)), labels] = -np.inf
    # Where no classifier that was asked knew the class, there is no doubt to speak of: last.
    log_odds = np.where(np.isfinite(own), own - np.maximum(others.max(axis=1), LEAST), np.inf)
    order = np.argsort(log_odds, kind="stable").astype(np.int64)
    return LabelIssues(order, log_odds[order], others.argmax(axis=1)[order].astype(np.int64))


def with_label_noise(labels: Labels, share: float, seed: int = 0) -> tuple[Labels, npt.NDArray[np.bool_]]:
    """Labels of which a share was given another class at random, and which ones: what a measurement of the ranking starts from."""
    rng = np.random.default_rng(seed)
    classes = int(labels.max()) + 1
    wrong = np.zeros(len(labels), dtype=bool)
    wrong[rng.permutation(len(labels))[: round(share * len(labels))]] = True
    moved = (labels + rng.integers(1, classes, len(labels))) % classes
    return np.where(wrong, moved, labels), wrong
