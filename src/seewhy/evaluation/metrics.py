"""Compute classification metrics, their confidence intervals and paired comparisons: pure functions on arrays."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy import special
from scipy.stats import binomtest, bootstrap

Labels = npt.NDArray[np.int64]
Floats = npt.NDArray[np.floating]

# Headline metrics, each with a 95% interval: key in metrics.json -> display name.
HEADLINE = {
    "accuracy": "accuracy",
    "top5_accuracy": "top-5 accuracy",
    "mean_per_class_accuracy": "mean per-class accuracy",
    "macro_f1": "macro F1",
}
ROWS = 4096  # images processed at a time, which bounds the (rows, C) float64 arrays


def map_rows(work: Callable[[slice], npt.NDArray[Any]], n: int) -> npt.NDArray[Any]:
    """(N,) concatenated results of `work` on slices of ROWS images, so that its temporary arrays stay small."""
    return np.concatenate([work(slice(start, start + ROWS)) for start in range(0, max(n, 1), ROWS)])


def softmax(logits: Floats) -> npt.NDArray[np.float64]:
    """(N, C) logits -> (N, C) float64 probabilities, rows summing to 1."""
    probabilities: npt.NDArray[np.float64] = special.softmax(np.asarray(logits, dtype=np.float64), axis=1)
    return probabilities


def negative_log_likelihood(labels: Labels, logits: Floats, temperature: float = 1.0) -> float:
    """Mean of -log softmax(logits / temperature)[label], in nats; at least 0 (scikit-learn's `log_loss`)."""
    return float(np.mean(map_rows(lambda rows: sample_nll(labels[rows], np.asarray(logits[rows], np.float64) / temperature), len(labels))))


def sample_nll(labels: Labels, logits: Floats) -> npt.NDArray[np.float64]:
    """(N,) -log softmax(logits)[label] of each image, in nats."""
    scores = np.asarray(logits, dtype=np.float64)
    nats: npt.NDArray[np.float64] = special.logsumexp(scores, axis=1) - scores[np.arange(len(labels)), labels]
    return nats


def accuracy(labels: Labels, predicted: Labels) -> float:
    """Share of equal entries, 0..1."""
    return float(np.mean(labels == predicted))


def in_top_k(labels: Labels, probs: Floats, k: int) -> npt.NDArray[np.bool_]:
    """(N,) whether the true class is among the k most probable; ties prefer the later class, as in `top_k_accuracy_score`."""

    def hits(rows: slice) -> npt.NDArray[np.bool_]:
        best = np.argsort(probs[rows], axis=1, kind="stable")[:, -k:]
        is_hit: npt.NDArray[np.bool_] = (best == labels[rows, None]).any(axis=1)
        return is_hit

    return map_rows(hits, len(labels))


def confusion_matrix(labels: Labels, predicted: Labels, classes: int, weights: Labels | None = None) -> npt.NDArray[np.int64]:
    """(C, C) counts; row = true class, column = predicted class. weights: (N,) count of each image (None: 1)."""
    cells = labels * classes + predicted
    counts = np.bincount(cells, minlength=classes * classes, weights=weights)  # float64 if weighted
    return counts.astype(np.int64).reshape(classes, classes)


@dataclass(frozen=True, eq=False)
class PerClass:
    """(C,) arrays; precision is 0 for a class that is never predicted, recall 0 for one without images."""

    precision: npt.NDArray[np.float64]
    recall: npt.NDArray[np.float64]
    f1: npt.NDArray[np.float64]
    support: npt.NDArray[np.int64]


def per_class(confusion: npt.NDArray[np.int64]) -> PerClass:
    """Precision, recall, F1 and support of each class, from (C, C) counts."""
    hits = np.diag(confusion).astype(np.float64)
    support, predicted = confusion.sum(axis=1), confusion.sum(axis=0)
    return PerClass(_share(hits, predicted), _share(hits, support), _share(2 * hits, support + predicted), support)


def _share(part: npt.NDArray[np.float64], whole: npt.NDArray[np.int64]) -> npt.NDArray[np.float64]:
    return np.divide(part, whole, out=np.zeros_like(part), where=whole > 0)


def mean_per_class_accuracy(confusion: npt.NDArray[np.int64]) -> float:
    """Mean recall of the classes that have images (scikit-learn's balanced accuracy)."""
    numbers = per_class(confusion)
    return float(numbers.recall[numbers.support > 0].mean())


def macro_f1(confusion: npt.NDArray[np.int64]) -> float:
    """Unweighted mean F1 over the classes that occur in the labels or the predictions."""
    occurs = (confusion.sum(axis=1) + confusion.sum(axis=0)) > 0
    return float(per_class(confusion).f1[occurs].mean())


def wilson_interval(correct: int, n: int, confidence: float = 0.95) -> tuple[float, float]:
    """Wilson score interval of a proportion (Wilson 1927), for independent images."""
    interval = binomtest(correct, n).proportion_ci(confidence, method="wilson")
    return float(interval.low), float(interval.high)


def mean_interval(values: npt.NDArray[np.float64], confidence: float = 0.95, resamples: int = 2000, seed: int = 0) -> tuple[float, float]:
    """Percentile bootstrap interval of the mean of (N,) values (Efron 1979); of zero width if N is 1."""
    if len(values) == 1:
        return float(values[0]), float(values[0])
    rng = np.random.default_rng(seed)
    result = bootstrap((values,), np.mean, n_resamples=resamples, batch=100, confidence_level=confidence, method="percentile", rng=rng)
    return float(result.confidence_interval.low), float(result.confidence_interval.high)


def group_bootstrap(
    statistics: Callable[[npt.NDArray[np.int64]], Sequence[float]],
    groups: Labels,
    confidence: float = 0.95,
    resamples: int = 1000,
    seed: int = 0,
) -> list[tuple[float, float]]:
    """Percentile bootstrap interval of each statistic of N images, resampling whole groups (Efron 1979; Field 2007).

    groups: (N,) group number of each image; near-duplicates are not independent, so they are drawn together.
    statistics: (N,) count of each image in the resample -> values of the statistics.
    """
    _, members = np.unique(groups, return_inverse=True)
    count = int(members.max()) + 1
    rng = np.random.default_rng(seed)
    values = [statistics(np.bincount(rng.integers(0, count, count), minlength=count)[members]) for _ in range(resamples)]
    lows, highs = np.quantile(np.array(values), [(1 - confidence) / 2, (1 + confidence) / 2], axis=0)
    return [(float(low), float(high)) for low, high in zip(lows, highs, strict=True)]


@dataclass(frozen=True)
class Comparison:
    """Two classifiers a and b on the same n images.

    only_a, only_b: images that only a, or only b, classifies correctly. p_value: of McNemar's exact test for equal accuracy.
    difference: accuracy of b minus that of a; low, high: its paired bootstrap interval.
    """

    n: int
    only_a: int
    only_b: int
    p_value: float
    difference: float
    low: float
    high: float


def compare_paired(
    correct_a: npt.NDArray[np.bool_], correct_b: npt.NDArray[np.bool_], groups: Labels, confidence: float = 0.95
) -> Comparison:
    """(N,) correctness of each classifier -> Comparison: McNemar 1947 in its exact form, and a bootstrap over groups."""
    only_a, only_b = int((correct_a & ~correct_b).sum()), int((correct_b & ~correct_a).sum())
    p_value = float(binomtest(only_a, only_a + only_b).pvalue) if only_a + only_b else 1.0
    gain = correct_b.astype(np.float64) - correct_a
    ((low, high),) = group_bootstrap(lambda weights: [float(np.average(gain, weights=weights))], groups, confidence)
    return Comparison(len(gain), only_a, only_b, p_value, float(gain.mean()), low, high)
