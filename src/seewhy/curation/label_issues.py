"""Find label issues: out-of-fold class probabilities from features, ranked by the log-odds of the given label."""

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
ISSUE_LOG_ODDS = -math.log(20)  # below this a label is an issue: another class is more than 20 times as probable
MIN_LOG_PROB = -1e3  # stands for the log-probability of no class

Labels = npt.NDArray[np.int64]
LogProbs = npt.NDArray[np.float64]


def fit_lda(vectors: npt.NDArray[np.float32], labels: Labels) -> LinearDiscriminantAnalysis:
    """Fit linear discriminant analysis with Ledoit-Wolf shrinkage to (N, K) features."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Only one sample available")  # of a class
        return LinearDiscriminantAnalysis(solver="lsqr", shrinkage="auto").fit(vectors, labels)


def log_probabilities(model: LinearDiscriminantAnalysis, vectors: npt.NDArray[np.float32]) -> LogProbs:
    """(N, C) float64, without scikit-learn's lower limit, so that very unlikely classes can still be ranked."""
    scores = np.asarray(model.decision_function(vectors), dtype=np.float64)
    if scores.ndim == 1:  # of two classes: the log-odds of the second
        scores = np.stack([np.zeros_like(scores), scores], axis=1)
    log_probs: LogProbs = log_softmax(scores, axis=1)
    return log_probs


def out_of_fold(vectors: npt.NDArray[np.float32], labels: Labels, groups: Labels, folds: int = FOLDS, seed: int = 0) -> LogProbs:
    """(N, K) features, (N,) labels and groups -> (N, C) log-probabilities, each by a classifier that was not fitted on the image's group.

    The classifier is a linear discriminant: one wrong label among many hardly moves the mean of a class. Classes that are missing from
    the training part of a fold have -inf.
    """
    log_probs = np.full((len(labels), int(labels.max()) + 1), -np.inf)
    folds = min(folds, int(np.bincount(labels).max()), len(np.unique(groups)))
    if folds < 2:
        return log_probs
    splitter = StratifiedGroupKFold(folds, shuffle=True, random_state=seed)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The least populated class")
        for train, held_out in splitter.split(vectors, labels, groups):
            if not 1 < len(np.unique(labels[train])) < len(train):  # too few images for a covariance
                continue
            model = fit_lda(vectors[train], labels[train])
            log_probs[np.ix_(held_out, model.classes_)] = log_probabilities(model, vectors[held_out])
    return log_probs


@dataclass(frozen=True, eq=False)
class LabelIssues:
    """The labels of N images, the least probable first.

    order: (N,) images. log_odds: (N,) of the label against the most probable other class, in nats and in this order; infinite where no
    classifier was fitted on the class. suggested: (N,) that other class, in this order.
    """

    order: Labels
    log_odds: npt.NDArray[np.float64]
    suggested: Labels


def rank_label_issues(labels: Labels, log_probs: LogProbs) -> LabelIssues:
    """Rank labels by their log-odds; `log_probs` (N, C) must be out of fold.

    Confident learning ranks by the margin of probabilities (Northcutt 2021, arXiv:1911.00068), which saturates: a confident classifier
    gives most wrong labels, and many hard images, the same margin of -1. With 5% of Caltech-101's labels changed at random, the first 5%
    by log-odds hold more of them (benchmarks/trust.py).
    """
    own = log_probs[np.arange(len(labels)), labels]
    others = log_probs.copy()
    others[np.arange(len(labels)), labels] = -np.inf
    log_odds = np.where(np.isfinite(own), own - np.maximum(others.max(axis=1), MIN_LOG_PROB), np.inf)
    order = np.argsort(log_odds, kind="stable").astype(np.int64)
    return LabelIssues(order, log_odds[order], others.argmax(axis=1)[order].astype(np.int64))
