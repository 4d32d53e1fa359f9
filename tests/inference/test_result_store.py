"""Test the result store: resumed after interruptions, each row once, unreadable images listed."""

from __future__ import annotations

import os
import subprocess
import sys
import tracemalloc
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from filelock import FileLock

from seewhy.errors import ImageError, OutputError
from seewhy.inference.batch_runner import Task, process_pending
from seewhy.inference.result_store import MAX_ROWS, Chunk, ChunkResult, merge_chunks, open_store, write_results
from seewhy.inference.work_units import Source

REQUEST = {"job": "predict", "options": {"top_k": 1}}
TYPES: dict[str, type] = {"path": str, "class_1": str, "prob_1": float}
KEYS = [f"{n:016x}" for n in range(4)]


def piece(source: int, bad: bool = False) -> Chunk:
    names = [f"{source}-{n}.jpg" for n in range(3)]
    rows = {"path": names, "class_1": ["ant"] * 3, "prob_1": [n / 7 for n in range(3)]}
    return Chunk(rows, [(f"{source}-x.jpg", "truncated")] if bad else [])


def ask(out: Path, until: int = 99, request: dict[str, Any] = REQUEST, bad: Sequence[int] = (), skip_bad: bool = False) -> list[int]:
    """Answers from sources that are not finished, interrupted before source `until`; the sources that were asked about."""
    processed: list[int] = []

    def executor(task: Task, left: Sequence[Source]) -> Iterator[ChunkResult]:
        for number, source in enumerate(left):
            if int(source.key, 16) >= until:
                raise KeyboardInterrupt
            processed.append(int(source.key, 16))
            yield ChunkResult(number, 0, True, piece(int(source.key, 16), int(source.key, 16) in bad))

    with open_store(str(out), request, TYPES) as store:
        process_pending(store, KEYS, Task("predict", "", {}), [Source("files", [], "", key) for key in KEYS], executor)
        write_results(store, KEYS, str(out), skip_bad)
    return processed


@pytest.mark.parametrize("suffix", [".csv", ".parquet", ".json"])
def test_interrupted_twice_is_the_same_file(tmp_path: Path, suffix: str) -> None:
    whole, out = tmp_path / f"whole{suffix}", tmp_path / f"table{suffix}"
    assert ask(whole) == [0, 1, 2, 3]
    for until in (1, 3):
        with pytest.raises(KeyboardInterrupt):
            ask(out, until)
        assert not out.exists()
    assert ask(out) == [3]
    assert out.read_bytes() == whole.read_bytes()
    assert sorted(os.listdir(tmp_path)) == [f"table{suffix}", f"whole{suffix}"]


def test_another_request_starts_anew(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        ask(tmp_path / "a.csv", 2)
    assert ask(tmp_path / "a.csv", request={**REQUEST, "asked": "another run"}) == [0, 1, 2, 3]
    assert len(pd.read_csv(tmp_path / "a.csv")) == 12


def test_half_written_and_foreign_files_are_no_parts(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        ask(tmp_path / "a.csv", 2)
    folder = tmp_path / ".a.csv.parts"
    (folder / f".part-{KEYS[2]}-00000-last.json-17").write_text('{"rows": 3')  # of a process that was killed
    (folder / "notes.json").write_text("{}")
    assert ask(tmp_path / "a.csv") == [2, 3]
    assert pd.read_csv(tmp_path / "a.csv")["path"].tolist() == [f"{source}-{n}.jpg" for source in range(4) for n in range(3)]


@pytest.mark.parametrize("suffix", [".csv", ".parquet", ".json"])
def test_bad_images_refuse_the_table_and_skip_bad_takes_what_was_answered(tmp_path: Path, suffix: str) -> None:
    out, errors = tmp_path / f"a{suffix}", tmp_path / f"a.errors{suffix}"
    with pytest.raises(
        ImageError, match=r"^2 of 14 images cannot be used: 1-x\.jpg \(truncated\), 3-x\.jpg \(truncated\); all are"
    ) as caught:
        ask(out, bad=[1, 3])
    assert "pass --skip-bad" in str(caught.value)
    assert str(errors) in str(caught.value)
    assert not out.exists()
    assert ask(out, bad=[1, 3], skip_bad=True) == []
    reader: Any = {".csv": pd.read_csv, ".parquet": pd.read_parquet, ".json": pd.read_json}[suffix]
    assert len(reader(out)) == 12
    assert reader(errors).to_dict("list") == {"path": ["1-x.jpg", "3-x.jpg"], "reason": ["truncated"] * 2}
    assert sorted(os.listdir(tmp_path)) == sorted([out.name, errors.name])
    assert ask(out) == [0, 1, 2, 3]  # all can be used now
    assert os.listdir(tmp_path) == [out.name]


def test_an_error_before_the_first_source_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        ask(tmp_path / "new" / "a.csv", 0)
    assert os.listdir(tmp_path) == []


def test_two_at_once_and_places_that_cannot_be_written(tmp_path: Path) -> None:
    with FileLock(tmp_path / ".a.csv.lock"), pytest.raises(OutputError, match="another process writes it right now"):
        ask(tmp_path / "a.csv")
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match=r"file/a\.csv: cannot be written"):
        ask(tmp_path / "file" / "a.csv")
    with pytest.raises(OutputError, match="unknown table format"):
        ask(tmp_path / "a.xls")


def test_a_folder_that_is_there_takes_parts_with_and_without_a_slash(tmp_path: Path) -> None:
    (tmp_path / "answers").mkdir()
    for path in ("answers", "answers/"):
        with open_store(f"{tmp_path}/{path}", REQUEST, TYPES) as store:
            assert store.folder == str(tmp_path / "answers")


def test_pieces_are_merged_up_to_a_size() -> None:
    small = [Chunk({"path": ["x"] * 1000}, [("y", "truncated")]) for _ in range(20)]
    merged = list(merge_chunks(iter(small)))
    assert [piece.rows + len(piece.bad) for piece in merged] == [9009, 9009, 2002]
    assert MAX_ROWS <= 9009
    assert len(list(merge_chunks(iter([Chunk({"path": ["x"], "heatmap": [bytes(20_000_000)]})] * 4)))) == 2


def test_a_long_table_is_written_a_part_at_a_time(tmp_path: Path) -> None:
    """20 parts of half a MB: no more than a few are held."""
    keys = [f"{n:016x}" for n in range(20)]
    with open_store(str(tmp_path / "a.csv"), REQUEST, TYPES) as store:
        for key in keys:
            rows = {"path": [f"{key}-{n:0100}" for n in range(4000)], "class_1": ["ant"] * 4000, "prob_1": [0.5] * 4000}
            store.add(key, ChunkResult(0, 0, True, Chunk(rows)))
        del rows
        tracemalloc.start()
        assert write_results(store, keys, str(tmp_path / "a.csv"), False) == (80_000, 0)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert peak < 6_000_000
    assert (tmp_path / "a.csv").stat().st_size > 9_000_000


def test_neither_torch_nor_pyarrow_is_imported() -> None:
    modules = "seewhy.inference.result_store, seewhy.inference.batch_runner, seewhy.cli.batch"
    code = f"import sys, {modules}; print({{'torch', 'pyarrow', 'pandas'}} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"
