"""Rows come back under their keys, whatever ended the writing; in one file or several, by one writer or several."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from seewhy.models import feature_store as stores
from seewhy.models.feature_store import FILE_BITS, FeatureStore, KeyIndex, StoredRows, as_keys, key_prefixes, stored_dtype, take_rows
from seewhy.models.features import row_key


def batch(*numbers: int) -> tuple[list[bytes], np.ndarray]:
    """Keys and rows (2 values each) of the given numbers."""
    return [row_key(str(n), 0) for n in numbers], np.array([[n, n + 0.5] for n in numbers])


def wanted(*numbers: int) -> np.ndarray:
    return as_keys([row_key(str(n), 0) for n in numbers])


def test_store_gives_back_its_rows_under_their_keys(tmp_path: Path) -> None:
    store = FeatureStore(tmp_path, (2,))
    assert store.find(wanted(1, 2, 3, 4)).tolist() == [-1] * 4
    store.append(iter([batch(1, 2), batch(3)]))
    store.append(iter([batch(4)]))
    assert store.find(wanted(1, 2, 3, 4)).tolist() == [0, 1, 2, 3]
    np.testing.assert_array_equal(store.open_rows(), [[1, 1.5], [2, 2.5], [3, 3.5], [4, 4.5]])
    assert (tmp_path / "keys.bin").stat().st_size == 4 * 32
    assert (tmp_path / "rows.bin").stat().st_size == 4 * 2 * 4


@pytest.mark.parametrize("extra", [3, 8, 11])  # half a row, a row, a row and a half without keys
def test_rows_without_keys_are_dropped_and_overwritten(tmp_path: Path, extra: int) -> None:
    store = FeatureStore(tmp_path, (2,))
    store.append(iter([batch(1, 2)]))
    with (tmp_path / "rows.bin").open("ab") as rows:
        rows.write(b"\xff" * extra)
    assert len(store.open_rows()) == 2
    store.append(iter([batch(3)]))
    np.testing.assert_array_equal(store.open_rows(), [[1, 1.5], [2, 2.5], [3, 3.5]])
    assert store.find(wanted(3)).tolist() == [2]


def test_truncated_keys_lose_only_the_cut_row(tmp_path: Path) -> None:
    store = FeatureStore(tmp_path, (2,))
    store.append(iter([batch(1, 2, 3)]))
    keys = tmp_path / "keys.bin"
    keys.write_bytes(keys.read_bytes()[:-5])
    assert store.find(wanted(1, 2, 3)).tolist() == [0, 1, -1]
    store.append(iter([batch(4)]))
    assert store.find(wanted(1, 2, 3, 4)).tolist() == [0, 1, -1, 2]
    np.testing.assert_array_equal(store.open_rows(), [[1, 1.5], [2, 2.5], [4, 4.5]])


def test_keys_without_rows_do_not_count(tmp_path: Path) -> None:
    store = FeatureStore(tmp_path, (2,))
    store.append(iter([batch(1, 2, 3)]))
    rows = tmp_path / "rows.bin"
    rows.write_bytes(rows.read_bytes()[: 8 + 3])
    assert store.find(wanted(1, 2, 3)).tolist() == [0, -1, -1]
    store.append(iter([batch(2)]))
    assert store.find(wanted(1, 2, 3)).tolist() == [0, 1, -1]
    np.testing.assert_array_equal(store.open_rows(), [[1, 1.5], [2, 2.5]])


def test_append_that_breaks_off_keeps_the_batches_before(tmp_path: Path) -> None:
    store = FeatureStore(tmp_path, (2,))

    def two_batches_and_an_end() -> Iterator[tuple[list[bytes], np.ndarray]]:
        yield batch(1, 2)
        yield batch(3)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        store.append(two_batches_and_an_end())
    assert store.find(wanted(1, 2, 3)).tolist() == [0, 1, 2]
    store.append(iter([batch(4)]))
    np.testing.assert_array_equal(store.open_rows()[:, 0], [1, 2, 3, 4])


def test_maps_are_stored_in_half_and_vectors_in_single_precision(tmp_path: Path) -> None:
    assert stored_dtype((512, 7, 7)) is np.float16
    assert stored_dtype((101, 64)) is np.float16
    assert stored_dtype((512,)) is np.float32
    store = FeatureStore(tmp_path, (3, 2, 2))
    store.append(iter([([row_key("1", 0)], np.full((1, 3, 2, 2), 1 / 3))]))
    assert (tmp_path / "rows.bin").stat().st_size == 3 * 2 * 2 * 2
    assert (store.open_rows() == np.float16(1 / 3)).all()


def test_row_keys_are_of_image_and_view() -> None:
    keys = {row_key(image, view) for image in ("aa", "ab", "aa 1") for view in (0, 1, 10)}
    assert len(keys) == 9
    assert {len(key) for key in keys} == {32}


def test_rows_are_found_by_key_in_any_order_and_number(tmp_path: Path) -> None:
    store = FeatureStore(tmp_path, (2,))
    assert store.find(wanted(1, 2)).tolist() == [-1, -1]
    store.append(iter([batch(1, 2, 3)]))
    assert store.find(wanted(3, 9, 1, 3)).tolist() == [2, -1, 0, 2]
    assert store.find(wanted()).tolist() == []


def test_keys_are_compared_piece_by_piece(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stores, "KEY_BLOCK", 3)
    store = FeatureStore(tmp_path, (2,))
    store.append(iter([batch(*range(10))]))
    assert store.find(wanted(*range(12))).tolist() == [*range(10), -1, -1]


def test_two_writers_at_a_time_write_files_of_their_own(tmp_path: Path) -> None:
    store = FeatureStore(tmp_path, (2,))

    def first() -> Iterator[tuple[list[bytes], np.ndarray]]:
        yield batch(0, 2)
        store.append(iter([batch(1), batch(3), batch(5)]), writer=1)  # in the middle of the other's writing
        yield batch(4)

    store.append(first(), writer=0)
    assert sorted(file.name for file in tmp_path.glob("rows*")) == ["rows-1.bin", "rows.bin"]
    rows = store.find(wanted(*range(6)))
    assert (rows >> FILE_BITS).tolist() == [0, 1, 0, 1, 0, 1]
    opened = store.open_rows()
    assert isinstance(opened, StoredRows)
    np.testing.assert_array_equal(take_rows(opened, rows[[5, 0, 4]]), [[5, 5.5], [0, 0.5], [4, 4.5]])
    store.append(iter([batch(6)]))  # later, by a single process
    assert store.find(wanted(6)).tolist() == [3]


def test_a_writer_that_was_killed_leaves_the_files_of_the_others(tmp_path: Path) -> None:
    store = FeatureStore(tmp_path, (2,))
    store.append(iter([batch(0, 1)]))
    store.append(iter([batch(2)]), writer=1)
    (tmp_path / "keys-1.bin").write_bytes((tmp_path / "keys-1.bin").read_bytes()[:-1])
    assert store.find(wanted(0, 1, 2)).tolist() == [0, 1, -1]
    store.append(iter([batch(3)]), writer=1)
    assert store.find(wanted(2, 3)).tolist() == [-1, 1 << FILE_BITS]


@pytest.mark.parametrize(("dtype", "bytes_each"), [("auto", 4), ("float16", 2), ("float32", 4)])
def test_vectors_are_kept_as_asked(tmp_path: Path, dtype: str, bytes_each: int) -> None:
    store = FeatureStore(tmp_path, (2,), dtype)
    store.append(iter([([row_key("1", 0)], np.array([[1 / 3, 1.0]]))]))
    assert (tmp_path / "rows.bin").stat().st_size == 2 * bytes_each
    taken = take_rows(store.open_rows(), np.array([0]))
    assert taken.dtype == np.float32
    np.testing.assert_array_equal(taken, [[np.float32(stored_dtype((2,), dtype)(1 / 3)), 1.0]])


@given(
    stored=st.lists(st.integers(0, 30), max_size=20, unique=True),
    requested=st.lists(st.integers(0, 30), max_size=40),
    at_once=st.integers(1, 5),
)
def test_equal_keys_find_the_same_row(stored: list[int], requested: list[int], at_once: int) -> None:
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        patch.setattr(stores, "KEY_BLOCK", at_once)
        store = FeatureStore(Path(folder), (2,))
        if stored:
            store.append(iter([batch(*stored)]))
        assert store.find(wanted(*requested)).tolist() == [stored.index(n) if n in stored else -1 for n in requested]


@given(st.lists(st.integers(0, 60), max_size=30), st.lists(st.lists(st.integers(0, 60), max_size=8), max_size=6), st.integers(0, 20))
def test_known_keys_are_those_of_the_files_and_those_that_were_added(first: list[int], later: list[list[int]], at_most: int) -> None:
    """Keys that end in zeros too, which numpy's strings of bytes take for nothing; whatever is sorted in at which moment."""

    def keys(numbers: list[int]) -> np.ndarray:
        return as_keys([row_key(str(n), 0)[:30] + bytes(2) for n in numbers])

    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        patch.setattr(stores, "MAX_UNSORTED", at_most)
        store = FeatureStore(Path(folder), (1,))
        for n in first:
            store.append(iter([([row_key(str(n), 0)[:30] + bytes(2)], np.array([[n]]))]))
        index, there = store.key_index(), set(first)
        assert len(index.sorted) == len(first)
        for added in later:
            expected = [n not in there for n in added]
            assert index.missing(keys(added)).tolist() == expected
            index.add(keys(added))
            there |= set(added)
        assert index.missing(keys(list(range(61)))).tolist() == [n not in there for n in range(61)]


def test_beginnings_of_keys_and_a_store_without_any(tmp_path: Path) -> None:
    one = (5).to_bytes(8, "little") + bytes(24)
    assert key_prefixes(as_keys([one, bytes(31) + b"\1"])).tolist() == [5, 0]
    assert FeatureStore(tmp_path, (2,)).key_index().missing(as_keys([one])).tolist() == [True]
    assert KeyIndex(np.empty(0, dtype=np.uint64)).missing(np.empty(0, dtype="S32")).tolist() == []
