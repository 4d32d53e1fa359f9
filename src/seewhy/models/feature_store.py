"""Rows of numbers under keys of their content -> files that all may read, each written by one process at a time."""

from __future__ import annotations

import mmap
import os
import re
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt
from filelock import FileLock, Timeout

from seewhy.core.progress import LOG

SYNC_S = 2.0  # of computing is the most that a kill or a power cut takes away
FILE_BYTES = 4 << 30  # of rows, from which on a writer begins its next file
KEY = np.dtype("S32")  # sha256
KEYS_AT_ONCE = 1 << 16  # that are compared at a time, so that memory does not grow with the store
NEW_AT_MOST = 1 << 20  # keys that are not sorted in among the others yet
FILE_BITS = 40  # a row's number is that of its file, above these bits, and its place in it


def stored_dtype(shape: Sequence[int], kept: str = "auto") -> type[np.float16] | type[np.float32]:
    """What features are kept as: 'float16', 'float32', or (auto) maps in half precision and vectors in single.

    What trains on images directly rounds the same way, so that cached or not is the same mathematics.
    """
    if kept == "auto":
        return np.float32 if len(shape) == 1 else np.float16
    kinds: dict[str, type[np.float16 | np.float32]] = {"float16": np.float16, "float32": np.float32}
    return kinds[kept]


@dataclass(frozen=True, eq=False)
class StoredRows:
    """The rows of all files of a store, (R, *shape), memory-mapped: file number -> its rows."""

    files: Mapping[int, npt.NDArray[Any]]
    dtype: np.dtype[Any]
    shape: tuple[int, ...]

    def take(self, rows: npt.NDArray[np.int64]) -> npt.NDArray[np.float32]:
        """(B, *shape) float32 of these rows."""
        taken = np.empty((len(rows), *self.shape), dtype=np.float32)
        numbers = rows >> FILE_BITS
        for number in np.unique(numbers):
            here = numbers == number
            taken[here] = take_rows(self.files[int(number)], rows[here] & ((1 << FILE_BITS) - 1))
        return taken


def take_rows(store: npt.NDArray[Any] | StoredRows, rows: npt.NDArray[np.int64]) -> npt.NDArray[np.float32]:
    """A float32 copy of some rows. Pages of a mapped file are let go at once, so that memory does not grow to its size.

    They stay in the system's cache, from where the next epoch has them back.
    """
    if isinstance(store, StoredRows):
        return store.take(rows)
    taken = np.asarray(store[rows], dtype=np.float32)
    mapped = getattr(store, "_mmap", None)  # numpy's name for the mmap object of a memmap
    if mapped is not None and hasattr(mmap, "MADV_DONTNEED"):
        mapped.madvise(mmap.MADV_DONTNEED)
    return taken


class KnownKeys:
    """Keys by their first 8 bytes of 32, so that a billion of them are looked up in memory.

    Of 10^9 keys two begin alike with a probability of 0.03 (n^2 / 2^65): the row of one is then not stored, and computed again by
    whoever looks for it with `FeatureStore.find`.
    """

    def __init__(self, known: npt.NDArray[np.uint64]) -> None:
        self.sorted = np.sort(known)
        self.new: set[int] = set()  # since then

    def lacks(self, keys: npt.NDArray[np.bytes_]) -> npt.NDArray[np.bool_]:
        """(N,) which of the keys are not known."""
        asked = beginnings(keys)
        places = np.searchsorted(self.sorted, asked)
        missing = np.ones(len(asked), dtype=bool)
        inside = places < len(self.sorted)
        missing[inside] = self.sorted[places[inside]] != asked[inside]
        missing[missing] = [key not in self.new for key in asked[missing].tolist()]
        return missing

    def add(self, keys: npt.NDArray[np.bytes_]) -> None:
        self.new.update(beginnings(keys).tolist())
        if len(self.new) > NEW_AT_MOST:
            self.sorted = np.sort(np.append(self.sorted, np.fromiter(self.new, dtype=np.uint64)), kind="stable")
            self.new.clear()


