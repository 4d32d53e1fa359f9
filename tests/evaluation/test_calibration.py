"""Calibration against torchmetrics, SciPy and hand-worked values; selection against its guarantee."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import binom
from torchmetrics.functional.classification import multiclass_calibration_error

from seewhy.evaluation import calibration, metrics


def drawn(seed: int, n: int = 3000, classes: int = 5, temperature: float = 1.0) -> tuple[np.ndarray, np.ndarray]:
    """Labels drawn from softmax(logits / temperature): T is what calibrates the logits."""
    rng = np.random.default_rng(seed)
    logits = 3 * rng.normal(size=(n, classes))
    probs = metrics.softmax(logits / temperature)
    return np.array([rng.choice(classes, p=p) for p in probs]), logits


def answers(labels: np.ndarray, logits: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Confidence, and whether the answer is right."""
    probs = metrics.softmax(logits)
    return probs.max(axis=1), probs.argmax(axis=1) == labels


@pytest.mark.parametrize("bins", [5, 15])
@pytest.mark.parametrize("seed", range(3))
def test_calibration_error_equals_torchmetrics(seed: int, bins: int) -> None:
    labels, logits = drawn(seed, 400, temperature=2.0)
    probs = metrics.softmax(logits)
    theirs = multiclass_calibration_error(torch.from_numpy(probs), torch.from_numpy(labels), 5, n_bins=bins, norm="l1")
    assert calibration.expected_calibration_error(*answers(labels, logits), bins) == pytest.approx(float(theirs), abs=1e-6)


def test_reliability_by_hand() -> None:
    sure, right = np.array([0.9, 0.8, 0.7, 0.55]), np.array([True, False, True, True])
    found = calibration.reliability(sure, right, bins=2)  # all in (0.5, 1]
    np.testing.assert_allclose([found.confidence[0], found.accuracy[0]], [0.7375, 0.75])
    assert found.count.tolist() == [4]
    assert calibration.expected_calibration_error(sure, right, 2) == pytest.approx(0.0125)
    whole = calibration.reliability(np.array([1.0]), np.array([True]))  # a probability of 1 has a bin
    assert whole.confidence.tolist() == [1.0]


def test_brier_by_hand() -> None:
    probs = np.array([[0.7, 0.2, 0.1], [0.0, 1.0, 0.0]])
    assert calibration.squared_distances(np.array([0, 1]), probs).mean() == pytest.approx((0.09 + 0.04 + 0.01) / 2)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
def test_temperature_is_found_again(temperature: float) -> None:
    labels, logits = drawn(1, 20_000, temperature=temperature)
    found = calibration.fit_temperature(labels, logits)
    assert found == pytest.approx(temperature, rel=0.05)
    best = metrics.negative_log_likelihood(labels, logits / found)
    assert best <= min(metrics.negative_log_likelihood(labels, logits / (found * f)) for f in (0.99, 1.0 / 0.99))
    before, after = (calibration.expected_calibration_error(*answers(labels, logits / t)) for t in (1.0, found))
    assert after < 0.02
    assert after <= before + 0.005


def test_temperature_where_all_is_right_leaves_the_probabilities_alone() -> None:
    assert calibration.fit_temperature(np.array([0, 1]), np.array([[2.0, 0.0], [0.0, 1.0]])) == 1.0


def test_risk_coverage_by_hand() -> None:
    found = calibration.risk_coverage(np.array([0.9, 0.8, 0.8, 0.6]), np.array([True, False, True, False]))
    assert found.threshold.tolist() == [0.9, 0.8, 0.6]  # equal confidences are answered together
    np.testing.assert_allclose(found.coverage, [0.25, 0.75, 1.0])
    np.testing.assert_allclose(found.risk, [0.0, 1 / 3, 0.5])
    assert found.area == pytest.approx(0.25 * 0 + 0.5 / 3 + 0.25 * 0.5)


@given(wrong=st.integers(0, 20), more=st.integers(1, 200))
def test_bound_is_the_risk_at_which_so_few_errors_become_rare(wrong: int, more: int) -> None:
    n = wrong + more
    bound = calibration.clopper_pearson_upper(wrong, n, 0.9)
    assert binom.cdf(wrong, n, bound) == pytest.approx(0.1, abs=1e-9)
    assert calibration.clopper_pearson_upper(n, n) == 1.0


def test_threshold_holds_on_new_images() -> None:
    """Of 60 thresholds chosen on 600 images, at most a tenth may miss the wanted precision on many new ones (confidence 0.9)."""
    new = answers(*drawn(99, 20_000))
    missed, coverages = 0, []
    for seed in range(60):
        threshold = calibration.threshold_for(*answers(*drawn(seed, 600)), 0.9)
        if threshold is None:
            continue
        coverage, right = calibration.selective_accuracy(*new, threshold)
        missed += right < 0.9
        coverages.append(coverage)
    assert missed <= 6
    assert len(coverages) >= 50  # and it does not get there by finding none, or by saying nothing
    assert np.mean(coverages) > 0.3


def test_no_threshold_where_the_wish_cannot_be_met() -> None:
    found = answers(*drawn(0, 30))
    assert calibration.threshold_for(*found, 0.999) is None
    share, right = calibration.selective_accuracy(*found, 1.1)
    assert share == 0
    assert math.isnan(right)


@settings(max_examples=30)
@given(seed=st.integers(0, 10_000), wish=st.floats(0.5, 0.95))
def test_a_stricter_wish_never_answers_more(seed: int, wish: float) -> None:
    found = answers(*drawn(seed, 100))
    loose, strict = (calibration.threshold_for(*found, p) for p in (wish, (1 + wish) / 2))
    assert strict is None or (loose is not None and strict >= loose)
