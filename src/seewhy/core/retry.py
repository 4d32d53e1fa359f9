"""Retry reads that fail for passing reasons; raise permanent failures at once, and StorageUnavailableError after the last try."""

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
PERMANENT: dict[type[Exception], str] = {
    FileNotFoundError: "no such file",
    PermissionError: DENIED,
    IsADirectoryError: os.strerror(errno.EISDIR),
    NotADirectoryError: os.strerror(errno.ENOTDIR),
}
PERMANENT_ERRNOS = frozenset({errno.EINVAL, errno.EFBIG, errno.ENAMETOOLONG, errno.ELOOP})
ACCESS_DENIED = re.compile("ACCESS_DENIED|AccessDenied|PERMISSION_DENIED|INVALID_OBJECT_STATE")  # in messages of cloud clients


def permanent_failure(error: Exception) -> str:
    """Why this one file cannot be read; '' if a retry may help (network, disk, credentials)."""
    reason = next((reason for kind, reason in PERMANENT.items() if isinstance(error, kind)), "")
    if not reason and isinstance(error, OSError) and error.errno in PERMANENT_ERRNOS:
        reason = error.strerror or "cannot be read"
    return reason or (DENIED if ACCESS_DENIED.search(str(error)) else "")


def with_retries(work: Callable[[], T], name: str, permanent: Callable[[Exception], str] = permanent_failure) -> T:
    """Return work(), retried after resets, time-outs, expired credentials and disk errors.

    name: of the file, for the message. permanent: reason why a retry cannot help, or ''; such an error is raised at once, as an OSError.
    Raises StorageUnavailableError when the last try fails.
    """
    for wait in (*BACKOFF_S, None):
        try:
            return work()
        except (SeewhyError, MemoryError):
            raise
        except Exception as error:  # fsspec's file systems raise anything
            if permanent(error):
                if isinstance(error, OSError):
                    raise
                raise PermissionError(errno.EACCES, DENIED) from error
            if wait is None:
                raise StorageUnavailableError(
                    f"{name}: cannot be read now ({reason_of(error)}); check disk, network and credentials, "
                    "then re-run the same command to resume"
                ) from error
            time.sleep(wait)
    raise AssertionError("unreachable")


class RetryingFile(io.RawIOBase):
    """An open file whose reads are retried. The position is kept here, so that a failed read never looks like damaged content.

    file: readable and seekable. size: in bytes.
    """

    def __init__(self, file: Any, size: int, name: str) -> None:
        self.file, self.size, self.name, self.position = file, size, name, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self.position

    def seek(self, offset: int, whence: int = 0) -> int:
        position = offset + (0, self.position, self.size)[whence]
        if position < 0:
            raise ValueError("negative seek position")
        self.position = position
        return position

    def read(self, size: int | None = -1) -> bytes:
        """Exactly `size` bytes, fewer only at the end: pyarrow takes short reads for damage."""
        left = max(0, self.size - self.position)
        left = left if size is None or size < 0 else min(size, left)
        chunks = []
        while left:
            # The file was opened before, so even a refusal is not permanent.
            chunks.append(with_retries(partial(self._read_chunk, left), self.name, lambda error: ""))
            self.position += len(chunks[-1])
            left -= len(chunks[-1])
        return chunks[0] if len(chunks) == 1 else b"".join(chunks)

    def readinto(self, buffer: Any) -> int:
        data = self.read(len(buffer))
        buffer[: len(data)] = data
        return len(data)

    def _read_chunk(self, size: int) -> bytes:
        self.file.seek(self.position)
        data: bytes = self.file.read(size)
        if not data:
            raise OSError(errno.EIO, "file is shorter than its size")
        return data

    def close(self) -> None:
        if not self.closed:
            self.file.close()
        super().close()
