"""Reads that fail -> the file's own reason, or a few more tries, and then one line about the way to it."""

from __future__ import annotations

import errno
import io
import os
import re
import time
from collections.abc import Callable
from functools import partial
from typing import Any, TypeVar

from seewhy.errors import SeewhyError, StorageUnavailableError, reason_of

T = TypeVar("T")

BACKOFF_S = (0.5, 2.0)  # before the second and the third try
DENIED = os.strerror(errno.EACCES)
OWN: dict[type[Exception], str] = {  # what no second try changes, and no other file has
    FileNotFoundError: "no such file",
    PermissionError: DENIED,
    IsADirectoryError: os.strerror(errno.EISDIR),
    NotADirectoryError: os.strerror(errno.ENOTDIR),
}
OWN_NUMBERS = frozenset({errno.EINVAL, errno.EFBIG, errno.ENAMETOOLONG, errno.ELOOP})
ACCESS_DENIED = re.compile(
    "ACCESS_DENIED|AccessDenied|PERMISSION_DENIED|INVALID_OBJECT_STATE"
)  # clouds' words for it, which have no number


def permanent_failure(error: Exception) -> str:
    """Why this one file cannot be read; '' where the way to it has failed, so that others cannot be read either, or only now."""
    reason = next((reason for kind, reason in OWN.items() if isinstance(error, kind)), "")
    if not reason and isinstance(error, OSError) and error.errno in OWN_NUMBERS:
        reason = error.strerror or "cannot be read"
    return reason or (DENIED if ACCESS_DENIED.search(str(error)) else "")


def with_retries(work: Callable[[], T], shown: str, own: Callable[[Exception], str] = permanent_failure) -> T:
    """What work() gives, tried again where the way fails: resets, time-outs, credentials that have ended, disks with errors.

    shown: what the message calls the place. own: why trying again is no use, '' where it is; such an error is raised, as an OSError.
    Raises StorageUnavailableError for all others.
    """
    for wait in (*BACKOFF_S, None):
        try:
            return work()
        except (SeewhyError, MemoryError):
            raise
        except Exception as error:  # file systems that fsspec knows raise anything
            if own(error):
                if isinstance(error, OSError):
                    raise
                raise PermissionError(errno.EACCES, DENIED) from error
            if wait is None:
                reason = reason_of(error)
                raise StorageUnavailableError(
                    f"{shown}: cannot be read now ({reason}); once disk, network and credentials are well again, the same command goes on"
                ) from error
            time.sleep(wait)
    raise AssertionError("unreachable")


class RetryingFile(io.RawIOBase):
    """An open file whose reads are tried again; places are checked here, so that a read which fails is never the content's fault.

    file: can be read and can seek. size: its bytes.
    """

    def __init__(self, file: Any, size: int, shown: str) -> None:
        self.file, self.size, self.shown = file, size, shown
        self.place = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self.place

    def seek(self, offset: int, whence: int = 0) -> int:
        place = offset + (0, self.place, self.size)[whence]
        if place < 0:
            raise ValueError("a place before the beginning")
        self.place = place
        return place

    def read(self, size: int | None = -1) -> bytes:
        """All that is asked for, less at the end alone: pyarrow takes less for damage."""
        left = max(0, self.size - self.place)
        left = left if size is None or size < 0 else min(size, left)
        parts = []
        while left:
            parts.append(with_retries(partial(self._part, left), self.shown, lambda error: ""))  # it was opened: a refusal is of the way
            self.place += len(parts[-1])
            left -= len(parts[-1])
        return parts[0] if len(parts) == 1 else b"".join(parts)

    def readinto(self, buffer: Any) -> int:
        data = self.read(len(buffer))
        buffer[: len(data)] = data
        return len(data)

    def _part(self, size: int) -> bytes:
        self.file.seek(self.place)
        data: bytes = self.file.read(size)
        if not data:
            raise OSError(errno.EIO, "it ends before its size")
        return data

    def close(self) -> None:
        if not self.closed:
            self.file.close()
        super().close()
