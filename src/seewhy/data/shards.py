"""Read images in tar and parquet shards without unpacking, by paths like data/train-000.tar/cat/0001.jpg."""

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
COMPRESSED = (".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".tar.zst")  # no random access
LABEL_SOURCES = {
    ".tar": "a .cls beside each image, a .json with label, class or cls, or a folder per class",
    ".parquet": f"a column named {', '.join(LABELS[:-1])} or {LABELS[-1]}, or Hugging Face's ClassLabel",
}

_INDEXES: dict[str, tuple[Key, Index]] = {}
_LOCK = threading.RLock()


def _new_lock() -> None:
    global _LOCK
    _LOCK = threading.RLock()  # a thread of the parent may have held it at the fork


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_new_lock)


def is_shard(path: Path) -> bool:
    """Whether the path is a shard. Raises DataError for a compressed one."""
    name = path.name.lower()
    if name.endswith(COMPRESSED) and path.is_file():
        raise DataError(f"{path}: compressed, so images in it cannot be read one by one; store it as plain tar")
    return name.endswith(SUFFIXES) and path.is_file()


def shard_of(path: Path) -> tuple[Path, str] | None:
    """Shard and member name of a path into a shard, else None."""
    text = str(path)
    lower = text.lower()
    for suffix in SUFFIXES:  # on text, which is fast enough for every read
        end = lower.find(suffix + os.sep)
        while end >= 0:
            end += len(suffix)
            if os.path.isfile(text[:end]):
                return Path(text[:end]), text[end + 1 :].replace(os.sep, "/")
            end = lower.find(suffix + os.sep, end)
    return None


def shards_in(folder: Path) -> list[Path]:
    """Shards directly in a folder, sorted, without hidden ones."""
    return sorted(path for path in folder.iterdir() if not path.name.startswith(".") and is_shard(path))


def find_shards(root: Path) -> list[tuple[Path, str]]:
    """(shard, part) of `root` itself, of the shards in it, or in `root/{train,val,test}`; the part is '' without a split.

    Names like train-00000-of-00004.parquet also define the parts.
    """
    if is_shard(root):
        return [(root, "")]
    if not root.is_dir():
        return []
    try:
        direct = [(shard, _part_of(shard)) for shard in shards_in(root)]
        below = [(shard, part) for name, part in PART_NAMES.items() if (root / name).is_dir() for shard in shards_in(root / name)]
    except OSError as error:
        raise DataError(f"{root}: cannot be read ({error.strerror}); check its permissions") from error
    if direct and below:
        raise DataError(f"{root}: holds shards ({direct[0][0].name}) and folders of shards ({below[0][0].parent.name}); separate them")
    named = [shard for shard, part in direct if part]
    if named and len(named) < len(direct):
        other = next(shard for shard, part in direct if not part)
        raise DataError(f"{root}: {named[0].name} names a part and {other.name} none; begin all names with train, val or test, or no name")
    shards = direct or below
    has_split = any(part == "train" for _, part in shards)
    return [(shard, part if has_split else "") for shard, part in shards]


def _part_of(shard: Path) -> str:
    return PART_NAMES.get(re.split("[^a-z]", shard.name, maxsplit=1)[0], "")


def members(shard: Path) -> list[Member]:
    """Images of a shard, in its order. Raises DataError if it is unreadable or damaged."""
    try:
        with shard.open("rb") as file:
            index = _index(shard, file)[1]
    except OSError as error:
        raise DataError(f"{shard}: cannot be read ({error.strerror}); check its permissions") from error
    return list(map(Member, index.names, index.labels))


def read_member(shard: Path, name: str) -> bytes:
    """Read an image file in a shard. Raises OSError if it is missing, unreadable or too large."""
    with shard.open("rb", buffering=0) as file:  # opened per image, so that processes share no handle
        key, index = _index(shard, file)
        row = index.row(name)
        if row is None:
            raise FileNotFoundError(errno.ENOENT, "no such image in the shard")
        if not index.column:
            return read_entry(file, index, row)
        with _LOCK:  # other threads wait, and find the row group in memory
            return read_row(file, str(shard), key, index, row)


def file_key(path: Path) -> str:
    """Path, size and modification time of a file, or of its shard: a key that changes with the image. The path if it cannot be read."""
    member = shard_of(path)
    try:
        status = (member[0] if member else path).stat()
    except OSError:
        return str(path.absolute())
    return f"{path.absolute()}|{status.st_size}|{status.st_mtime_ns}"


def stream(file: BinaryIO, kind: str, name: str = "") -> Iterator[tuple[str, bytes, str | None]]:
    """Yield (name, bytes, label) of each image of an open shard, in its order, as listed by `members`.

    kind: 'tar', read forwards only, or 'parquet', which must be seekable. name: of the shard, for messages.
    Raises DataError for a damaged shard or an oversized image, OSError if reading fails.
    """
    return {"tar": stream_tar, "parquet": stream_parquet}[kind](file, name or str(getattr(file, "name", kind)))


def _index(shard: Path, file: BinaryIO) -> tuple[Key, Index]:
    """Index of a shard, from memory unless the file has changed."""
    path, status = str(shard), os.fstat(file.fileno())
    key = (path, status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns)
    with _LOCK:
        if path not in _INDEXES or _INDEXES[path][0] != key:
            _INDEXES[path] = key, (index_tar if shard.suffix.lower() == ".tar" else index_parquet)(file, path)
        return _INDEXES[path]
