"""Metrics against scikit-learn, SciPy and hand-worked values."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import scipy.special
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn import metrics as sk

from seewhy.evaluation import metrics
from seewhy.evaluation.calibration import fit_temperature
from seewhy.evaluation.evaluate import Evaluation

# scikit-learn warns where classes are predicted that have no image; that case is meant here.
pytestmark = pytest.mark.filterwarnings("ignore:y_pred contains classes not in y_true")

SEEDS = range(5)


def guesses(seed: int, n: int = 200, classes: int = 7) -> tuple[np.ndarray, np.ndarray]:
    """Labels that never are class 5, predictions that never are class 2, right about half of the time."""
    rng = np.random.default_rng(seed)
    labels = rng.choice([0, 1, 2, 3, 4, 6], size=n)
    wrong = rng.choice([0, 1, 3, 4, 5, 6], size=n)
    return labels, np.where((rng.random(n) < 0.5) & (labels != 2), labels, wrong)


@st.composite
def labelled(draw: st.DrawFn) -> tuple[np.ndarray, np.ndarray, int]:
    classes = draw(st.integers(1, 6))
    n = draw(st.integers(1, 30))
    numbers = st.lists(st.integers(0, classes - 1), min_size=n, max_size=n)
    return np.array(draw(numbers)), np.array(draw(numbers)), classes


# ---------------------------------------------------------------- softmax


def test_softmax_equals_scipy_and_survives_large_logits() -> None:
    logits = np.random.default_rng(0).normal(size=(50, 9)) * 30
    np.testing.assert_allclose(metrics.softmax(logits), scipy.special.softmax(logits, axis=1), rtol=1e-12, atol=0)
    huge = metrics.softmax(np.array([[1e4, 1e4, 0.0], [-1e4, -1e4 + math.log(3), -1e4]], dtype=np.float64))
    np.testing.assert_allclose(huge, [[0.5, 0.5, 0.0], [0.2, 0.6, 0.2]], rtol=1e-11)


def test_softmax_computes_in_double_precision() -> None:
    probs = metrics.softmax(np.array([[0.1, 0.2, 0.3]], dtype=np.float32))
    assert probs.dtype == np.float64
    assert abs(probs.sum() - 1) < 1e-15


@given(st.lists(st.floats(-50, 50), min_size=2, max_size=6), st.floats(-100, 100))
def test_softmax_ignores_a_constant_added_to_all_logits(row: list[float], constant: float) -> None:
    logits = np.array([row])
    np.testing.assert_allclose(metrics.softmax(logits + constant), metrics.softmax(logits), rtol=1e-9, atol=1e-12)


# ---------------------------------------------------------------- accuracy


@pytest.mark.parametrize("seed", SEEDS)
def test_accuracy_equals_scikit_learn(seed: int) -> None:
    labels, predicted = guesses(seed)
    assert metrics.accuracy(labels, predicted) == pytest.approx(sk.accuracy_score(labels, predicted), abs=1e-15)


@pytest.mark.parametrize("k", [1, 2, 3, 6])
@pytest.mark.parametrize("steps", [3, 1000])  # 3: three values only, so that most rows hold ties
def test_top_k_accuracy_equals_scikit_learn_with_and_without_ties(k: int, steps: int) -> None:
    rng = np.random.default_rng(k)
    labels = rng.integers(0, 7, size=300)
    scores = rng.integers(0, steps, size=(300, 7)).astype(float)
    expected = sk.top_k_accuracy_score(labels, scores, k=k, labels=range(7))
    assert metrics.in_top_k(labels, scores, k).mean() == pytest.approx(expected, abs=1e-15)


def test_top_k_accuracy_by_hand() -> None:
    probs = np.array([[0.5, 0.3, 0.2], [0.1, 0.2, 0.7], [0.3, 0.3, 0.4], [0.6, 0.2, 0.2]])
    labels = np.array([0, 1, 0, 1])
    assert metrics.in_top_k(labels, probs, 1).mean() == 0.25
    assert metrics.in_top_k(labels, probs, 2).mean() == 0.5  # rows 2 and 3: of equal ones the later class is taken
    assert metrics.in_top_k(labels, probs, 3).mean() == 1.0
    assert metrics.in_top_k(labels, probs, 5).mean() == 1.0


@given(st.integers(0, 2**32 - 1))
@settings(max_examples=30)
def test_top_k_accuracy_grows_with_k_up_to_one(seed: int) -> None:
    rng = np.random.default_rng(seed)
    labels, scores = rng.integers(0, 5, size=40), rng.random((40, 5))
    shares = [metrics.in_top_k(labels, scores, k).mean() for k in range(1, 7)]
    assert shares == sorted(shares)
    assert shares[0] == metrics.accuracy(labels, scores.argmax(axis=1))
    assert shares[4] == shares[5] == 1.0


# ---------------------------------------------------------------- confusion


@pytest.mark.parametrize("seed", SEEDS)
def test_confusion_matrix_equals_scikit_learn(seed: int) -> None:
    labels, predicted = guesses(seed)
    expected = sk.confusion_matrix(labels, predicted, labels=range(7))
    np.testing.assert_array_equal(metrics.confusion_matrix(labels, predicted, 7), expected)


def test_confusion_matrix_by_hand_has_true_classes_in_rows() -> None:
    found = metrics.confusion_matrix(np.array([0, 0, 0, 1]), np.array([0, 1, 1, 1]), 3)
    np.testing.assert_array_equal(found, [[1, 2, 0], [0, 1, 0], [0, 0, 0]])


@given(labelled())
def test_confusion_matrix_counts_every_image_once(case: tuple[np.ndarray, np.ndarray, int]) -> None:
    labels, predicted, classes = case
    confusion = metrics.confusion_matrix(labels, predicted, classes)
    np.testing.assert_array_equal(confusion.sum(axis=1), np.bincount(labels, minlength=classes))
    np.testing.assert_array_equal(confusion.sum(axis=0), np.bincount(predicted, minlength=classes))
    assert np.trace(confusion) / len(labels) == metrics.accuracy(labels, predicted)


# ---------------------------------------------------------------- per class


@pytest.mark.parametrize("seed", SEEDS)
def test_per_class_equals_scikit_learn(seed: int) -> None:
    labels, predicted = guesses(seed)
    numbers = metrics.per_class(metrics.confusion_matrix(labels, predicted, 7))
    expected = sk.precision_recall_fscore_support(labels, predicted, labels=range(7), zero_division=0)
    for found, wanted in zip((numbers.precision, numbers.recall, numbers.f1, numbers.support), expected, strict=True):
        np.testing.assert_allclose(found, wanted, rtol=1e-14)


def test_per_class_by_hand_with_a_class_never_predicted_and_one_without_images() -> None:
    # class 0: 3 of 4 found; class 1: never predicted; class 2: no images, predicted three times
    numbers = metrics.per_class(np.array([[3, 0, 1], [0, 0, 2], [0, 0, 0]]))
    np.testing.assert_allclose(numbers.precision, [1, 0, 0])
    np.testing.assert_allclose(numbers.recall, [0.75, 0, 0])
    np.testing.assert_allclose(numbers.f1, [6 / 7, 0, 0])
    np.testing.assert_array_equal(numbers.support, [4, 2, 0])


@pytest.mark.parametrize("seed", SEEDS)
def test_means_over_classes_equal_scikit_learn(seed: int) -> None:
    labels, predicted = guesses(seed)
    confusion = metrics.confusion_matrix(labels, predicted, 7)
    assert metrics.mean_per_class_accuracy(confusion) == pytest.approx(sk.balanced_accuracy_score(labels, predicted), abs=1e-14)
    assert metrics.macro_f1(confusion) == pytest.approx(sk.f1_score(labels, predicted, average="macro", zero_division=0), abs=1e-14)


def test_means_over_classes_leave_out_what_does_not_occur() -> None:
    confusion = np.array([[3, 0, 1, 0], [0, 0, 2, 0], [0, 0, 0, 0], [0, 0, 0, 0]])
    assert metrics.mean_per_class_accuracy(confusion) == pytest.approx((0.75 + 0) / 2)  # classes 0 and 1 have images
    assert metrics.macro_f1(confusion) == pytest.approx((6 / 7 + 0 + 0) / 3)  # class 2 is predicted, class 3 is nowhere


@given(labelled())
@settings(max_examples=50)
def test_means_over_classes_agree_with_scikit_learn_on_anything(case: tuple[np.ndarray, np.ndarray, int]) -> None:
    labels, predicted, classes = case
    confusion = metrics.confusion_matrix(labels, predicted, classes)
    recall = sk.recall_score(labels, predicted, labels=np.unique(labels), average="macro", zero_division=0)
    assert metrics.mean_per_class_accuracy(confusion) == pytest.approx(recall, abs=1e-12)
    assert metrics.macro_f1(confusion) == pytest.approx(sk.f1_score(labels, predicted, average="macro", zero_division=0), abs=1e-12)


# ---------------------------------------------------------------- interval


def wilson(correct: int, n: int, z: float) -> tuple[float, float]:
    """The formula as printed: (p + z^2/2n -+ z sqrt(p(1-p)/n + z^2/4n^2)) / (1 + z^2/n)."""
    p = correct / n
    centre, half = p + z * z / (2 * n), z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    return (centre - half) / (1 + z * z / n), (centre + half) / (1 + z * z / n)


def test_wilson_interval_by_hand() -> None:
    assert metrics.wilson_interval(8, 10) == pytest.approx((0.490162, 0.943318), abs=1e-6)
    assert metrics.wilson_interval(8, 10, 0.90) == pytest.approx(wilson(8, 10, 1.6448536269514722), abs=1e-12)


@given(st.integers(1, 10_000), st.floats(0, 1))
def test_wilson_interval_is_the_formula_and_holds_the_share(n: int, share: float) -> None:
    correct = round(share * n)
    low, high = metrics.wilson_interval(correct, n)
    assert (low, high) == pytest.approx(wilson(correct, n, 1.959963984540054), abs=1e-9)
    assert 0 <= low <= correct / n <= high <= 1


def test_wilson_interval_of_none_and_all_is_not_a_point() -> None:
    low, high = metrics.wilson_interval(0, 20)
    assert (low, high) == pytest.approx((0, 0.161125), abs=1e-6)
    assert metrics.wilson_interval(20, 20) == pytest.approx((1 - high, 1), abs=1e-12)


def test_wilson_interval_narrows_with_more_images_and_less_confidence() -> None:
    widths = [high - low for low, high in (metrics.wilson_interval(9 * n, 10 * n) for n in (1, 10, 100))]
    assert widths[0] > 2 * widths[1] > 4 * widths[2]
    low90, high90 = metrics.wilson_interval(9, 10, 0.90)
    assert high90 - low90 < widths[0]


def test_negative_log_likelihood_is_scikit_learns_and_by_hand() -> None:
    from sklearn.metrics import log_loss

    # Two classes with logits 0 and ln 3: probabilities 1/4 and 3/4.
    assert metrics.negative_log_likelihood(np.array([1, 0]), np.array([[0, np.log(3)]] * 2)) == pytest.approx(
        (np.log(4 / 3) + np.log(4)) / 2
    )
    rng = np.random.default_rng(0)
    logits, labels = rng.normal(size=(50, 7)) * 5, rng.integers(0, 7, 50)
    expected = log_loss(labels, metrics.softmax(logits), labels=range(7))
    assert metrics.negative_log_likelihood(labels, logits) == pytest.approx(expected)
    assert metrics.negative_log_likelihood(np.array([0]), np.array([[1000.0, 0.0]])) == 0.0


# ---------------------------------------------------------------- intervals and comparisons


def test_bootstrap_of_single_images_is_the_normal_interval() -> None:
    right = np.random.default_rng(0).random(2000) < 0.9
    ((low, high),) = metrics.group_bootstrap(lambda w: [float(np.average(right, weights=w))], np.arange(2000), resamples=2000)
    half = 1.96 * math.sqrt(right.mean() * (1 - right.mean()) / 2000)
    assert low == pytest.approx(right.mean() - half, abs=0.002)
    assert high == pytest.approx(right.mean() + half, abs=0.002)


def test_images_of_a_group_are_no_independent_evidence() -> None:
    """Ten copies of each image: the interval is as wide as that of the images alone, sqrt(10) wider than if each copy counted."""
    right = np.repeat(np.random.default_rng(1).random(200) < 0.8, 10)

    def width(groups: np.ndarray) -> float:
        ((low, high),) = metrics.group_bootstrap(lambda w: [float(np.average(right, weights=w))], groups)
        return high - low

    copies = width(np.arange(2000))
    assert width(np.repeat(np.arange(200), 10)) == pytest.approx(math.sqrt(10) * copies, rel=0.12)
    assert width(np.repeat(np.random.default_rng(2).permutation(200), 10)) == pytest.approx(math.sqrt(10) * copies, rel=0.12)


def test_weighted_confusion_counts_images_as_often_as_drawn() -> None:
    labels, predicted = guesses(0)
    weights = np.random.default_rng(0).integers(0, 4, len(labels))
    repeated = sk.confusion_matrix(labels.repeat(weights), predicted.repeat(weights), labels=range(7))
    assert np.array_equal(metrics.confusion_matrix(labels, predicted, 7, weights), repeated)


def test_mcnemar_by_hand_and_the_sign_of_the_difference() -> None:
    right_a = np.array([True] * 60 + [True] * 2 + [False] * 9 + [False] * 9)
    right_b = np.array([True] * 60 + [False] * 2 + [True] * 9 + [False] * 9)
    found = metrics.compare_paired(right_a, right_b, np.arange(80))
    assert (found.n, found.only_a, found.only_b) == (80, 2, 9)
    tail = sum(math.comb(11, k) for k in range(3)) / 2**11  # at most 2 of 11 tosses
    assert found.p_value == pytest.approx(2 * tail)
    assert found.difference == pytest.approx(7 / 80)
    assert 0 < found.low < found.difference < found.high
    same = metrics.compare_paired(right_a, right_a, np.arange(80))
    assert (same.p_value, same.low, same.high) == (1.0, 0.0, 0.0)


@pytest.mark.parametrize("n", [1, 6, 7, 8, 22])
def test_held_a_few_images_at_a_time_numbers_are_the_same_to_the_last_bit(n: int, monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(n)
    logits, labels = (8 * rng.normal(size=(n, 101))).astype(np.float32), rng.integers(0, 101, n)
    evaluation = Evaluation("test", [""] * n, labels, logits, tuple(map(str, range(101))), np.arange(n), 1.3)
    whole = metrics.softmax(logits / 1.3)
    truth = np.eye(101)[labels]

    def numbers() -> list[Any]:
        fresh = replace(evaluation)  # nothing is remembered
        return [
            fresh.confidence.tolist(),
            fresh._calibration(),
            metrics.in_top_k(labels, logits, 5).tolist(),
            fit_temperature(labels, logits),
        ]

    at_once = numbers()
    monkeypatch.setattr(metrics, "ROWS", 7)
    assert numbers() == at_once
    assert at_once[0] == whole.max(axis=1).tolist()
    assert at_once[1]["brier_score"] == float(((whole - truth) ** 2).sum(axis=1).mean())
    scores = (logits / 1.3).astype(np.float64)
    assert at_once[1]["negative_log_likelihood"] == float(np.mean(scipy.special.logsumexp(scores, axis=1) - scores[truth == 1]))


@pytest.mark.parametrize(("classes", "there"), [(5, False), (6, True)])
def test_top5_is_a_number_of_more_than_five_classes_alone(classes: int, there: bool) -> None:
    """Among five classes the true one is always one of the first five."""
    logits = np.eye(classes, dtype=np.float32)[[0, 1, 2, 3]] + np.arange(classes, dtype=np.float32) / 100
    labels = np.array([0, 1, 2, 0])
    evaluation = Evaluation("test", ["a"] * 4, labels, logits, tuple("abcdef"[:classes]), np.arange(4))
    assert ("top5_accuracy" in evaluation.metrics) == ("top5_accuracy_ci95" in evaluation.metrics) == there
    if there:
        assert evaluation.metrics["top5_accuracy"] == 0.75  # of six, class a is the last where it is not said
    assert evaluation.metrics["accuracy"] == 0.75
