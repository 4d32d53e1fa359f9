"""Columns: the values of the lists that they stand for, whatever is asked of them, in few bytes."""

from __future__ import annotations

import gc
import hashlib
import io
import pickle
import sys
import tarfile
import tracemalloc
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from seewhy import checking, spill
from seewhy.checking import Checked
from seewhy.columns import Choices, Column, Hashes, Paths, Texts, TextsBuilder, below
from seewhy.images import open_images
from seewhy.predictions import find_pictures
from seewhy.split import split_images

NAMES = st.text(st.characters(exclude_characters="/\0", exclude_categories=["Cs"]), min_size=1, max_size=8)
COLUMNS: dict[str, tuple[Any, Any]] = {
    "texts": (st.text(max_size=9), Texts.of),
    "file names that are not UTF-8": (st.binary(max_size=9).map(lambda name: name.decode("utf-8", "surrogateescape")), Texts.of),
    "paths": (st.lists(NAMES, min_size=1, max_size=3).map(lambda names: Path(*names)), Paths.of),
    "hashes": (st.integers(0, 300).map(lambda n: hashlib.sha256(str(n).encode()).hexdigest()), Hashes.of),
    "choices": (st.sampled_from(["", "train", "val", "test"]), Choices.of),
    "choices with None": (st.sampled_from([None, Path("mask.png")]), Choices.of),
}


@pytest.mark.parametrize("kind", COLUMNS)
@given(data=st.data())
def test_a_column_is_the_list_it_was_made_of(kind: str, data: st.DataObject) -> None:
    element, of = COLUMNS[kind]
    values: list[Any] = data.draw(st.lists(element, max_size=12))
    column: Column[Any] = of(values)
    assert column == values == list(column)
    assert values == column
    assert len(column) == len(values)
    assert [column[i] for i in range(-len(values), len(values))] == values + values
    assert [column[i] for i in np.arange(len(values))] == values  # type: ignore[call-overload]  # numpy's integers are indices, too
    for i in (len(values), -len(values) - 1):
        with pytest.raises(IndexError):
            column[i]
    cut = data.draw(st.slices(len(values)))
    assert column[cut] == values[cut]
    assert type(column[cut]) is type(column)
    positions = data.draw(st.lists(st.integers(0, len(values) - 1), max_size=12)) if values else []
    assert column.take(np.array(positions, dtype=np.int64)) == [values[i] for i in positions]
    assert list(reversed(column)) == values[::-1]
    assert pickle.loads(pickle.dumps(column)) == values
    assert of(column) == values
    if values:
        one = data.draw(st.sampled_from(values))
        assert (column.index(one), column.count(one), one in column) == (values.index(one), values.count(one), True)
    assert column != [*values, "more"]
    assert column != "text"


def test_columns_are_not_equal_to_other_values() -> None:
    assert Texts.of(["a", "b"]) != ["a", "c"]
    assert Paths.of([Path("a")]) != ["a"]
    with pytest.raises(TypeError, match="unhashable"):
        hash(Texts.of([]))
    assert repr(Texts.of("abcd")) == "Texts(4: 'a', 'b', 'c', ...)"
    assert repr(Choices.of([None])) == "Choices(1: None)"


@given(st.lists(st.binary(min_size=32, max_size=32), max_size=20))
def test_keys_of_hashes_sort_and_compare_as_their_texts(digests: list[bytes]) -> None:
    """Zeros at the end too, which numpy's strings of bytes take for nothing."""
    digests += [bytes(32), b"\1" + bytes(31), b"\1" + bytes(30) + b"\1", b"\xff" * 32, b"\x7f" * 31 + b"\0"]
    hashes = Hashes.of([digest.hex() for digest in digests])
    assert hashes.take(np.argsort(hashes.keys, kind="stable")) == sorted(hashes)
    assert len(np.unique(hashes.keys)) == len(set(digests))


@given(st.lists(NAMES, max_size=9), st.sampled_from([Path("/data/set"), Path("data"), Path(), Path("/")]))
def test_what_all_paths_begin_with_is_kept_once(names: list[str], folder: Path) -> None:
    paths = [folder / name for name in names if name not in (".", "..")]
    found = Paths.of(paths, folder)
    assert found == paths
    assert found.texts.prefix == below(folder)
    assert found.texts.text.tobytes().decode() == "".join(path.name for path in paths)


