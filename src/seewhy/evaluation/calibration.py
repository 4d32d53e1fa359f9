"""Logits and labels -> how far probabilities can be believed: calibration error, temperature, and when to say nothing."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy.optimize import minimize_scalar
from scipy.stats import beta

from seewhy.evaluation.metrics import Floats, Labels, map_rows, sample_nll

Sure = npt.NDArray[np.float64]  # (N,) confidence, 0..1: the largest probability of each image
Right = npt.NDArray[np.bool_]  # (N,) whether the class that has it is the true one
BINS = 15  # of the reliability diagram, as in Guo 2017
TRIED = 10  # coverages among which a threshold is chosen
LEAST, MOST = 0.05, 20.0  # temperatures between which the fit looks


@dataclass(frozen=True, eq=False)
class Reliability:
    """Equal-width bins of confidence (the largest probability of an image), empty ones left out. Arrays of one length.

    confidence: mean of a bin, 0..1. accuracy: share of right answers in it, 0..1. count: its images.
    """

    confidence: npt.NDArray[np.float64]
    accuracy: npt.NDArray[np.float64]
    count: npt.NDArray[np.int64]


def reliability(sure: Sure, right: Right, bins: int = BINS) -> Reliability:
    """Confidences and whether they were right -> the reliability diagram (Sec. 2, arXiv:1706.04599)."""
    places = np.clip(np.ceil(sure * bins).astype(int) - 1, 0, bins - 1)  # bins are open below and closed above
    count = np.bincount(places, minlength=bins)
    kept = count > 0
    confidence = np.bincount(places, weights=sure, minlength=bins)[kept] / count[kept]
    accuracy = np.bincount(places, weights=right, minlength=bins)[kept] / count[kept]
    return Reliability(confidence, accuracy, count[kept])


def expected_calibration_error(sure: Sure, right: Right, bins: int = BINS) -> float:
    """Mean over the images of |confidence - accuracy| of their bin; 0..1, lower is better (Eq. 3, arXiv:1706.04599).

    A number of bins: few images give a positive error even where the probabilities are right.
    """
    found = reliability(sure, right, bins)
    return float((found.count * np.abs(found.confidence - found.accuracy)).sum() / found.count.sum())


def brier_score(labels: Labels, probs: Floats) -> float:
    """Mean over the images of the squared distance between probabilities and the true class's one; 0..2, lower is better (Brier 1950)."""
    return float(map_rows(lambda rows: squared_distances(labels[rows], probs[rows]), len(labels)).mean())


def squared_distances(labels: Labels, probs: Floats) -> npt.NDArray[np.float64]:
    """(N,) squared distance between each image's probabilities and the true class's one."""
    misses = np.array(probs, dtype=np.float64)
    misses[np.arange(len(labels)), labels] -= 1
    squares: npt.NDArray[np.float64] = (misses**2).sum(axis=1)
    return squares


def fit_temperature(labels: Labels, logits: Floats) -> float:
    """The T > 0 by which to divide logits for the least negative log-likelihood (Sec. 4.2, arXiv:1706.04599), within 0.05..20.

    Answers stay the same. Where all of them are right, no T is best but the smallest: then 1, the probabilities as they are.
    """
    if bool((np.asarray(logits).argmax(axis=1) == labels).all()):
        return 1.0

    def loss(log_t: float) -> float:
        scaled = map_rows(lambda rows: sample_nll(labels[rows], np.asarray(logits[rows], dtype=np.float64) / math.exp(log_t)), len(labels))
        return float(np.mean(scaled))

    found = minimize_scalar(
        loss,
        bounds=(math.log(LEAST), math.log(MOST)),
        method="bounded",
        options={"xatol": 1e-6},
    )
    return math.exp(float(found.x))


# ---------------------------------------------------------------- saying nothing


@dataclass(frozen=True, eq=False)
class RiskCoverage:
    """What answering only the surest images costs and brings; arrays of one length, the surest first.

    threshold: least confidence that is answered. coverage: share of the images answered. risk: share of these that are wrong.
    """

    threshold: npt.NDArray[np.float64]
    coverage: npt.NDArray[np.float64]
    risk: npt.NDArray[np.float64]

    @property
    def area(self) -> float:
        """Mean risk over the coverages (AURC, Geifman 2019, arXiv:1805.08206); lower is better."""
        steps = np.diff(self.coverage, prepend=0.0)
        return float((steps * self.risk).sum())


def risk_coverage(sure: Sure, right: Right) -> RiskCoverage:
    """Confidences and whether they were right -> the risk-coverage curve, a point for each confidence that occurs."""
    order = np.argsort(-sure, kind="stable")
    last = np.append(np.flatnonzero(np.diff(sure[order])), len(order) - 1)  # equal confidences are answered together
    answered = last + 1
    wrong = np.cumsum(~right[order])[last]
    return RiskCoverage(sure[order][last], answered / len(order), wrong / answered)


def clopper_pearson_upper(wrong: int, answered: int, confidence: float = 0.9) -> float:
    """Upper limit of the true risk where `wrong` of `answered` were wrong: one-sided, Clopper and Pearson 1934."""
    return 1.0 if wrong >= answered else float(beta.ppf(confidence, wrong + 1, answered - wrong))


def threshold_for(sure: Sure, right: Right, precision: float, confidence: float = 0.9) -> float | None:
    """The least confidence to answer at, so that answers are right with probability `precision`, or None if there is none.

    Selection with guaranteed risk (Geifman 2017, arXiv:1705.08500): among TRIED coverages, evenly spread, the largest at which the
    error's upper confidence bound stays within 1 - precision. The limit then holds for new images like these with the given
    confidence, since the search is paid for (Bonferroni). Their Algorithm 2 halves its way instead, and ends with nothing where the
    middle has too few images.
    """
    curve = risk_coverage(sure, right)
    n, stricter = len(sure), 1 - (1 - confidence) / TRIED
    for place in np.unique(np.ceil(len(curve.threshold) * np.arange(1, TRIED + 1) / TRIED).astype(int) - 1)[::-1]:
        answered = round(curve.coverage[place] * n)
        if clopper_pearson_upper(round(curve.risk[place] * answered), answered, stricter) <= 1 - precision:
            return float(curve.threshold[place])
    return None


def selective_accuracy(sure: Sure, right: Right, threshold: float) -> tuple[float, float]:
    """(share answered, share of these that is right) where only confidences of at least `threshold` are answered; right is nan for none."""
    kept = sure >= threshold
    return float(kept.mean()), float(right[kept].mean()) if kept.any() else math.nan
