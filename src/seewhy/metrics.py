"""Labels and probabilities -> the numbers of a classifier: pure functions on arrays."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy.special import logsumexp
from scipy.stats import binomtest, bootstrap

Labels = npt.NDArray[np.int64]
Floats = npt.NDArray[np.floating]


def softmax(logits: Floats) -> npt.NDArray[np.float64]:
    """(N, C) unnormalised -> (N, C) probabilities, rows summing to 1, in float64."""
    shifted = np.asarray(logits, dtype=np.float64)
    shifted = shifted - shifted.max(axis=1, keepdims=True)
    exponentials = np.exp(shifted)
    probabilities: npt.NDArray[np.float64] = exponentials / exponentials.sum(axis=1, keepdims=True)
    return probabilities


def negative_log_likelihood(labels: Labels, logits: Floats) -> float:
    """Mean of -log softmax(logits)[label], in nats; at least 0 (scikit-learn's `log_loss`)."""
    scores = np.asarray(logits, dtype=np.float64)
    return float(np.mean(logsumexp(scores, axis=1) - scores[np.arange(len(labels)), labels]))


def accuracy(labels: Labels, predicted: Labels) -> float:
    """Share of equal entries, 0 to 1."""
    return float(np.mean(labels == predicted))


def top_k_accuracy(labels: Labels, probs: Floats, k: int) -> float:
    """Share of pictures whose true class is among the k most probable; of equal ones the later class comes first.

    That order of ties is scikit-learn's (`top_k_accuracy_score`); k of at least C gives 1.
    """
    best = np.argsort(probs, axis=1, kind="stable")[:, -k:]
    return float(np.mean((best == labels[:, None]).any(axis=1)))


def confusion_matrix(labels: Labels, predicted: Labels, classes: int) -> npt.NDArray[np.int64]:
    """(C, C) counts; row = true class, column = predicted class."""
    return np.bincount(labels * classes + predicted, minlength=classes * classes).reshape(classes, classes)


@dataclass(frozen=True)
class PerClass:
    """(C,) arrays; precision is 0 for a class never predicted, recall 0 for one without pictures."""

    precision: npt.NDArray[np.float64]
    recall: npt.NDArray[np.float64]
    f1: npt.NDArray[np.float64]
    support: npt.NDArray[np.int64]


def per_class(confusion: npt.NDArray[np.int64]) -> PerClass:
    """Precision, recall, F1 and number of pictures of each class."""
    hits = np.diag(confusion).astype(np.float64)
    support, predicted = confusion.sum(axis=1), confusion.sum(axis=0)
    return PerClass(
        precision=_share(hits, predicted),
        recall=_share(hits, support),
        f1=_share(2 * hits, support + predicted),
        support=support,
    )


def _share(part: npt.NDArray[np.float64], whole: npt.NDArray[np.int64]) -> npt.NDArray[np.float64]:
    return np.divide(part, whole, out=np.zeros_like(part), where=whole > 0)


def mean_per_class_accuracy(confusion: npt.NDArray[np.int64]) -> float:
    """Mean recall of the classes that have pictures (scikit-learn's balanced accuracy)."""
    numbers = per_class(confusion)
    return float(numbers.recall[numbers.support > 0].mean())


def macro_f1(confusion: npt.NDArray[np.int64]) -> float:
    """Unweighted mean of the F1 of every class that occurs in the labels or the predictions."""
    occurs = (confusion.sum(axis=1) + confusion.sum(axis=0)) > 0
    return float(per_class(confusion).f1[occurs].mean())


def wilson_interval(correct: int, n: int, confidence: float = 0.95) -> tuple[float, float]:
    """Wilson score interval of a proportion (Wilson 1927); assumes independent pictures."""
    interval = binomtest(correct, n).proportion_ci(confidence, method="wilson")
    return float(interval.low), float(interval.high)


def mean_interval(values: npt.NDArray[np.float64], confidence: float = 0.95, resamples: int = 2000, seed: int = 0) -> tuple[float, float]:
    """Percentile bootstrap interval of the mean of (N,) values (Efron 1979); the value itself where there is one alone."""
    if len(values) == 1:
        return float(values[0]), float(values[0])
    found = bootstrap(
        (values,),
        np.mean,
        n_resamples=resamples,
        batch=100,
        confidence_level=confidence,
        method="percentile",
        rng=np.random.default_rng(seed),
    ).confidence_interval
    return float(found.low), float(found.high)
