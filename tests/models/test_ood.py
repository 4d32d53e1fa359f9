"""The nearest-neighbour OOD score and its reference sample."""

from __future__ import annotations

import numpy as np
from sklearn.metrics.pairwise import cosine_similarity

from seewhy.models.ood import MAX_REFERENCES, fit_reference, sample_references


def test_nearest_neighbours_equal_sorting() -> None:
    rng = np.random.default_rng(0)
    train, new = (rng.normal(size=(n, 12)).astype(np.float32) + 4 for n in (500, 40))
    centre = train.mean(axis=0)
    expected = np.sort(1 - cosine_similarity(new - centre, train - centre), axis=1)[:, 2]
    np.testing.assert_allclose(fit_reference(train).ood_score(new), expected, atol=2e-3)  # kept in half precision


def test_references_are_a_sample_and_few_images_have_fewer_neighbours() -> None:
    drawn = sample_references(np.arange(100, 5100), seed=1)
    assert len(set(drawn.tolist())) == len(drawn) == MAX_REFERENCES == 4096
    assert drawn.min() >= 100
    assert (np.diff(drawn) > 0).all()
    assert sample_references(np.array([7, 3]), seed=1).tolist() == [3, 7]
    vectors = np.random.default_rng(0).normal(size=(2, 4)).astype(np.float32)
    np.testing.assert_allclose(fit_reference(vectors).ood_score(vectors), [2, 2], atol=1e-3)  # centred, two vectors are opposite
