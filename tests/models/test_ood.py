"""The nearest-neighbour OOD score: its reference sample, and rows cut anew."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st
from sklearn.metrics.pairwise import cosine_similarity

from seewhy.models.ood import fit_reference, in_rows


def test_nearest_neighbours_equal_sorting() -> None:
    rng = np.random.default_rng(0)
    train, new = (rng.normal(size=(n, 12)).astype(np.float32) + 4 for n in (500, 40))
    centre = train.mean(axis=0)
    expected = np.sort(1 - cosine_similarity(new - centre, train - centre), axis=1)[:, 2]
    np.testing.assert_allclose(fit_reference(train).ood_score(new), expected, atol=2e-3)  # kept in half precision


def test_references_are_a_sample_and_few_images_have_fewer_neighbours() -> None:
    vectors = np.random.default_rng(0).normal(size=(5000, 4)).astype(np.float32)
    assert len(fit_reference(vectors).unit_features) == 4096
    two = fit_reference(vectors[:2])
    np.testing.assert_allclose(two.ood_score(vectors[:2]), [2, 2], atol=1e-3)  # centred, two vectors are opposite


@given(st.lists(st.integers(0, 7), min_size=1, max_size=8), st.lists(st.integers(1, 9), max_size=8))
def test_rows_are_cut_anew_wherever_blocks_end(sizes: list[int], counts: list[int]) -> None:
    rows = np.arange(2 * sum(sizes)).reshape(-1, 2)
    blocks = np.split(rows, np.cumsum(sizes)[:-1])
    found = list(in_rows(iter([block for block in blocks if len(block)] or [rows]), counts))
    expected = [block for block in np.split(rows, np.cumsum(counts))[: len(counts)] if len(block)]
    assert [block.tolist() for block in found] == [block.tolist() for block in expected]
