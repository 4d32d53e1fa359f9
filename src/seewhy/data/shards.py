"""A tar or parquet file -> the images in it: names, labels, bytes; nothing is unpacked.

An image in a shard has a path into it: data/train-000.tar/cat/0001.jpg.
"""

from __future__ import annotations

import errno
import os
import re
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from seewhy.data.shard_index import LABELS, PART_NAMES, Index, Member
from seewhy.data.shard_parquet import Key, index_parquet, read_row, stream_parquet
from seewhy.data.shard_tar import index_tar, read_entry, stream_tar
from seewhy.errors import DataError

SUFFIXES = (".tar", ".parquet")
COMPRESSED = (".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".tar.zst")  # hold no place to begin reading but the first
SOUGHT = {
    ".tar": "a .cls beside each image, a .json with label, class or cls, or a folder for each class",
    ".parquet": f"a column named {', '.join(LABELS[:-1])} or {LABELS[-1]}, or Hugging Face's ClassLabel",
}

_INDEXES: dict[str, tuple[Key, Index]] = {}
_LOCK = threading.RLock()


def _new_lock() -> None:
    global _LOCK
    _LOCK = threading.RLock()  # a thread of the parent may have held it, and does not exist in the child


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_new_lock)


def is_shard(path: Path) -> bool:
    """Whether the path is a shard's; DataError for a compressed one."""
    name = path.name.lower()
    if name.endswith(COMPRESSED) and path.is_file():
        raise DataError(f"{path}: compressed, so that no image can be reached without all before it; store it as plain tar")
    return name.endswith(SUFFIXES) and path.is_file()


def shard_of(path: Path) -> tuple[Path, str] | None:
    """Shard and member's name of a path into a shard, None for any other path."""
    text = str(path)
    lower = text.lower()
    for suffix in SUFFIXES:  # by text, since every image that is read is asked about
        end = lower.find(suffix + os.sep)
        while end >= 0:
            end += len(suffix)
            if os.path.isfile(text[:end]):
                return Path(text[:end]), text[end + 1 :].replace(os.sep, "/")
            end = lower.find(suffix + os.sep, end)
    return None


def shards_in(folder: Path) -> list[Path]:
    """Shards directly in a folder, sorted; hidden ones are passed over."""
    return sorted(path for path in folder.iterdir() if not path.name.startswith(".") and is_shard(path))


def find_shards(root: Path) -> list[tuple[Path, str]]:
    """Shards and their parts ('' where not divided): `root` itself, those in it, or in `root/{train,val,test}`; [] where there are none.

    Names that begin like train-00000-of-00004.parquet give the parts.
    """
    if is_shard(root):
        return [(root, "")]
    if not root.is_dir():
        return []
    try:
        found = [(shard, _part_of(shard)) for shard in shards_in(root)]
        below = [(shard, part) for name, part in PART_NAMES.items() if (root / name).is_dir() for shard in shards_in(root / name)]
    except OSError as error:
        raise DataError(f"{root}: cannot be read ({error.strerror}); check its permissions") from error
    if found and below:
        raise DataError(f"{root}: holds shards ({found[0][0].name}) and folders of shards ({below[0][0].parent.name}); keep them apart")
    named = [shard for shard, part in found if part]
    if named and len(named) < len(found):
        other = next(shard for shard, part in found if not part)
        raise DataError(f"{root}: {named[0].name} names a part and {other.name} none; begin all names with train, val or test, or no name")
    found = found or below
    divided = any(part == "train" for _, part in found)
    return [(shard, part if divided else "") for shard, part in found]


def _part_of(shard: Path) -> str:
    word = re.match("[a-z]*", shard.name)
    return PART_NAMES.get(word[0], "") if word else ""


def members(shard: Path) -> list[Member]:
    """The images of a shard, in its order. Raises DataError where it cannot be read as one."""
    try:
        with shard.open("rb") as file:
            index = _index(shard, file)[1]
    except OSError as error:
        raise DataError(f"{shard}: cannot be read ({error.strerror}); check its permissions") from error
    return list(map(Member, index.names, index.labels))


def read_member(shard: Path, name: str) -> bytes:
    """An image's bytes; OSError where there is no such image, it cannot be read, or is too large for one."""
    with shard.open("rb", buffering=0) as file:  # opened for each image: no handle is shared by processes
        key, index = _index(shard, file)
        row = index.row(name)
        if row is None:
            raise FileNotFoundError(errno.ENOENT, "no such image in the shard")
        if not index.column:
            return read_entry(file, index, row)
        with _LOCK:  # threads that want neighbours wait for the first of them to read the row group
            return read_row(file, str(shard), key, index, row)


def stamp(path: Path) -> str:
    """Path, size and time of a file, or of the shard that holds it: what changes when the image does. Raises OSError."""
    inside = shard_of(path)
    found = (inside[0] if inside else path).stat()
    return f"{path.absolute()}|{found.st_size}|{found.st_mtime_ns}"


def stream(file: BinaryIO, kind: str, shown: str = "") -> Iterator[tuple[str, bytes, str | None]]:
    """Name, bytes and label of each image of an open shard, in its order; names and labels are those of `members`.

    kind: 'tar', which is read from here on and never backwards, or 'parquet', which has to be seekable.
    shown: what messages call it. Holds one group of files, or 16 rows, at a time.
    Raises DataError for a damaged shard or an image that is too large for one, OSError where reading fails.
    """
    shown = shown or str(getattr(file, "name", kind))
    if kind == "tar":
        yield from stream_tar(file, shown)
    elif kind == "parquet":
        yield from stream_parquet(file, shown)
    else:
        raise ValueError(f"{kind!r}: neither 'tar' nor 'parquet'")


def _index(shard: Path, file: BinaryIO) -> tuple[Key, Index]:
    found = os.fstat(file.fileno())
    place = str(shard)
    key = (place, found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns)
    known = _INDEXES.get(place)
    if known is None or known[0] != key:
        with _LOCK:
            known = _INDEXES.get(place)  # another thread may have been first
            if known is None or known[0] != key:
                known = key, (index_tar if shard.suffix.lower() == ".tar" else index_parquet)(file, place)
                _INDEXES[place] = known
    return known
