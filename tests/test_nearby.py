"""Sums over shared memory: those of numpy, the same bits for all; a table or none for all; who is left alone says so."""

from __future__ import annotations

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Barrier

import numpy as np
import pytest

from seewhy import nearby
from seewhy.nearby import LINE, ROOM, Gone, Table, lay_table, length

on_linux = pytest.mark.skipif(not nearby.able(), reason="memory is shared on Linux and x86-64 alone")


def tables(folder: Path, size: int) -> list[Table]:
    file = folder / "table"
    file.write_bytes(bytes(length(size)))
    return [Table(file, rank, size) for rank in range(size)]


@on_linux
@pytest.mark.parametrize("size", [2, 3])
def test_all_have_the_sums_of_all_turns(tmp_path: Path, size: int) -> None:
    turns = 300
    random = np.random.default_rng(0)
    lengths = [*random.integers(1, 50, turns - 2).tolist(), ROOM, 2 * ROOM + 3]
    given = [[random.normal(size=n) for _ in range(size)] for n in lengths]

    def take_part(table: Table) -> list[np.ndarray]:
        return [table.summed(numbers[table.rank]) for numbers in given]

    with ThreadPoolExecutor(size) as pool:
        found = list(pool.map(take_part, tables(tmp_path, size)))
    for turn, numbers in enumerate(given):
        np.testing.assert_allclose(found[0][turn], sum(numbers), rtol=1e-12, atol=1e-12)
        assert all(np.array_equal(found[0][turn], others[turn]) for others in found[1:])


@on_linux
def test_who_waits_for_a_process_that_has_ended_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nearby, "CHECK_S", 0.01)
    ours, _ = tables(tmp_path, 2)
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    ours.pids[1] = ended.pid
    with pytest.raises(Gone, match="process 1 has ended"):
        ours.summed(np.ones(3))


def test_counters_stand_in_lines_of_their_own(tmp_path: Path) -> None:
    first, second = tables(tmp_path, 2)
    first.turn = second.turn = 6
    first.turns[:] = 6
    second.turns[1] = 7  # as if the other had laid down already
    second.places[1, 1, :2] = 5.0, 6.0
    second.lengths[1, 1] = 2
    assert first.summed(np.array([1.0, 2.0])).tolist() == [6.0, 8.0]
    assert first.pids.tolist() == [os.getpid()] * 2
    assert first.turns.strides == (LINE,)


@on_linux
def test_numbers_that_do_not_belong_together_are_not_added(tmp_path: Path) -> None:
    pair = tables(tmp_path, 2)
    with ThreadPoolExecutor(2) as pool:
        for found in [pool.submit(table.summed, np.ones(3 + table.rank)) for table in pair]:
            with pytest.raises(RuntimeError, match=r"numbers to add, and others have \[3, 4\]"):
                found.result()


@on_linux
def test_who_cannot_see_the_other_has_no_table(monkeypatch: pytest.MonkeyPatch) -> None:
    """Processes in containers that share memory and no numbers of processes."""
    monkeypatch.setattr(nearby.os, "getpid", lambda: 2**22 + 1)  # more than Linux gives
    assert here(0, []) is None


def here(rank: int, told: list[str], well: bool = True) -> Table | None:
    def tell(text: str) -> str:
        if rank == 0:
            told.append(text)
        return told[0]

    return lay_table(rank, 2, tell, lambda mine: mine and well)


@on_linux
def test_two_have_a_table_and_no_file() -> None:
    told: list[str] = []
    meeting = Barrier(2)

    def tell(text: str) -> str:
        told.extend([text] if text else [])
        meeting.wait()
        return told[0]

    said: list[bool] = []

    def agree(well: bool) -> bool:
        said.append(well)
        meeting.wait()
        return all(said)

    with ThreadPoolExecutor(2) as pool:
        first, second = pool.map(lambda rank: lay_table(rank, 2, tell, agree), range(2))
        assert first is not None
        assert second is not None
        later = pool.submit(first.summed, np.array([1.0]))
        assert second.summed(np.array([2.0])).tolist() == later.result().tolist() == [3.0]
    assert told[0]
    assert not Path(told[0]).exists()


@on_linux
def test_all_have_none_where_one_cannot(monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[str] = []
    assert here(0, told, well=False) is None
    assert not Path(told[0]).exists()
    assert here(1, told) is None  # sees no such file: it is on another machine, or in a container
    monkeypatch.setattr(nearby.platform, "machine", lambda: "aarch64")
    told.clear()
    assert here(0, told) is None
    assert told == [""]


@on_linux
def test_no_room_in_memory_is_no_table(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[str] = []

    def full(number: int, offset: int, size: int) -> None:
        made.append(os.readlink(f"/proc/self/fd/{number}"))
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(nearby.os, "posix_fallocate", full)
    told: list[str] = []
    assert here(0, told) is None
    assert told == [""]
    assert not Path(made[0]).exists()
