"""Columns: the values of the lists that they stand for, whatever is asked of them, in few bytes."""

from __future__ import annotations

import gc
import hashlib
import io
import pickle
import sys
import tarfile
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from seewhy.curation.near_duplicates import digests
from seewhy.curation.split import split_images
from seewhy.data import verify
from seewhy.data.columns import Column, DigestColumn, PathColumn
from seewhy.data.image_set import open_images
from seewhy.data.verify import ImageCheck

NAMES = st.text(st.characters(exclude_characters="/\0", exclude_categories=["Cs"]), min_size=1, max_size=8)
FOLDER = Path("data/set")
COLUMNS: dict[str, tuple[Any, Any]] = {
    "paths": (
        st.lists(NAMES, min_size=1, max_size=3).map(lambda names: FOLDER.joinpath(*names)),
        lambda paths: PathColumn.of([str(path.relative_to(FOLDER)) for path in paths], FOLDER),
    ),
    "hashes": (st.binary(min_size=32, max_size=32).map(bytes.hex), DigestColumn.of),
}


@pytest.mark.parametrize("kind", COLUMNS)
@settings(deadline=None)  # the first imports pyarrow
@given(data=st.data())
def test_a_column_is_the_list_it_was_made_of(kind: str, data: st.DataObject) -> None:
    element, of = COLUMNS[kind]
    values: list[Any] = data.draw(st.lists(element, max_size=12))
    column: Column[Any] = of(values)
    assert list(column) == values
    assert len(column) == len(values)
    assert [column[i] for i in range(-len(values), len(values))] == values + values
    assert [column[i] for i in np.arange(len(values))] == values  # type: ignore[call-overload]  # numpy's integers are indices, too
    for i in (len(values), -len(values) - 1):
        with pytest.raises(IndexError):
            column[i]
    cut = data.draw(st.slices(len(values)))
    assert list(column[cut]) == values[cut]
    assert type(column[cut]) is type(column)
    positions = data.draw(st.lists(st.integers(0, len(values) - 1), max_size=12)) if values else []
    taken = column[cut].take(np.arange(len(column[cut])))
    assert list(taken) == values[cut]
    assert list(column.take(np.array(positions, dtype=np.int64))) == [values[i] for i in positions]
    assert list(reversed(column)) == values[::-1]
    assert list(pickle.loads(pickle.dumps(column))) == values
    if values:
        one = data.draw(st.sampled_from(values))
        assert (column.index(one), column.count(one), one in column) == (values.index(one), values.count(one), True)


@settings(deadline=None)
@given(st.lists(st.binary(min_size=32, max_size=32), max_size=20))
def test_digests_sort_and_compare_as_their_texts(stored: list[bytes]) -> None:
    """Zeros at the end too, which numpy's strings of bytes take for nothing."""
    stored += [bytes(32), b"\1" + bytes(31), b"\1" + bytes(30) + b"\1", b"\xff" * 32, b"\x7f" * 31 + b"\0"]
    hashes = DigestColumn.of(map(bytes.hex, stored))
    assert list(hashes.take(np.argsort(digests(hashes), kind="stable"))) == sorted(hashes)
    assert len(np.unique(digests(hashes))) == len(set(stored))


# ---------------------------------------------------------------- memory


def write_images(folder: Path, count: int, shards: bool) -> Path:
    """`count` files of 32 bytes, which nobody decodes, in 10 classes."""
    folder.mkdir(parents=True)
    for c in range(10):
        numbers = range(c, count, 10)
        if shards:
            with tarfile.open(folder / f"{c}.tar", "w") as tar:
                for n in numbers:
                    entry = tarfile.TarInfo(f"class_{c}/image_{n:08d}.jpg")
                    entry.size = 32
                    tar.addfile(entry, io.BytesIO(n.to_bytes(32, "big")))
        else:
            (folder / f"class_{c}").mkdir()
            for n in numbers:
                (folder / f"class_{c}" / f"image_{n:08d}.jpg").write_bytes(n.to_bytes(32, "big"))
    return folder


def checked_unseen(data: bytes) -> ImageCheck:
    sha256 = hashlib.sha256(data).hexdigest()
    return ImageCheck(sha256, 64, 48, "", sha256[:16])


def test_what_is_kept_of_an_image_is_its_name_and_some_numbers(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bytes of the columns and arrays of an ImageSet and its Split."""
    monkeypatch.setattr(verify, "check_bytes", checked_unseen)
    images = open_images(str(write_images(tmp_path / "set", 2000, shards=False)))
    split = split_images(images)
    assert images.paths.values.nbytes / 2000 < len("class_1/image_00000001.jpg") + 9
    assert images.hashes.values.nbytes / 2000 < 33
    arrays = [images.labels, images.phashes, images.sizes, images.grey, split.train, split.val, split.test, split.groups]
    columns = images.paths.values.nbytes + images.hashes.values.nbytes + sum(array.nbytes for array in arrays)
    assert 110 < (columns + sys.getsizeof(images.parts) + sys.getsizeof(images.masks)) / 2000 < 150
    assert len(set(map(id, images.parts))) == 1


@pytest.mark.parametrize("shards", [False, True], ids=["folders", "shards"])
def test_an_image_costs_few_bytes_until_it_is_split(shards: bool, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What 2,500 images take more than 500, in Python's memory and in Arrow's. As tuples of Path and str: 870."""
    monkeypatch.setattr(verify, "check_bytes", checked_unseen)
    classes: dict[str, str] = {}  # pathlib fills Python's own table with all names, and it grows by megabytes now and then
    monkeypatch.setattr(sys, "intern", lambda text: text if text.endswith(".jpg") else classes.setdefault(text, text))
    kept = []
    for count in (500, 2500):
        place = str(write_images(tmp_path / str(count), count, shards))
        gc.collect()
        tracemalloc.start()
        images = open_images(place)
        split = split_images(images)
        gc.collect()
        kept.append(tracemalloc.get_traced_memory()[0] + images.paths.values.nbytes + images.hashes.values.nbytes)
        tracemalloc.stop()
        assert len(split.train) == count * 7 // 10
        assert images.paths[-1].name == f"image_{count - 1:08d}.jpg"
    each = (kept[1] - kept[0]) / 2000
    assert 100 < each < (280 if shards else 150)
