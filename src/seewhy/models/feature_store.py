"""Store rows of features on disk under keys of their content: append-only files, readable by all, safe after a power cut."""

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

SYNC_S = 2.0  # seconds of computing that a kill or a power cut loses at most
KEY = np.dtype("S32")  # sha256
KEY_BLOCK = 1 << 16  # keys read at a time, which bounds memory
MAX_UNSORTED = 1 << 20  # new keys of a KeyIndex before they are sorted in
FILE_BITS = 40  # row number = file number << FILE_BITS | position in the file


def stored_dtype(shape: Sequence[int], dtype: str = "auto") -> type[np.float16] | type[np.float32]:
    """Type of stored features of one image: dtype 'float16', 'float32', or 'auto' (half precision for maps, single for vectors)."""
    if dtype == "auto":
        dtype = "float32" if len(shape) == 1 else "float16"
    return np.float16 if dtype == "float16" else np.float32


@dataclass(frozen=True, eq=False)
class StoredRows:
    """Memory-mapped rows of a store. files: file number to its (R, *shape) rows."""

    files: Mapping[int, npt.NDArray[Any]]
    dtype: np.dtype[Any]
    shape: tuple[int, ...]

    def take(self, rows: npt.NDArray[np.int64]) -> npt.NDArray[np.float32]:
        """(B, *shape) float32 copy of these rows."""
        features = np.empty((len(rows), *self.shape), dtype=np.float32)
        numbers = rows >> FILE_BITS
        for number in np.unique(numbers):
            in_file = numbers == number
            features[in_file] = take_rows(self.files[int(number)], rows[in_file] & ((1 << FILE_BITS) - 1))
        return features


def take_rows(store: npt.NDArray[Any] | StoredRows, rows: npt.NDArray[np.int64]) -> npt.NDArray[np.float32]:
    """(B, *shape) float32 copy of some rows. Releases the pages of a mapped file at once, so that memory does not grow to its size."""
    if isinstance(store, StoredRows):
        return store.take(rows)
    features = np.asarray(store[rows], dtype=np.float32)
    mapped = getattr(store, "_mmap", None)  # of a np.memmap
    if mapped is not None and hasattr(mmap, "MADV_DONTNEED"):
        mapped.madvise(mmap.MADV_DONTNEED)  # the pages stay in the system's cache for the next epoch
    return features


class KeyIndex:
    """Set of keys by their first 8 bytes of 32, which holds a billion of them in memory.

    Two of 10^9 keys collide with a probability of 0.03 (n^2 / 2^65); `FeatureStore.find` then reports one as missing.
    """

    def __init__(self, prefixes: npt.NDArray[np.uint64]) -> None:
        self.sorted = np.sort(prefixes)
        self.new: set[int] = set()

    def missing(self, keys: npt.NDArray[np.bytes_]) -> npt.NDArray[np.bool_]:
        """(N,) which of the keys are not in the index."""
        prefixes = key_prefixes(keys)
        missing: npt.NDArray[np.bool_] = np.searchsorted(self.sorted, prefixes, "left") == np.searchsorted(self.sorted, prefixes, "right")
        missing[missing] = [prefix not in self.new for prefix in prefixes[missing].tolist()]
        return missing

    def add(self, keys: npt.NDArray[np.bytes_]) -> None:
        """Add keys."""
        self.new.update(key_prefixes(keys).tolist())
        if len(self.new) > MAX_UNSORTED:
            self.sorted = np.sort(np.append(self.sorted, np.fromiter(self.new, dtype=np.uint64)), kind="stable")
            self.new.clear()


