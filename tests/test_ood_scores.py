"""The benchmark's OOD scores: formulas by hand and against scikit-learn and SciPy; unknown images score higher."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
from scipy.spatial.distance import mahalanobis
from scipy.special import logsumexp, softmax
from sklearn import metrics as sk
from sklearn.covariance import LedoitWolf

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

import ood_scores  # lies beside the benchmarks
from ood_scores import SCORES, Known, auroc, fpr_at_tpr


@pytest.fixture(scope="module")
def known() -> Known:
    rng = np.random.default_rng(0)
    means = 4 * rng.normal(size=(5, 12))
    labels = rng.integers(0, 5, 500)
    vectors = means[labels] + rng.normal(size=(500, 12)) @ rng.normal(size=(12, 12)) * 0.4
    return Known(vectors.astype(np.float32), (vectors @ means.T / 4).astype(np.float32), labels)


@pytest.fixture(scope="module")
def new(known: Known) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(1)
    vectors = rng.normal(size=(40, 12)).astype(np.float32)
    return vectors, rng.normal(size=(40, 5)).astype(np.float32)


def test_scores_of_logits(known: Known, new: tuple[np.ndarray, np.ndarray]) -> None:
    _, logits = new
    np.testing.assert_allclose(SCORES["max prob"](known)(*new), 1 - softmax(logits, axis=1).max(axis=1), rtol=1e-5)
    np.testing.assert_allclose(SCORES["max logit"](known)(*new), -logits.max(axis=1))
    np.testing.assert_allclose(SCORES["energy"](known)(*new), -logsumexp(logits, axis=1), rtol=1e-6)


def test_mahalanobis_equals_scipy(known: Known, new: tuple[np.ndarray, np.ndarray]) -> None:
    means = ood_scores.class_means(known)
    precision = LedoitWolf(assume_centered=True).fit(known.vectors - means[known.labels]).precision_
    expected = [min(mahalanobis(vector, mean, precision) ** 2 for mean in means) for vector in new[0]]
    np.testing.assert_allclose(SCORES["mahalanobis"](known)(*new), expected, rtol=1e-4)


def test_relative_mahalanobis_takes_the_common_distance_away(known: Known, new: tuple[np.ndarray, np.ndarray]) -> None:
    whole = LedoitWolf().fit(known.vectors.astype(np.float64))
    common = [mahalanobis(vector, known.vectors.mean(axis=0), whole.precision_) ** 2 for vector in new[0]]
    found = SCORES["mahalanobis"](known)(*new) - SCORES["relative mahalanobis"](known)(*new)
    np.testing.assert_allclose(found, common, rtol=1e-3)


def test_virtual_logit_by_its_definition(known: Known, new: tuple[np.ndarray, np.ndarray]) -> None:
    """The residual outside the main space, scaled so that on training images it is the mean largest logit."""
    centred = (known.vectors - known.vectors.mean(axis=0)).astype(np.float64)
    _, _, right = np.linalg.svd(centred, full_matrices=False)
    rest = right[6:].T  # the six directions of least variance

    def residual(vectors: np.ndarray) -> np.ndarray:
        return np.linalg.norm((vectors - known.vectors.mean(axis=0)) @ rest, axis=1)

    alpha = known.logits.max(axis=1).mean() / residual(known.vectors).mean()
    expected = alpha * residual(new[0]) - logsumexp(new[1], axis=1)
    np.testing.assert_allclose(SCORES["virtual logit"](known)(*new), expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("name", ["mahalanobis", "relative mahalanobis", "nearest neighbours", "virtual logit"])
def test_strangers_score_higher(known: Known, name: str) -> None:
    rng = np.random.default_rng(3)
    chosen = rng.permutation(500)
    part = Known(known.vectors[chosen[:400]], known.logits[chosen[:400]], known.labels[chosen[:400]])
    strange = (12 * rng.normal(size=(100, 12))).astype(np.float32)
    score = SCORES[name](part)
    inside = score(known.vectors[chosen[400:]], known.logits[chosen[400:]])
    outside = score(strange, 0.01 * strange[:, :5])
    assert auroc(inside, outside) > 0.95


@pytest.mark.parametrize("seed", range(5))
def test_auroc_and_fpr_equal_scikit_learn(seed: int) -> None:
    rng = np.random.default_rng(seed)
    known, unknown = rng.normal(size=300).round(1), rng.normal(1, 1, size=200).round(1)  # with ties
    truth = np.repeat([0, 1], [300, 200])
    scores = np.concatenate([known, unknown])
    assert auroc(known, unknown) == pytest.approx(sk.roc_auc_score(truth, scores), abs=1e-12)
    # Known images are the positives of the field's FPR@95: low scores of ours, so both are turned round.
    fpr, tpr, _ = sk.roc_curve(1 - truth, -scores, drop_intermediate=False)
    assert fpr_at_tpr(known, unknown) == pytest.approx(fpr[np.argmax(tpr >= 0.95)], abs=1e-12)


def test_auroc_by_hand() -> None:
    assert auroc(np.array([0.1, 0.4]), np.array([0.4, 0.9])) == (1 + 1 + 0.5 + 1) / 4
