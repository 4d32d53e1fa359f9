"""Near-duplicates against brute force, by hand, and on images that were copied, resized and compressed again."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from sklearn.metrics.pairwise import cosine_similarity

from seewhy.curation import near_duplicates
from seewhy.data.image_set import open_images


@settings(max_examples=50, deadline=None)
@given(seed=st.integers(0, 10_000), n=st.integers(0, 60), most=st.integers(0, 12))
def test_hash_pairs_equal_brute_force(seed: int, n: int, most: int) -> None:
    rng = np.random.default_rng(seed)
    hashes = rng.integers(0, 2**64, max(1, n // 4), dtype=np.uint64)[rng.integers(0, max(1, n // 4), n)]
    hashes ^= np.uint64(1) << rng.integers(0, 64, n, dtype=np.uint64)  # a bit from one of a few
    expected = [(i, j) for i in range(n) for j in range(i + 1, n) if (int(hashes[i]) ^ int(hashes[j])).bit_count() <= most]
    assert [tuple(pair) for pair in near_duplicates.hash_pairs(hashes, most).tolist()] == expected


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 10_000), most=st.integers(0, 3))
def test_bands_find_the_same_pairs(seed: int, most: int) -> None:
    rng = np.random.default_rng(seed)
    hashes = rng.integers(0, 2**64, 40, dtype=np.uint64)[rng.integers(0, 40, 120)]
    for _ in range(2):
        hashes ^= np.uint64(1) << rng.integers(0, 64, 120, dtype=np.uint64)
    assert near_duplicates._lsh_pairs(hashes, most).tolist() == near_duplicates.hash_pairs(hashes, most).tolist()


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 10_000), most=st.integers(0, 3))
def test_many_images_are_grouped_as_few_are(seed: int, most: int) -> None:
    """Beyond 10 blocks equal hashes are chained and compared once: fewer pairs, the same groups."""
    rng = np.random.default_rng(seed)
    hashes = rng.integers(0, 2**64, 30, dtype=np.uint64)[rng.integers(0, 30, 150)]
    hashes ^= np.uint64(1) << rng.integers(0, 64, 150, dtype=np.uint64) % rng.integers(1, 64, 150, dtype=np.uint64)
    few = near_duplicates.hash_pairs(hashes, most)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(near_duplicates, "BLOCK", 14)
        many = near_duplicates.hash_pairs(hashes, most)
    assert len(many) <= len(few)
    assert (many[:, 0] < many[:, 1]).all()
    np.testing.assert_array_equal(near_duplicates.label_groups(150, many), near_duplicates.label_groups(150, few))


def test_hashes_of_one_colour_say_nothing() -> None:
    assert len(near_duplicates.hash_pairs(np.array([1, 1, 0, 0], dtype=np.uint64))) == 0


def test_feature_pairs_equal_scikit_learn_across_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(near_duplicates, "BLOCK", 7)
    vectors = np.random.default_rng(0).normal(size=(40, 3)).astype(np.float32)
    pairs = near_duplicates.feature_pairs(vectors, 0.8)
    theirs = cosine_similarity(vectors)
    assert pairs.tolist() == np.argwhere(np.triu(theirs >= 0.8, 1)).tolist()
    np.testing.assert_allclose(near_duplicates.cosines_of(vectors, pairs), theirs[pairs[:, 0], pairs[:, 1]], rtol=1e-5)


def test_groups_are_pairs_of_pairs() -> None:
    pairs = np.array([[1, 4], [4, 2], [5, 6]])
    assert near_duplicates.label_groups(8, pairs).tolist() == [0, 1, 1, 3, 1, 5, 5, 7]
    assert near_duplicates.label_groups(3, np.empty((0, 2), dtype=np.int64)).tolist() == [0, 1, 2]


@given(st.lists(st.integers(0, 5), max_size=30))
def test_a_chain_joins_equal_entries_and_no_others(numbers: list[int]) -> None:
    found = near_duplicates.label_groups(len(numbers), near_duplicates.link_equal(numbers))
    assert found.tolist() == [numbers.index(number) for number in numbers]


def test_kinds_on_files(cache: Path, tmp_path: Path) -> None:
    """A copy, a smaller JPEG, an image whose features alone are near, and strangers."""
    rng = np.random.default_rng(0)

    def image() -> Image.Image:
        return Image.fromarray(rng.integers(0, 256, (6, 8, 3), dtype=np.uint8)).resize((320, 240), Image.Resampling.BICUBIC)

    one = image()
    for name in "ab":
        (tmp_path / name).mkdir()
    one.save(tmp_path / "a/0.png")
    (tmp_path / "a/1.png").write_bytes((tmp_path / "a/0.png").read_bytes())
    one.resize((200, 150)).save(tmp_path / "a/2.jpg", quality=80)
    for n in range(3):
        image().save(tmp_path / f"b/{n}.png")
    images = open_images(str(tmp_path))
    without = near_duplicates.near_pairs(images)
    assert without.pairs.tolist() == [[0, 1], [0, 2], [1, 2]]
    assert without.kinds.tolist() == ["exact", "hash", "hash"]
    assert without.distances[0] == 0
    assert np.isnan(without.cosines).all()
    vectors = np.random.default_rng(1).normal(size=(6, 50)).astype(np.float32)
    vectors[[1, 2]] = vectors[0]
    vectors[5] = vectors[4] + 0.1 * vectors[3]
    with_them = near_duplicates.near_pairs(images, vectors)
    assert with_them.pairs.tolist() == [[0, 1], [0, 2], [1, 2], [4, 5]]
    assert with_them.kinds.tolist() == ["exact", "hash", "hash", "features"]
    assert with_them.cosines[0] == pytest.approx(1)
    vectors[2] = vectors[3]  # a hash that the features contradict, and features that agree
    assert near_duplicates.near_pairs(images, vectors).pairs.tolist() == [[0, 1], [2, 3], [4, 5]]


def test_what_all_images_share_says_nothing() -> None:
    """Vectors about a common point far from zero: raw cosines near 1, centred ones as without the point."""
    plain = np.random.default_rng(0).normal(size=(500, 30)).astype(np.float32)
    common = 20 * np.random.default_rng(1).normal(size=30).astype(np.float32)
    assert len(near_duplicates.feature_pairs(plain + common)) > 100_000
    assert len(near_duplicates.feature_pairs(near_duplicates.centred(plain + common), 0.95)) < 2000
    few = near_duplicates.centred(np.array([[1.0, 2.0, 3.0], [1.0, 2.0, 3.1]], dtype=np.float32))  # of two images, hardly the mean
    assert near_duplicates.cosines_of(few, np.array([[0, 1]]))[0] > 0.99
