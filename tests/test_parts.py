"""Long tables: what was finished before an interruption is not asked again, and each row is there once."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from filelock import FileLock
from hypothesis import given, settings
from hypothesis import strategies as st

from seewhy.errors import OutputError
from seewhy.parts import open_parts, request_of
from seewhy.predictions import Columns, Predictions, find_pictures, records_of

REQUEST = {"pictures": 10, "files": "abc"}


def block(begin: int, end: int) -> Columns:
    return {
        "path": [f"{n}.jpg" for n in range(begin, end)],
        "class_1": ["ant"] * (end - begin),
        "prob_1": [n / 7 for n in range(begin, end)],
    }


def write(out: Path, request: dict[str, Any], until: int, size: int = 3, total: int = 10) -> int:
    """Answers from where it is on, `size` pictures a block, and is interrupted at `until`; how many it asked about."""
    asked = 0
    with open_parts(out, request) as parts:
        for begin in range(parts.done, total, size):
            if begin >= until:
                raise KeyboardInterrupt
            parts.add(block(begin, min(begin + size, total)), [])
            asked += min(begin + size, total) - begin
        assert parts.join() == total
    return asked


@pytest.mark.parametrize("suffix", [".csv", ".parquet", ".json"])
def test_interrupted_twice_is_the_same_file(tmp_path: Path, suffix: str) -> None:
    whole, out = tmp_path / f"whole{suffix}", tmp_path / f"table{suffix}"
    assert write(whole, REQUEST, 99) == 10
    for until in (3, 7):
        with pytest.raises(KeyboardInterrupt):
            write(out, REQUEST, until)
        assert not out.exists()
    assert write(out, REQUEST, 99) == 1  # after 9 of 10
    assert out.read_bytes() == whole.read_bytes()
    assert sorted(os.listdir(tmp_path)) == [f"table{suffix}", f"whole{suffix}"]


def test_another_request_starts_anew(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        write(tmp_path / "a.csv", REQUEST, 6)
    assert write(tmp_path / "a.csv", {**REQUEST, "files": "other"}, 99) == 10
    assert len(pd.read_csv(tmp_path / "a.csv")) == 10


def test_half_written_and_foreign_parts_are_no_parts(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        write(tmp_path / "a.csv", REQUEST, 6)
    folder = tmp_path / ".a.csv.partial"
    (folder / ".000000000009.json-17").write_text('{"columns": {"pa')  # of a process that was killed
    (folder / "notes.json").write_text("{}")
    assert write(tmp_path / "a.csv", REQUEST, 99) == 4
    assert pd.read_csv(tmp_path / "a.csv")["path"].tolist() == [f"{n}.jpg" for n in range(10)]


def test_left_out_pictures_count_as_done(tmp_path: Path) -> None:

    def interrupted() -> None:
        with open_parts(tmp_path / "a.csv", REQUEST) as parts:
            parts.add(block(0, 2), [("x.jpg", "truncated")])
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    with open_parts(tmp_path / "a.csv", REQUEST) as parts:
        assert parts.done == 3
        assert [bad for _, bad in parts.blocks()] == [[("x.jpg", "truncated")]]


def test_parts_without_a_row_are_not_kept(tmp_path: Path) -> None:
    def refused() -> None:
        with open_parts(tmp_path / "a.csv", REQUEST) as parts:
            parts.add({"path": []}, [("x.jpg", "truncated")])
            raise OutputError("none is left")

    with pytest.raises(OutputError):
        refused()
    assert os.listdir(tmp_path) == []


def test_an_error_before_the_first_block_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="oh"), open_parts(tmp_path / "new" / "a.csv", REQUEST):
        raise ValueError("oh")
    assert os.listdir(tmp_path) == []


def test_two_at_once_and_places_that_cannot_be_written(tmp_path: Path) -> None:
    with (
        FileLock(tmp_path / ".a.csv.lock"),
        pytest.raises(OutputError, match="another process writes it right now"),
        open_parts(tmp_path / "a.csv", REQUEST),
    ):
        pass
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match=r"file/a\.csv: cannot be written"), open_parts(tmp_path / "file" / "a.csv", REQUEST):
        pass
    with pytest.raises(OutputError, match="unknown table format"), open_parts(tmp_path / "a.xls", REQUEST):
        pass


def test_a_request_is_who_which_and_how(tmp_path: Path) -> None:
    model, one, two = (tmp_path / name for name in ("model.onnx", "1.jpg", "2.jpg"))
    for path in (model, one, two):
        path.write_text("x")
    first = request_of(model, [one, two], top_k=5)
    assert first == request_of(model, find_pictures([one, two]), top_k=5)
    assert json.loads(json.dumps(first)) == first
    others = [request_of(model, [two, one], top_k=5), request_of(model, [one], top_k=5), request_of(one, [one, two], top_k=5)]
    others.append(request_of(model, [one, two], top_k=4))
    two.write_text("longer")
    others.append(request_of(model, [one, two], top_k=5))
    assert first not in others


@settings(deadline=None)
@given(data=st.data(), n=st.integers(0, 6), c=st.integers(1, 5), top_k=st.integers(1, 7))
def test_rows_say_what_the_probabilities_say(data: st.DataObject, n: int, c: int, top_k: int) -> None:
    """Any probabilities: each row's classes are different, sorted by probability, and records hold the same as columns."""
    rows = data.draw(st.lists(st.lists(st.floats(1e-3, 1), min_size=c, max_size=c), min_size=n, max_size=n))
    probs = np.array(rows, dtype=np.float64).reshape(n, c)
    probs /= probs.sum(axis=1, keepdims=True)
    least = data.draw(st.none() | st.floats(0, 1))
    names = tuple(data.draw(st.lists(st.text(min_size=1), min_size=c, max_size=c, unique=True)))
    found = Predictions(tuple(f"{i}.jpg" for i in range(n)), probs, names, np.zeros(n, dtype=bool))
    columns = found.columns(top_k, least)
    assert set(map(len, columns.values())) <= {n}
    for i, record in enumerate(found.records(top_k, least)):
        shown = [answer["prob"] for answer in record["top"]]
        assert shown == sorted(probs[i].tolist(), reverse=True)[:top_k]
        assert len({answer["class"] for answer in record["top"]}) == min(top_k, c)
        assert all(probs[i][names.index(answer["class"])] == answer["prob"] for answer in record["top"])
        if least is not None:
            assert record["answer"] == (record["top"][0]["class"] if shown[0] >= least else None)
    assert records_of(columns) == found.records(top_k, least)