def key_prefixes(keys: npt.NDArray[np.bytes_]) -> npt.NDArray[np.uint64]:
    """(N,) first 8 of each key's 32 bytes, as a number."""
    prefixes: npt.NDArray[np.uint64] = np.ascontiguousarray(keys).view(np.uint64).reshape(-1, KEY.itemsize // 8)[:, 0].copy()
    return prefixes


class FeatureStore:
    """A folder of file pairs, one for each writing process: rows.bin (features) and keys.bin (32 bytes a row), rows-1.bin, keys-1.bin, ...

    Rows are synced to disk before their keys, so that every key has its row; the next writer truncates rows without keys.
    One training writes at a time (`lock`).
    """

    def __init__(self, folder: Path, shape: tuple[int, ...], dtype: str = "auto") -> None:
        self.folder = folder
        self.shape = shape
        self.dtype = np.dtype(stored_dtype(shape, dtype))
        self.row_bytes = self.dtype.itemsize * int(np.prod(shape))

    def _pair(self, number: int) -> tuple[Path, Path]:
        suffix = f"-{number}.bin" if number else ".bin"
        return self.folder / f"rows{suffix}", self.folder / f"keys{suffix}"

    def _numbers(self) -> list[int]:
        matches = (re.fullmatch(r"keys(?:-(\d+))?\.bin", file.name) for file in self.folder.glob("keys*.bin"))
        return sorted(int(match.group(1) or 0) for match in matches if match)

    def _complete(self, number: int) -> int:
        """Number of rows of a file that have a key."""
        rows, keys = self._pair(number)
        try:
            return min(keys.stat().st_size // KEY.itemsize, rows.stat().st_size // self.row_bytes)
        except FileNotFoundError:
            return 0

    def find(self, wanted: npt.NDArray[np.bytes_]) -> npt.NDArray[np.int64]:
        """(N,) row numbers of (N,) keys, -1 for those without a complete row."""
        unique, inverse = np.unique(wanted, return_inverse=True)
        rows = np.full(len(unique), -1, dtype=np.int64)
        for number in self._numbers() if len(unique) else []:
            begin, end = 0, self._complete(number)
            with self._pair(number)[1].open("rb") as file:
                while begin < end and len(data := file.read(min(end - begin, KEY_BLOCK) * KEY.itemsize)):
                    stored = np.frombuffer(data, dtype=KEY)
                    nearest = np.minimum(np.searchsorted(unique, stored), len(unique) - 1)
                    hits = np.flatnonzero(unique[nearest] == stored)
                    rows[nearest[hits]] = (number << FILE_BITS) + begin + hits
                    begin += len(stored)
        return rows[inverse]

    def key_index(self) -> KeyIndex:
        """Index of the keys with a complete row."""
        prefixes = [np.empty(0, dtype=np.uint64)]
        for number in self._numbers():
            with self._pair(number)[1].open("rb") as file:
                prefixes.append(key_prefixes(np.fromfile(file, dtype=KEY, count=self._complete(number))))
        return KeyIndex(np.concatenate(prefixes))

    def open_rows(self) -> npt.NDArray[Any] | StoredRows:
        """All rows, memory-mapped, read-only; an array if there is only the first file."""
        files = {}
        for number in self._numbers():
            if count := self._complete(number):
                files[number] = np.memmap(self._pair(number)[0], dtype=self.dtype, mode="r", shape=(count, *self.shape))
        return files[0] if files.keys() == {0} else StoredRows(files, self.dtype, self.shape)

    def append(self, batches: Iterator[tuple[list[bytes], npt.NDArray[Any]]], writer: int = 0) -> None:
        """Append batches of keys and features to the files of process `writer`, inside `lock()`.

        Syncs rows, then keys, every SYNC_S seconds. On any exception the rows so far are kept; on OSError, those of the last sync.
        """
        rows_file, keys_file = self._pair(writer)
        count, committed = self._complete(writer), time.monotonic()
        pending: list[bytes] = []
        with open(rows_file, "ab", buffering=0) as rows, open(keys_file, "ab", buffering=0) as keys:
            rows.truncate(count * self.row_bytes)
            keys.truncate(count * KEY.itemsize)

            def commit() -> None:
                nonlocal count, committed
                os.fsync(rows.fileno())
                _write_all(keys, b"".join(pending))
                count, committed = count + len(pending), time.monotonic()
                pending.clear()

            try:
                for names, features in batches:
                    _write_all(rows, np.ascontiguousarray(features, dtype=self.dtype).tobytes())
                    pending += names
                    if time.monotonic() - committed > SYNC_S:
                        commit()
            except OSError:
                rows.truncate(count * self.row_bytes)
                raise
            except BaseException:
                commit()
                raise
            commit()

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Hold the store's lock file; log a line before waiting for another process."""
        lock = FileLock(self.folder / "lock")
        try:
            lock.acquire(timeout=0)
        except Timeout:
            LOG.info("another process is computing features for this store; waiting for it")
            lock.acquire()
        try:
            yield
        finally:
            lock.release()


def _write_all(file: BinaryIO, data: bytes) -> None:
    """Write all of `data` to an unbuffered file. Raises OSError, for example if the disk is full, after a partial write."""
    rest = memoryview(data)
    while rest:
        rest = rest[file.write(rest) :]


def as_keys(keys: Sequence[bytes]) -> npt.NDArray[np.bytes_]:
    """(N,) array of N keys of 32 bytes."""
    return np.frombuffer(b"".join(keys), dtype=KEY)
