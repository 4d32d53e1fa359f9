"""Index the images of a shard, and validate their names, classes and sizes."""

from __future__ import annotations

import bisect
import errno
import sys
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt

from seewhy.errors import one_line

IMAGES = frozenset({".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm"})
MAX_BYTES = 200_000_000  # of an image file
MAX_LABEL = 255  # characters, as for a folder name
MAX_NAME = 1000  # bytes; a path may have 4,096
PART_NAMES = {"train": "train", "val": "val", "valid": "val", "validation": "val", "test": "test"}  # names of folders and shards
LABELS = ("label", "labels", "class", "cls", "target")  # keys and columns of the class; the first present counts


@dataclass(frozen=True, slots=True)
class Member:
    """An image in a shard. name: with folders, unique in the shard. label: its class, or None."""

    name: str
    label: str | None


@dataclass(frozen=True, eq=False)
class Index:
    """The N images of a shard, in its order.

    names, labels: as in Member. tar: spans, (N, 2) int64 offset and size in bytes.
    parquet: column of the images, and first_rows of the row groups.
    """

    names: list[str]
    labels: list[str | None]
    spans: npt.NDArray[np.int64] = field(default_factory=lambda: np.empty((0, 2), dtype=np.int64))
    column: str = ""
    first_rows: tuple[int, ...] = ()

    @cached_property
    def _by_name(self) -> npt.NDArray[np.uint32]:
        """(N,) members sorted by name."""
        return np.array(sorted(range(len(self.names)), key=self.names.__getitem__), dtype=np.uint32)

    def row(self, name: str) -> int | None:
        """Row of the member of this name, or None."""
        rank = bisect.bisect_left(self._by_name, name, key=self.names.__getitem__)
        row = int(self._by_name[rank]) if rank < len(self.names) else -1
        return row if row >= 0 and self.names[row] == name else None


def refuse_large(size: int) -> None:
    """Raise OSError for a file of over MAX_BYTES."""
    if size > MAX_BYTES:
        raise OSError(errno.EFBIG, f"{size / 1e6:,.0f} MB, more than {MAX_BYTES / 1e6:.0f}")


def plain_name(raw: str) -> str:
    """Strip leading '/', './' and doubled '/'."""
    return "/".join(part for part in raw.split("/") if part not in ("", "."))


def name_problem(name: str) -> str:
    """Why a name cannot be printed or used in a path, or ''."""
    try:
        name.encode()
    except UnicodeEncodeError:
        return "is not UTF-8"
    if one_line(name) != name:
        return "holds control characters"
    if len(name.encode()) > MAX_NAME:
        return "is too long"
    return "leads out of the shard" if ".." in name.split("/") else ""


def plain_label(value: Any) -> str | None:
    """Class name from text or a whole number; None for anything else, and if empty or too long."""
    if isinstance(value, bool) or not isinstance(value, (str, int)):
        return None
    text = one_line(str(value).encode(errors="replace").decode()).strip()
    return sys.intern(text) if 0 < len(text) <= MAX_LABEL else None  # one object per class, not per image
