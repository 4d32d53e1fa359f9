"""Labels and probabilities -> the numbers of a classifier: pure functions on arrays."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy.special import logsumexp
from scipy.stats import binomtest, bootstrap, rankdata

Labels = npt.NDArray[np.int64]
Floats = npt.NDArray[np.floating]

# Headline numbers, each with a 95% interval: key in metrics.json -> name for readers.
HEADLINE = {
    "accuracy": "accuracy",
    "top5_accuracy": "top-5 accuracy",
    "mean_per_class_accuracy": "mean per-class accuracy",
    "macro_f1": "macro F1",
}
ROWS = 4096  # images whose (C,) numbers are held in float64 at a time


def map_rows(work: Callable[[slice], npt.NDArray[Any]], n: int) -> npt.NDArray[Any]:
    """(N,) values of N images, from what `work` gives of a slice of them: what it needs meanwhile is held of ROWS images alone."""
    return np.concatenate([work(slice(start, start + ROWS)) for start in range(0, max(n, 1), ROWS)])


def softmax(logits: Floats) -> npt.NDArray[np.float64]:
    """(N, C) unnormalised -> (N, C) probabilities, rows summing to 1, in float64."""
    shifted = np.asarray(logits, dtype=np.float64)
    shifted = shifted - shifted.max(axis=1, keepdims=True)
    exponentials = np.exp(shifted)
    probabilities: npt.NDArray[np.float64] = exponentials / exponentials.sum(axis=1, keepdims=True)
    return probabilities


def negative_log_likelihood(labels: Labels, logits: Floats) -> float:
    """Mean of -log softmax(logits)[label], in nats; at least 0 (scikit-learn's `log_loss`)."""
    return float(np.mean(map_rows(lambda rows: sample_nll(labels[rows], logits[rows]), len(labels))))


def sample_nll(labels: Labels, logits: Floats) -> npt.NDArray[np.float64]:
    """(N,) -log softmax(logits)[label] of each image, in nats."""
    scores = np.asarray(logits, dtype=np.float64)
    nats: npt.NDArray[np.float64] = logsumexp(scores, axis=1) - scores[np.arange(len(labels)), labels]
    return nats


def accuracy(labels: Labels, predicted: Labels) -> float:
    """Share of equal entries, 0 to 1."""
    return float(np.mean(labels == predicted))


def in_top_k(labels: Labels, probs: Floats, k: int) -> npt.NDArray[np.bool_]:
    """(N,) whether the true class is among the k most probable; of equal ones the later class comes first (scikit-learn's order)."""

    def among(rows: slice) -> npt.NDArray[np.bool_]:
        best = np.argsort(probs[rows], axis=1, kind="stable")[:, -k:]
        found: npt.NDArray[np.bool_] = (best == labels[rows, None]).any(axis=1)
        return found

    return map_rows(among, len(labels))


def top_k_accuracy(labels: Labels, probs: Floats, k: int) -> float:
    """Share of images whose true class is among the k most probable (scikit-learn's `top_k_accuracy_score`); k of at least C gives 1."""
    return float(in_top_k(labels, probs, k).mean())


def confusion_matrix(labels: Labels, predicted: Labels, classes: int, weights: Labels | None = None) -> npt.NDArray[np.int64]:
    """(C, C) counts; row = true class, column = predicted class. weights: (N,) how often each image counts (None: once)."""
    cells = labels * classes + predicted
    counts = np.bincount(cells, minlength=classes * classes, weights=weights)  # floats, where there are weights
    return counts.astype(np.int64).reshape(classes, classes)


@dataclass(frozen=True, eq=False)
class PerClass:
    """(C,) arrays; precision is 0 for a class never predicted, recall 0 for one without images."""

    precision: npt.NDArray[np.float64]
    recall: npt.NDArray[np.float64]
    f1: npt.NDArray[np.float64]
    support: npt.NDArray[np.int64]


def per_class(confusion: npt.NDArray[np.int64]) -> PerClass:
    """Precision, recall, F1 and number of images of each class."""
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
    """Mean recall of the classes that have images (scikit-learn's balanced accuracy)."""
    numbers = per_class(confusion)
    return float(numbers.recall[numbers.support > 0].mean())


def macro_f1(confusion: npt.NDArray[np.int64]) -> float:
    """Unweighted mean of the F1 of every class that occurs in the labels or the predictions."""
    occurs = (confusion.sum(axis=1) + confusion.sum(axis=0)) > 0
    return float(per_class(confusion).f1[occurs].mean())


def wilson_interval(correct: int, n: int, confidence: float = 0.95) -> tuple[float, float]:
    """Wilson score interval of a proportion (Wilson 1927); assumes independent images."""
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


# ---------------------------------------------------------------- intervals and comparisons


def group_bootstrap(
    statistics: Callable[[npt.NDArray[np.int64]], Sequence[float]],
    groups: Labels,
    confidence: float = 0.95,
    resamples: int = 1000,
    seed: int = 0,
) -> list[tuple[float, float]]:
    """Percentile bootstrap interval of each statistic of N images, drawing whole groups with replacement (Efron 1979; Field 2007).

    groups: (N,) a number a group; images that show the same thing come and go together, since they are no independent evidence.
    statistics: (N,) how often each image counts -> the values. Where all of them are equal, the interval has no width.
    """
    _, places = np.unique(groups, return_inverse=True)
    count = int(places.max()) + 1
    rng = np.random.default_rng(seed)
    values = [statistics(np.bincount(rng.integers(0, count, count), minlength=count)[places]) for _ in range(resamples)]
    lows, highs = np.quantile(np.array(values), [(1 - confidence) / 2, (1 + confidence) / 2], axis=0)
    return [(float(low), float(high)) for low, high in zip(lows, highs, strict=True)]


@dataclass(frozen=True)
class Comparison:
    """Two classifiers on the same N images.

    only_a, only_b: images that one alone gets right. p_value: McNemar's exact test of whether both are right equally often.
    difference: accuracy of b minus that of a; low, high: its paired bootstrap interval.
    """

    n: int
    only_a: int
    only_b: int
    p_value: float
    difference: float
    low: float
    high: float


def compare_paired(right_a: npt.NDArray[np.bool_], right_b: npt.NDArray[np.bool_], groups: Labels, confidence: float = 0.95) -> Comparison:
    """(N,) whether each classifier is right -> Comparison: McNemar 1947 in its exact form, and a bootstrap that draws whole groups."""
    only_a, only_b = int((right_a & ~right_b).sum()), int((right_b & ~right_a).sum())
    p_value = float(binomtest(only_a, only_a + only_b).pvalue) if only_a + only_b else 1.0
    gain = right_b.astype(np.float64) - right_a
    ((low, high),) = group_bootstrap(lambda weights: [float(np.average(gain, weights=weights))], groups, confidence)
    return Comparison(len(gain), only_a, only_b, p_value, float(gain.mean()), low, high)


# ---------------------------------------------------------------- telling two kinds apart by a score


def auroc(known: Floats, unknown: Floats) -> float:
    """Probability that a score of `unknown` exceeds one of `known`, ties by half: the area under the ROC curve. 0..1.

    By ranks (Mann and Whitney 1947); scikit-learn's `roc_auc_score`.
    """
    ranks = rankdata(np.concatenate([known, unknown]))[len(known) :]
    above = ranks.sum() - len(unknown) * (len(unknown) + 1) / 2
    return float(above / (len(known) * len(unknown)))


def fpr_at_tpr(known: Floats, unknown: Floats, passed: float = 0.95) -> float:
    """FPR@95: share of `unknown` scores below the threshold that lets `passed` of the `known` through. 0..1, lower is better.

    The convention of the field (Hendrycks 2017, arXiv:1610.02136): known images are the positives.
    """
    threshold = np.quantile(known, passed, method="inverted_cdf")  # the least that lets so many through
    return float(np.mean(np.asarray(unknown) <= threshold))
