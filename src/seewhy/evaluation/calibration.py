"""Calibrate probabilities by temperature scaling, and choose confidence thresholds for selective classification."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy.optimize import minimize_scalar
from scipy.stats import beta

from seewhy.evaluation.metrics import Floats, Labels, negative_log_likelihood

Confidence = npt.NDArray[np.float64]  # (N,) the largest probability of each image, 0..1
Correct = npt.NDArray[np.bool_]  # (N,) whether the most probable class is the true one
BINS = 15  # of the reliability diagram, as in Guo 2017
COVERAGES = 10  # candidates of a threshold
MIN_TEMPERATURE, MAX_TEMPERATURE = 0.05, 20.0


@dataclass(frozen=True, eq=False)
class Reliability:
    """B bins of confidence of equal width, without the empty ones; (B,) arrays.

    confidence: mean confidence of a bin, 0..1. accuracy: share of correct predictions, 0..1. count: images.
    """

    confidence: npt.NDArray[np.float64]
    accuracy: npt.NDArray[np.float64]
    count: npt.NDArray[np.int64]


def reliability(confidence: Confidence, correct: Correct, bins: int = BINS) -> Reliability:
    """Bin predictions by confidence for the reliability diagram (Sec. 2, arXiv:1706.04599)."""
    numbers = np.clip(np.ceil(confidence * bins).astype(int) - 1, 0, bins - 1)  # bins are open below and closed above
    count = np.bincount(numbers, minlength=bins)
    filled = count > 0
    means = [np.bincount(numbers, weights=values, minlength=bins)[filled] / count[filled] for values in (confidence, correct)]
    return Reliability(means[0], means[1], count[filled])


def expected_calibration_error(confidence: Confidence, correct: Correct, bins: int = BINS) -> float:
    """Mean over the images of |confidence - accuracy| of their bin; 0..1, lower is better (Eq. 3, arXiv:1706.04599).

    Biased upwards: few images give a positive error even for perfectly calibrated probabilities.
    """
    diagram = reliability(confidence, correct, bins)
    return float((diagram.count * np.abs(diagram.confidence - diagram.accuracy)).sum() / diagram.count.sum())


def squared_distances(labels: Labels, probs: Floats) -> npt.NDArray[np.float64]:
    """(N,) squared distance between probabilities (N, C) and the one-hot label, 0..2; its mean is the Brier score (Brier 1950)."""
    errors = np.array(probs, dtype=np.float64)
    errors[np.arange(len(labels)), labels] -= 1
    distances: npt.NDArray[np.float64] = (errors**2).sum(axis=1)
    return distances


def fit_temperature(labels: Labels, logits: Floats) -> float:
    """Find the T in 0.05..20 that minimises the negative log-likelihood of softmax(logits / T) (Sec. 4.2, arXiv:1706.04599).

    Deviation: 1 if all predictions are correct, where the optimum would be the smallest T.
    """
    if bool((np.asarray(logits).argmax(axis=1) == labels).all()):
        return 1.0

    def loss(log_t: float) -> float:
        return negative_log_likelihood(labels, logits, math.exp(log_t))

    bounds = (math.log(MIN_TEMPERATURE), math.log(MAX_TEMPERATURE))
    return math.exp(float(minimize_scalar(loss, bounds=bounds, method="bounded", options={"xatol": 1e-6}).x))


@dataclass(frozen=True, eq=False)
class RiskCoverage:
    """Risk-coverage curve: arrays of one length, from the highest threshold to the lowest.

    threshold: minimum confidence. coverage: share of the images at or above it. risk: error rate of these.
    """

    threshold: npt.NDArray[np.float64]
    coverage: npt.NDArray[np.float64]
    risk: npt.NDArray[np.float64]

    @property
    def area(self) -> float:
        """Mean risk over the coverages (AURC, Geifman 2019, arXiv:1805.08206); lower is better."""
        steps = np.diff(self.coverage, prepend=0.0)
        return float((steps * self.risk).sum())


def risk_coverage(confidence: Confidence, correct: Correct) -> RiskCoverage:
    """Compute the risk-coverage curve, one point per distinct confidence."""
    order = np.argsort(-confidence, kind="stable")
    last = np.append(np.flatnonzero(np.diff(confidence[order])), len(order) - 1)  # of each run of equal confidences
    selected = last + 1
    wrong = np.cumsum(~correct[order])[last]
    return RiskCoverage(confidence[order][last], selected / len(order), wrong / selected)


def clopper_pearson_upper(wrong: int, n: int, confidence: float = 0.9) -> float:
    """One-sided upper confidence limit of the error rate, for `wrong` errors of n (Clopper and Pearson 1934)."""
    return 1.0 if wrong >= n else float(beta.ppf(confidence, wrong + 1, n - wrong))


def threshold_for(confidence: Confidence, correct: Correct, precision: float, level: float = 0.9) -> float | None:
    """The lowest confidence threshold above which predictions are correct with probability `precision`; None if there is none.

    Selection with guaranteed risk (Geifman 2017, arXiv:1705.08500): the largest of COVERAGES evenly spaced coverages at which the upper
    limit of the error rate is at most 1 - precision. It holds with probability `level` for new images from the same distribution
    (Bonferroni over the coverages). Deviation: their Algorithm 2 searches by bisection, which fails if the middle has too few images.
    """
    curve = risk_coverage(confidence, correct)
    n, corrected = len(confidence), 1 - (1 - level) / COVERAGES
    for i in np.unique(np.ceil(len(curve.threshold) * np.arange(1, COVERAGES + 1) / COVERAGES).astype(int) - 1)[::-1]:
        selected = round(curve.coverage[i] * n)
        if clopper_pearson_upper(round(curve.risk[i] * selected), selected, corrected) <= 1 - precision:
            return float(curve.threshold[i])
    return None


def selective_accuracy(confidence: Confidence, correct: Correct, threshold: float) -> tuple[float, float]:
    """(coverage, accuracy) of the predictions with a confidence of at least `threshold`; accuracy is nan if there are none."""
    selected = confidence >= threshold
    return float(selected.mean()), float(correct[selected].mean()) if selected.any() else math.nan
