"""What a shard says of its images -> names and classes that can be shown and stand in a path, and the limits of both."""

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
MAX_BYTES = 200_000_000  # of an image
MAX_LABEL = 255  # characters, as for a folder's name
MAX_NAME = 1000  # bytes, of the 4,096 that a path may have
PART_NAMES = {"train": "train", "val": "val", "valid": "val", "validation": "val", "test": "test"}  # of folders and shards
LABELS = ("label", "labels", "class", "cls", "target")  # what a class is called, the first that is there


@dataclass(frozen=True, slots=True)
class Member:
    """An image in a shard. name: with its folders, unique in the shard. label: its class, None where the shard tells none."""

    name: str
    label: str | None


@dataclass(frozen=True, eq=False)
class Index:
    """What is in a shard, and where.

    names, labels: one a member, as in Member, in the shard's order.
    tar: places, (N, 2) int64 offset and size of each member. parquet: the column of images, and the first row of each row group.
    """

    names: list[str]
    labels: list[str | None]
    places: npt.NDArray[np.int64] = field(default_factory=lambda: np.empty((0, 2), dtype=np.int64))
    column: str = ""
    firsts: tuple[int, ...] = ()

    @cached_property
    def _by_name(self) -> npt.NDArray[np.uint32]:
        """(N,) members in the order of their names."""
        return np.array(sorted(range(len(self.names)), key=self.names.__getitem__), dtype=np.uint32)

    def row(self, name: str) -> int | None:
        """The number of the member of this name, None where there is none."""
        place = bisect.bisect_left(self._by_name, name, key=self.names.__getitem__)
        found = int(self._by_name[place]) if place < len(self.names) else -1
        return found if found >= 0 and self.names[found] == name else None


def refuse_large(size: int) -> None:
    if size > MAX_BYTES:
        raise OSError(errno.EFBIG, f"{size / 1e6:,.0f} MB, more than {MAX_BYTES / 1e6:.0f}")


def plain_name(raw: str) -> str:
    """Without a leading '/', './' and doubled '/', as a path would have it."""
    return "/".join(part for part in raw.split("/") if part not in ("", "."))


def why_not(name: str) -> str:
    """Why a name cannot be shown or used in a path, '' if it can."""
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
    """A class's name: text or a whole number; None for anything else, and for what is empty or too long."""
    if isinstance(value, bool) or not isinstance(value, (str, int)):
        return None
    text = one_line(str(value).encode(errors="replace").decode()).strip()
    return sys.intern(text) if 0 < len(text) <= MAX_LABEL else None  # one object a class, not one an image