def beginnings(keys: npt.NDArray[np.bytes_]) -> npt.NDArray[np.uint64]:
    """(N,) the first 8 of each key's 32 bytes as a number."""
    first: npt.NDArray[np.uint64] = np.ascontiguousarray(keys).view(np.uint64).reshape(-1, KEY.itemsize // 8)[:, 0].copy()
    return first


class FeatureStore:
    """A folder with pairs of files: rows.bin (features) and keys.bin (32 bytes a row), then rows-1.bin and keys-1.bin, and so on.

    Rows are on the disk before their keys, so whatever ends a run, every key has its row; a tail without keys is cut off by the next
    writer. One training writes at a time (a lock file), each of its processes into files of its own: process r of n those with the
    numbers r, r + n, r + 2n, ..., one after another as they fill up.
    """

    def __init__(self, folder: Path, shape: tuple[int, ...], kept: str = "auto") -> None:
        self.folder = folder
        self.shape = shape
        self.dtype = np.dtype(stored_dtype(shape, kept))
        self.row_bytes = self.dtype.itemsize * int(np.prod(shape))

    def _pair(self, number: int) -> tuple[Path, Path]:
        end = f"-{number}.bin" if number else ".bin"
        return self.folder / f"rows{end}", self.folder / f"keys{end}"

    def _numbers(self) -> list[int]:
        found = (re.fullmatch(r"keys(?:-(\d+))?\.bin", file.name) for file in self.folder.glob("keys*.bin"))
        return sorted(int(match.group(1) or 0) for match in found if match)

    def _complete(self, number: int) -> int:
        """How many rows of a file have been written with their keys."""
        rows, keys = self._pair(number)
        try:
            return min(keys.stat().st_size // KEY.itemsize, rows.stat().st_size // self.row_bytes)
        except FileNotFoundError:
            return 0

    def find(self, wanted: npt.NDArray[np.bytes_]) -> npt.NDArray[np.int64]:
        """(N,) keys -> (N,) numbers of their rows, -1 for those that are not completely written."""
        order = np.argsort(wanted, kind="stable")
        ordered = wanted[order]
        rows = np.full(len(ordered), -1, dtype=np.int64)  # of the first of equal keys
        for number in self._numbers() if len(ordered) else []:
            left = self._complete(number)
            with self._pair(number)[1].open("rb") as file:
                begin = 0
                while left > 0 and len(data := file.read(min(left, KEYS_AT_ONCE) * KEY.itemsize)):
                    stored = np.frombuffer(data, dtype=KEY)
                    where = np.minimum(np.searchsorted(ordered, stored), len(ordered) - 1)
                    hits = np.flatnonzero(ordered[where] == stored)
                    rows[where[hits]] = (number << FILE_BITS) + begin + hits
                    begin, left = begin + len(stored), left - len(stored)
        same = np.append(False, ordered[1:] == ordered[:-1])[: len(ordered)]
        del ordered
        first = np.maximum.accumulate(np.where(same, 0, np.arange(len(rows))))
        found = np.empty_like(rows)
        found[order] = rows[first]
        return found

    def known(self) -> KnownKeys:
        """The keys that are completely written now, to be asked and told of more while one process writes."""
        found = []
        for number in self._numbers():
            with self._pair(number)[1].open("rb") as file:
                found.append(beginnings(np.fromfile(file, dtype=KEY, count=self._complete(number))))
        return KnownKeys(np.concatenate(found) if found else np.empty(0, dtype=np.uint64))

    def open_rows(self) -> npt.NDArray[Any] | StoredRows:
        """All rows, memory-mapped, read-only; an array where there is but the first file."""
        files = {}
        for number in self._numbers():
            if count := self._complete(number):
                files[number] = np.memmap(self._pair(number)[0], dtype=self.dtype, mode="r", shape=(count, *self.shape))
        return files[0] if files.keys() == {0} else StoredRows(files, self.dtype, self.shape)

    def append(self, batches: Iterator[tuple[list[bytes], npt.NDArray[Any]]], writer: int = 0, writers: int = 1) -> None:
        """Adds rows under their keys; to be called under `lock()`, by as many `writers` at a time as there are, each with its number.

        Every SYNC_S seconds the rows are brought to the disk, and their keys after them: not even a power cut leaves a key
        without its row. Whatever ends this keeps what was finished before; a full disk gets back what is of no use.
        """
        number = writer
        while self._complete(number) * self.row_bytes >= FILE_BYTES:
            number += writers
        while self._fill(number, batches):
            number += writers

    def _fill(self, number: int, batches: Iterator[tuple[list[bytes], npt.NDArray[Any]]]) -> bool:
        """Appends to one pair of files until it is full (True) or there is no more (False)."""
        count = self._complete(number)
        pending: list[bytes] = []
        rows_file, keys_file = self._pair(number)
        with open(rows_file, "ab", buffering=0) as rows, open(keys_file, "ab", buffering=0) as keys:
            rows.truncate(count * self.row_bytes)
            keys.truncate(count * KEY.itemsize)

            def commit() -> None:
                nonlocal count
                os.fsync(rows.fileno())
                _write_all(keys, b"".join(pending))
                count += len(pending)
                pending.clear()

            committed = time.monotonic()
            full = False
            try:
                for names, features in batches:
                    _write_all(rows, np.ascontiguousarray(features, dtype=self.dtype).tobytes())
                    pending += names
                    full = (count + len(pending)) * self.row_bytes >= FILE_BYTES
                    if full or time.monotonic() - committed > SYNC_S:
                        commit()
                        committed = time.monotonic()
                    if full:
                        break
            except OSError:
                rows.truncate(count * self.row_bytes)
                raise
            except BaseException:
                commit()
                raise
            commit()
        return full

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Held by the training that writes; says so where another one has to be waited for."""
        lock = FileLock(self.folder / "lock")
        try:
            lock.acquire(timeout=0)
        except Timeout:
            LOG.info("another process computes the same kind of features; waiting for it")
            lock.acquire()
        try:
            yield
        finally:
            lock.release()


def _write_all(file: BinaryIO, data: bytes) -> None:
    """All of `data` to an unbuffered file; OSError where the disk is full, with as much written as it took."""
    left = memoryview(data)
    while left:
        left = left[file.write(left) :]


def as_keys(keys: Sequence[bytes]) -> npt.NDArray[np.bytes_]:
    """N keys of 32 bytes -> (N,) of them."""
    return np.frombuffer(b"".join(keys), dtype=KEY)
