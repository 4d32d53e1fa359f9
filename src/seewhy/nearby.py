"""Processes of one machine -> sums of what they have, over memory that all of them see."""

from __future__ import annotations

import mmap
import os
import platform
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

ROOM = 65_536  # numbers that a process lays down at once: more than a BatchNorm has; gradients go in pieces
SPIN_S = 0.01  # of waiting go by without sleep, since being woken takes longer than most waits
CHECK_S = 1.0
LINE = 64  # bytes of a cache line: each counter has one of its own, so that a write disturbs no other

Numbers = npt.NDArray[np.floating[Any]]


class Gone(RuntimeError):
    """Another process has ended."""


class Table:
    """Memory of `size` processes, of which this one is number `rank`: each lays its numbers down, and all add up all of them.

    There are two places for each, used in turn: who lays down for the third time has seen everybody's second, before which each had read
    the first. Every process adds in the same order, so that all have the same bits.
    """

    def __init__(self, file: Path, rank: int, size: int) -> None:
        with file.open("r+b") as opened:
            memory = mmap.mmap(opened.fileno(), length(size))
        head = np.frombuffer(memory, np.int64, size * LINE // 8).reshape(size, LINE // 8)
        self.turns, self.pids, self.lengths = head[:, 0], head[:, 1], head[:, 2:4]
        self.places = np.frombuffer(memory, np.float64, 2 * size * ROOM, size * LINE).reshape(2, size, ROOM)
        self.rank = rank
        self.turn = 0
        self.pids[rank] = os.getpid()

    def summed(self, values: Numbers) -> Numbers:
        """(n,) float32 or float64 of each process -> (n,) their sums, made in float64. Raises Gone where another process has ended."""
        total = np.empty_like(values)
        for start in range(0, len(values), ROOM):
            total[start : start + ROOM] = self._summed(values[start : start + ROOM])
        return total

    def _summed(self, values: Numbers) -> Numbers:
        self.turn += 1
        places = self.places[self.turn % 2, :, : len(values)]
        places[self.rank] = values
        lengths = self.lengths[:, self.turn % 2]
        lengths[self.rank] = len(values)
        self.turns[self.rank] = self.turn  # after the numbers: an x86 shows its writes to others in their order
        if not (self.turns >= self.turn).all():
            self._wait()
        if not (lengths == len(values)).all():  # never, unless processes had stopped doing the same
            raise RuntimeError(f"{len(values)} numbers to add, and others have {lengths.tolist()}")
        total: Numbers = places.sum(axis=0)
        return total

    def _wait(self) -> None:
        began = checked = time.perf_counter()
        while not (self.turns >= self.turn).all():
            now = time.perf_counter()
            if now - began < SPIN_S:
                os.sched_yield()
                continue
            time.sleep(0.0005)
            if now - checked > CHECK_S:
                checked = now
                for number in self.ended():
                    if self.turns[number] < self.turn:
                        raise Gone(f"process {number} has ended")

    def ended(self) -> list[int]:
        """The processes that are not there, or not seen from here."""
        return [number for number, pid in enumerate(self.pids.tolist()) if not Path(f"/proc/{pid}").exists()]


def length(size: int) -> int:
    """Bytes of a table for so many processes."""
    return size * LINE + 2 * size * ROOM * 8


def able() -> bool:
    """Whether this is a machine for it: other processors may show writes in another order, other systems share memory in other ways."""
    return sys.platform == "linux" and platform.machine() == "x86_64"


def lay_table(rank: int, size: int, tell: Callable[[str], str], agree: Callable[[bool], bool]) -> Table | None:
    """A table of processes that are all on this machine; None for all of them where some cannot have one.

    tell: the leader's text, for all. agree: whether all say yes.
    """
    place = tell(_empty_file(length(size)) if rank == 0 and able() else "")
    table = None
    if place:
        try:
            table = Table(Path(place), rank, size)
        except OSError:
            table = None
    agreed = agree(table is not None)
    if rank == 0 and place:
        Path(place).unlink()  # the memory lives as long as somebody uses it
    return table if agreed and table is not None and agree(not table.ended()) else None


def _empty_file(size: int) -> str:
    """Path of a new file of zeros in memory, or on the disk for temporary files; "" where there is no room."""
    in_memory = Path("/dev/shm")
    try:
        number, path = tempfile.mkstemp(prefix="seewhy-", dir=in_memory if in_memory.is_dir() else None)
    except OSError:
        return ""
    try:
        os.posix_fallocate(number, 0, size)  # a write to memory that is not there would end the process
    except OSError:
        Path(path).unlink()
        return ""
    finally:
        os.close(number)
    return path
