"""Scores of strangeness: formulas by hand and against scikit-learn and SciPy; strangers score higher."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.spatial.distance import mahalanobis
from scipy.special import logsumexp, softmax
from sklearn.covariance import LedoitWolf
from sklearn.metrics.pairwise import cosine_similarity

from seewhy import unknowns
from seewhy.metrics import auroc
from seewhy.unknowns import SCORES, Known, in_rows


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
    means = unknowns.class_means(known)
    precision = LedoitWolf(assume_centered=True).fit(known.vectors - means[known.labels]).precision_
    expected = [min(mahalanobis(vector, mean, precision) ** 2 for mean in means) for vector in new[0]]
    np.testing.assert_allclose(SCORES["mahalanobis"](known)(*new), expected, rtol=1e-4)


def test_relative_mahalanobis_takes_the_common_distance_away(known: Known, new: tuple[np.ndarray, np.ndarray]) -> None:
    whole = LedoitWolf().fit(known.vectors.astype(np.float64))
    common = [mahalanobis(vector, known.vectors.mean(axis=0), whole.precision_) ** 2 for vector in new[0]]
    found = SCORES["mahalanobis"](known)(*new) - SCORES["relative mahalanobis"](known)(*new)
    np.testing.assert_allclose(found, common, rtol=1e-3)


def test_nearest_neighbours_equal_sorting(known: Known, new: tuple[np.ndarray, np.ndarray]) -> None:
    centre = known.vectors.mean(axis=0)
    expected = np.sort(1 - cosine_similarity(new[0] - centre, known.vectors - centre), axis=1)[:, 2]
    np.testing.assert_allclose(SCORES["nearest neighbours"](known)(*new), expected, atol=2e-3)  # kept in half precision


def test_references_are_a_sample_and_few_pictures_have_fewer_neighbours() -> None:
    vectors = np.random.default_rng(0).normal(size=(5000, 4)).astype(np.float32)
    assert len(unknowns.sample_references(vectors).directions) == 4096
    two = unknowns.sample_references(vectors[:2])
    np.testing.assert_allclose(two.strangeness(vectors[:2]), [2, 2], atol=1e-3)  # centred, two vectors are opposite


def test_virtual_logit_by_its_definition(known: Known, new: tuple[np.ndarray, np.ndarray]) -> None:
    """The residual outside the main space, scaled so that on training pictures it is the mean largest logit."""
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


@given(st.lists(st.integers(0, 7), min_size=1, max_size=8), st.lists(st.integers(1, 9), max_size=8))
def test_rows_are_cut_anew_wherever_blocks_end(sizes: list[int], counts: list[int]) -> None:
    rows = np.arange(2 * sum(sizes)).reshape(-1, 2)
    blocks = np.split(rows, np.cumsum(sizes)[:-1])
    found = list(in_rows(iter([block for block in blocks if len(block)] or [rows]), counts))
    expected = [block for block in np.split(rows, np.cumsum(counts))[: len(counts)] if len(block)]
    assert [block.tolist() for block in found] == [block.tolist() for block in expected]
