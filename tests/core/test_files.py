"""Files that are whole or not there, and cells that no spreadsheet runs."""

from __future__ import annotations

import errno
import os
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from seewhy.core import files
from seewhy.core.files import atomic_write, escape_formula, escape_formula_path, fsync_path
from seewhy.errors import OutputError


def test_content_is_on_the_disk_before_the_name_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    order: list[str] = []
    replace = os.replace
    monkeypatch.setattr(files, "fsync_path", lambda path: order.append(path.name))
    monkeypatch.setattr(os, "replace", lambda a, b: (order.append("replace"), replace(a, b)))
    with atomic_write(tmp_path / "a.txt") as work:
        work.write_text("x")
    assert order == [f".a.txt-{os.getpid()}", "replace", tmp_path.name]


def test_to_disk_takes_files_and_folders(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("x")
    fsync_path(tmp_path / "a")
    fsync_path(tmp_path)
    with pytest.raises(FileNotFoundError):
        fsync_path(tmp_path / "b")


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO, errno.ESTALE])
def test_whatever_the_disk_says_the_old_file_stays(tmp_path: Path, number: int) -> None:
    (tmp_path / "a.txt").write_text("old")

    def write() -> None:
        with atomic_write(tmp_path / "a.txt", "free some space") as work:
            work.write_text("half of the ne")
            raise OSError(number, os.strerror(number))

    with pytest.raises(OutputError) as caught:
        write()
    assert str(caught.value) == f"{tmp_path / 'a.txt'}: cannot be written ({os.strerror(number)}); free some space"
    assert os.listdir(tmp_path) == ["a.txt"]
    assert (tmp_path / "a.txt").read_text() == "old"


def test_left_overs_of_killed_processes_go_and_nothing_else(tmp_path: Path) -> None:
    long_ago = time.time() - 2 * 86_400
    for name, old in [(".a.txt-123", True), (".a.txt-124", False), (".a.txt-mine", True), (".b.txt-123", True), ("a.txt-5", True)]:
        (tmp_path / name).write_text("x")
        if old:
            os.utime(tmp_path / name, (long_ago, long_ago))
    with atomic_write(tmp_path / "a.txt") as work:
        work.write_text("new")
    assert sorted(os.listdir(tmp_path)) == [".a.txt-124", ".a.txt-mine", ".b.txt-123", "a.txt", "a.txt-5"]


@given(st.text())
def test_no_text_begins_a_formula(text: str) -> None:
    cell = escape_formula(text)
    assert not cell.startswith(("=", "+", "-", "@", "\t", "\r"))
    assert cell in (text, f"'{text}")
    assert escape_formula(cell) == cell  # once is enough
    assert escape_formula_path(text) in (text, f"./{text}")
    assert not escape_formula_path(text).startswith(("=", "+", "-", "@", "\t", "\r"))


@pytest.mark.parametrize("value", [-1.5, 0, -7, True, None])
def test_numbers_stay(value: object) -> None:
    assert escape_formula(value) is value
