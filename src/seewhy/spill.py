"""Arrays that outgrow memory -> the same in files without a name, which the system takes out of memory when it needs room."""

from __future__ import annotations

import mmap
import os
import tempfile
import threading
import weakref
from math import prod
from typing import Any

import numpy as np
import numpy.typing as npt

IN_MEMORY = 32 << 20  # bytes of such arrays that stay in memory; those that come later go to the disk
LEAST = 4096  # bytes of an array that does
SEGMENT = 64 << 20  # bytes of a file, which many arrays share: each holds a handle
ABLE = hasattr(os, "posix_fallocate")  # where not, arrays stay in memory
LINE = 64  # bytes that an array begins at a multiple of


class _Files:
    """Where the next array goes. held: bytes of living arrays in memory. room, used: the file that is being filled, and how far."""

    def __init__(self) -> None:
        self.lock = threading.RLock()  # reentrant: an array may end while another is made
        self.held = 0
        self.room: mmap.mmap | None = None
        self.used = 0

    def place(self, size: int) -> npt.NDArray[np.uint8] | None:
        """(size,) zeros in a file; None where they are to be in memory."""
        with self.lock:
            if size < LEAST or self.held + size <= IN_MEMORY or not ABLE:
                return None
            try:
                if size > SEGMENT // 2:
                    return np.frombuffer(_file(size), dtype=np.uint8, count=size)
                if self.room is None or self.used + size > SEGMENT:
                    self.room, self.used = _file(SEGMENT), 0
            except OSError:  # a full or read-only disk: as much memory as it takes
                return None
            begin, self.used = self.used, self.used + -(-size // LINE) * LINE
            return np.frombuffer(self.room, dtype=np.uint8, count=size, offset=begin)

    def hold(self, array: npt.NDArray[Any]) -> None:
        """Counts an array in memory for as long as it lives; small ones are not worth it."""
        if array.nbytes < LEAST:
            return
        with self.lock:
            self.held += array.nbytes
        weakref.finalize(array, self._let_go, array.nbytes).atexit = False

    def _let_go(self, size: int) -> None:
        with self.lock:
            self.held -= size


_FILES = _Files()


def _begin_anew() -> None:
    global _FILES
    _FILES.lock = threading.RLock()  # a thread of the parent may have held it, and does not exist in the child
    _FILES = _Files()  # a child that went on in its parent's file would write where the parent does


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_begin_anew)


def _file(size: int) -> mmap.mmap:
    """Zeros in a file that is gone when the last array in it is. Raises OSError where the disk has not so much room."""
    # Not in the cache, which machines may share, nor in /tmp, which may be memory: as SQLite chooses.
    with tempfile.TemporaryFile(dir=os.environ.get("TMPDIR") or "/var/tmp", prefix="seewhy-") as file:
        os.posix_fallocate(file.fileno(), 0, size)  # a full disk is an error here; later it would kill the process
        return mmap.mmap(file.fileno(), size)


def spilled_zeros(shape: tuple[int, ...], dtype: npt.DTypeLike) -> npt.NDArray[Any]:
    """Zeros to be filled, on the disk where much is in memory already. On Linux; elsewhere always in memory."""
    kind = np.dtype(dtype)
    place = _FILES.place(prod(shape) * kind.itemsize)
    if place is not None:
        return place.view(kind).reshape(shape)
    array = np.zeros(shape, dtype=kind)
    _FILES.hold(array)
    return array


def _is_spilled(array: Any) -> bool:
    while isinstance(array, np.ndarray):
        array = array.base
    return isinstance(array.obj if isinstance(array, memoryview) else array, mmap.mmap)


def spilled(array: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """The array, or a copy of it on the disk."""
    if _is_spilled(array):
        return array
    place = _FILES.place(array.nbytes)
    if place is None:
        _FILES.hold(array)
        return array
    copy = place.view(array.dtype).reshape(array.shape)
    copy[...] = array
    return copy