def test_a_text_that_begins_otherwise_is_refused() -> None:
    with pytest.raises(ValueError, match="'b/x' does not begin with 'a/'"):
        TextsBuilder("a/").add("b/x")


def test_choices_tell_which_is_which() -> None:
    parts = Choices.of(["train", "test", "train", ""])
    assert parts.where("train").tolist() == [True, False, True, False]
    assert parts.where("val").tolist() == [False] * 4
    assert parts.take(np.array([1, 2])).used == ["train", "test"]
    assert Choices.same(None, 3) == (None,) * 3
    assert Choices.of([]).used == []


@pytest.mark.parametrize(("count", "kind"), [(2, np.uint8), (256, np.uint8), (257, np.uint16), (65537, np.uint32)])
def test_codes_are_as_small_as_will_do(count: int, kind: type) -> None:
    values: Sequence[str] = [str(n) for n in range(count)]
    found = Choices.of(values)
    assert found.codes.dtype == kind
    assert found[-1] == values[-1]


# ---------------------------------------------------------------- memory


def write_pictures(folder: Path, count: int, shards: bool) -> Path:
    """`count` files of 32 bytes, which nobody decodes, in 10 classes."""
    folder.mkdir(parents=True)
    for c in range(10):
        numbers = range(c, count, 10)
        if shards:
            with tarfile.open(folder / f"{c}.tar", "w") as tar:
                for n in numbers:
                    entry = tarfile.TarInfo(f"class_{c}/picture_{n:08d}.jpg")
                    entry.size = 32
                    tar.addfile(entry, io.BytesIO(n.to_bytes(32, "big")))
        else:
            (folder / f"class_{c}").mkdir()
            for n in numbers:
                (folder / f"class_{c}" / f"picture_{n:08d}.jpg").write_bytes(n.to_bytes(32, "big"))
    return folder


def checked_unseen(data: bytes) -> Checked:
    sha256 = hashlib.sha256(data).hexdigest()
    return Checked(sha256, 64, 48, "", sha256[:16])


@pytest.mark.parametrize("spills", [False, True], ids=["in memory", "spilled"])
@pytest.mark.parametrize("shards", [False, True], ids=["folders", "shards"])
def test_a_picture_costs_few_bytes_until_it_is_split(
    shards: bool, spills: bool, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What 5,500 pictures take more than 1,500, at the peak and for good. As tuples of Path and str: 1,900 and 870 bytes."""
    if spills:
        monkeypatch.setattr(spill, "IN_MEMORY", 0)
        monkeypatch.setattr(spill, "LEAST", 1)
    monkeypatch.setattr(checking, "check_bytes", checked_unseen)
    monkeypatch.setattr(sys, "intern", str)  # pathlib fills Python's table of names, which grows by megabytes now and then
    peaks, kept = [], []
    for count in (1500, 5500):
        place = str(write_pictures(tmp_path / str(count), count, shards))
        gc.collect()
        tracemalloc.start()
        images = open_images(place)
        split = split_images(images)
        gc.collect()
        size, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        kept.append(size)
        peaks.append(peak)
        assert len(split.train) == count * 7 // 10
        assert images.paths[-1].name == f"picture_{count - 1:08d}.jpg"
    each, at_peak = ((after - before) / 4000 for before, after in (kept, peaks))
    if spills:
        assert each < 10
        assert at_peak < (140 if shards else 110)
    else:
        assert 100 < each < (190 if shards else 130)
        assert at_peak < (250 if shards else 190)


@pytest.mark.parametrize("shards", [False, True], ids=["folders", "shards"])
def test_a_picture_to_predict_costs_the_bytes_of_its_name(shards: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As a list of Path: 575 bytes. Shards are listed, too, which takes 44 more for each picture, its name there included."""
    monkeypatch.setattr(sys, "intern", str)
    kept = []
    for count in (1500, 5500):
        place = write_pictures(tmp_path / str(count), count, shards)
        gc.collect()
        tracemalloc.start()
        paths = find_pictures([place])
        gc.collect()
        kept.append(tracemalloc.get_traced_memory()[0])
        tracemalloc.stop()
        assert len(paths) == count
    each = (kept[1] - kept[0]) / 4000
    name = len(str(paths[-1])) + 4  # and where it ends
    assert each < 9 / 8 * name + (50 if shards else 2)  # an eighth: what a bytearray keeps free to grow
    assert each > name - 8
