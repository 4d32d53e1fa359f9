"""Features and logits -> OOD scores: SCORES, one pure function a score. A run uses the nearest neighbours; the others are its rivals."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy.linalg import eigh
from scipy.special import logsumexp
from scipy.stats import rankdata
from sklearn.covariance import ledoit_wolf

from seewhy.models.ood import Array, fit_reference, sample_references

RESIDUAL_SHARE = 0.5  # of the dimensions, the ones in which training features vary least (ViM)


@dataclass(frozen=True)
class Known:
    """What is known of N training images: vectors (N, K) before the classifier, logits (N, C), labels (N,)."""

    vectors: Array
    logits: Array
    labels: npt.NDArray[np.int64]


Score = npt.NDArray[np.float64]
Measure = Callable[[Array, Array], Score]  # (vectors (M, K), logits (M, C)) -> (M,)


def max_prob(known: Known) -> Measure:
    """1 - the largest probability: the baseline (Hendrycks 2017, arXiv:1610.02136)."""
    return lambda vectors, logits: 1 - np.exp(logits.max(axis=1) - logsumexp(logits.astype(np.float64), axis=1))


def max_logit(known: Known) -> Measure:
    """- the largest logit (Hendrycks 2022, arXiv:1911.11132)."""
    return lambda vectors, logits: np.asarray(-logits.max(axis=1), dtype=np.float64)


def energy(known: Known) -> Measure:
    """- log sum exp of the logits (Liu 2020, arXiv:2010.03759)."""
    return lambda vectors, logits: -logsumexp(logits.astype(np.float64), axis=1)


def mahalanobis(known: Known) -> Measure:
    """Squared Mahalanobis distance to the nearest class mean, one covariance for all classes (Lee 2018, arXiv:1807.03888).

    The covariance is shrunken (Ledoit and Wolf 2004), since features often are as many as images.
    """
    means, whiten = class_means(known), _whitening(known)
    centres = means @ whiten

    def measure(vectors: Array, logits: Array) -> Score:
        return nearest_squared(vectors.astype(np.float64) @ whiten, centres)

    return measure


def relative_mahalanobis(known: Known) -> Measure:
    """The same, less the squared distance to the mean of all images under the covariance of all (Ren 2021, arXiv:2106.09022)."""
    near = mahalanobis(known)
    centre = known.vectors.mean(axis=0)
    covariance = _covariance(known.vectors.astype(np.float64))
    values, axes = eigh(covariance)
    whiten = axes / np.sqrt(values)

    def measure(vectors: Array, logits: Array) -> Score:
        whole: Score = near(vectors, logits) - np.square((vectors - centre).astype(np.float64) @ whiten).sum(axis=1)
        return whole

    return measure


def nearest_neighbours(known: Known) -> Measure:
    """Cosine distance to the third nearest of a sample of the training images: what runs use."""
    reference = fit_reference(known.vectors[sample_references(np.arange(len(known.vectors)), seed=0)])
    return lambda vectors, logits: reference.ood_score(vectors)


def virtual_logit(known: Known) -> Measure:
    """Length of the features outside the main space of the training features, scaled, less the energy (ViM, arXiv:2203.10807)."""
    centre = known.vectors.mean(axis=0)
    centred = (known.vectors - centre).astype(np.float64)
    _, axes = eigh(centred.T @ centred)  # the smallest eigenvalues first
    rest = axes[:, : max(1, round(RESIDUAL_SHARE * axes.shape[1]))]
    alpha = known.logits.max(axis=1).mean() / np.linalg.norm(centred @ rest, axis=1).mean()

    def measure(vectors: Array, logits: Array) -> Score:
        virtual: Score = alpha * np.linalg.norm((vectors - centre).astype(np.float64) @ rest, axis=1)
        return virtual - logsumexp(logits.astype(np.float64), axis=1)

    return measure


SCORES: dict[str, Callable[[Known], Measure]] = {
    "max prob": max_prob,
    "max logit": max_logit,
    "energy": energy,
    "mahalanobis": mahalanobis,
    "relative mahalanobis": relative_mahalanobis,
    "nearest neighbours": nearest_neighbours,
    "virtual logit": virtual_logit,
}


# ---------------------------------------------------------------- steps of the above


def class_means(known: Known) -> npt.NDArray[np.float64]:
    """(C, K) mean vector of each class that has images."""
    return np.stack([known.vectors[known.labels == c].mean(axis=0) for c in np.unique(known.labels)]).astype(np.float64)


def _whitening(known: Known) -> npt.NDArray[np.float64]:
    """(K, K) W with W W^T the inverse of the covariance within classes: distances after `@ W` are Mahalanobis distances."""
    means = class_means(known)
    _, places = np.unique(known.labels, return_inverse=True)
    covariance = _covariance(known.vectors - means[places], assume_centered=True)
    values, axes = eigh(covariance)
    whiten: npt.NDArray[np.float64] = axes / np.sqrt(values)
    return whiten


def _covariance(vectors: Array, assume_centered: bool = False) -> npt.NDArray[np.float64]:
    """(N, K) -> (K, K), shrunken."""
    covariance: npt.NDArray[np.float64] = ledoit_wolf(vectors, assume_centered=assume_centered)[0]
    return covariance


def nearest_squared(vectors: Array, centres: Array) -> Score:
    """(M, K), (C, K) -> (M,) least squared distance to a centre."""
    squares = np.square(vectors).sum(axis=1)[:, None] - 2 * vectors @ centres.T + np.square(centres).sum(axis=1)
    return np.asarray(squares.min(axis=1), dtype=np.float64)


def auroc(known: Score, unknown: Score) -> float:
    """Probability that a score of `unknown` exceeds one of `known`, ties by half: the area under the ROC curve, 0..1.

    By ranks (Mann and Whitney 1947); scikit-learn's `roc_auc_score`.
    """
    ranks = rankdata(np.concatenate([known, unknown]))[len(known) :]
    above = ranks.sum() - len(unknown) * (len(unknown) + 1) / 2
    return float(above / (len(known) * len(unknown)))


def fpr_at_tpr(known: Score, unknown: Score, tpr: float = 0.95) -> float:
    """FPR@95: share of `unknown` scores at or below the `tpr` quantile of the `known` ones; 0..1, lower is better.

    Known images are the positives (Hendrycks 2017, arXiv:1610.02136).
    """
    threshold = np.quantile(known, tpr, method="inverted_cdf")
    return float(np.mean(np.asarray(unknown) <= threshold))
