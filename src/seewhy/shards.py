"""A tar or parquet file -> the pictures in it: names, labels, bytes; nothing is unpacked.

A picture in a shard has a path into it: data/train-000.tar/cat/0001.jpg.
"""

from __future__ import annotations

import bisect
import errno
import io
import itertools
import json
import os
import tarfile
import threading
from array import array
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO

from seewhy.errors import DataError, one_line

SUFFIXES = (".tar", ".parquet")
COMPRESSED = (".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".tar.zst")  # hold no place to begin reading but the first
PICTURES = frozenset({".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm"})
MAX_BYTES = 200_000_000  # of a picture
MAX_HEADER = 16_000_000  # bytes of a tar's header, of a .cls or .json; larger ones are made to exhaust memory
MAX_LABEL = 255  # characters, as for a folder's name
MAX_GROUP = 2_000_000_000  # bytes of the pictures of a row group: one is held whole
STREAMED_ROWS = 64
GROUPS_HELD = 2  # row groups: the one that is read, and the next, which other threads have begun

# Columns of parquet files, the first that is there.
LABELS = ("label", "labels", "class", "cls", "target")
NAMES = ("name", "filename", "file_name", "path", "file", "key", "__key__")
CONTENTS = ("image", "img", "picture", "jpg", "jpeg", "png", "webp", "bytes", "content", "data")

SOUGHT = {
    ".tar": "a .cls beside each picture, a .json with label, class or cls, or a folder for each class",
    ".parquet": f"a column named {', '.join(LABELS[:-1])} or {LABELS[-1]}, or Hugging Face's ClassLabel",
}


@dataclass(frozen=True, slots=True)  # slots: there are as many as pictures
class Member:
    """A picture in a shard. name: with its folders, unique in the shard. label: its class, None where the shard tells none."""

    name: str
    label: str | None


@dataclass(frozen=True)
class _Index:
    """What is in a shard, and where.

    rows: name -> number of its member. tar: offset and size of each member, one after the other.
    parquet: the column of pictures, and the first row of each row group.
    """

    members: list[Member]
    rows: dict[str, int]
    places: array[int] = field(default_factory=lambda: array("q"))
    column: str = ""
    firsts: tuple[int, ...] = ()


Key = tuple[str, int, int]  # a shard's path, size and time

_INDEXES: dict[str, tuple[Key, _Index]] = {}
_GROUPS: OrderedDict[tuple[Key, int], Any] = OrderedDict()  # (shard, row group) -> its column of pictures
_LOCK = threading.RLock()


def _new_lock() -> None:
    global _LOCK
    _LOCK = threading.RLock()  # a thread of the parent may have held it, and does not exist in the child


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_new_lock)


# ---------------------------------------------------------------- paths


def is_shard(path: Path) -> bool:
    """Whether the path is a shard's; DataError for a compressed one."""
    name = path.name.lower()
    if name.endswith(COMPRESSED) and path.is_file():
        raise DataError(f"{path}: compressed, so that no picture can be reached without all before it; store it as plain .tar")
    return name.endswith(SUFFIXES) and path.is_file()


def shard_of(path: Path) -> tuple[Path, str] | None:
    """Shard and member's name of a path into a shard, None for any other path."""
    text = str(path).lower()
    if not any(suffix in text for suffix in SUFFIXES):
        return None
    for parent in path.parents:
        if parent.suffix.lower() in SUFFIXES and parent.is_file():
            return parent, path.relative_to(parent).as_posix()
    return None


def members(shard: Path) -> list[Member]:
    """The pictures of a shard, in its order. Raises DataError where it cannot be read as one."""
    try:
        with shard.open("rb") as file:
            return _index(shard, file)[1].members
    except OSError as error:
        raise DataError(f"{shard}: {error.strerror or 'cannot be read'}") from error


def read_member(shard: Path, name: str) -> bytes:
    """A picture's bytes; OSError where there is no such picture, it cannot be read, or is too large for one."""
    with shard.open("rb", buffering=0) as file:  # opened for each picture: no handle is shared by processes
        key, index = _index(shard, file)
        row = index.rows.get(name)
        if row is None:
            raise FileNotFoundError(errno.ENOENT, "no such picture in the shard")
        if index.column:
            return _read_row(file, str(shard), key, index, row)
        offset, size = index.places[2 * row : 2 * row + 2]
        _refuse_large(size)
        file.seek(offset)
        data = file.read(size) or b""
        while len(data) < size and (more := file.read(size - len(data))):
            data += more
    if len(data) < size:
        raise OSError(errno.EIO, "the shard ends in the middle of it")
    return data


def stream(file: BinaryIO, kind: str, shown: str = "") -> Iterator[tuple[str, bytes, str | None]]:
    """Name, bytes and label of each picture of an open shard, in its order; names and labels are those of `members`.

    kind: 'tar', which is read from here on and never backwards, or 'parquet', which has to be seekable.
    shown: what messages call it. Holds one group of files, or 64 rows, at a time.
    Raises DataError for a damaged shard or a picture that is too large for one, OSError where reading fails.
    """
    shown = shown or str(getattr(file, "name", kind))
    if kind == "tar":
        yield from _stream_tar(file, shown)
    elif kind == "parquet":
        yield from _stream_parquet(file, shown)
    else:
        raise ValueError(f"{kind!r}: neither 'tar' nor 'parquet'")


def _index(shard: Path, file: BinaryIO) -> tuple[Key, _Index]:
    found = os.fstat(file.fileno())
    key = (str(shard.absolute()), found.st_size, found.st_mtime_ns)
    with _LOCK:
        known = _INDEXES.get(key[0])
        if known is None or known[0] != key:
            known = key, (_index_tar if shard.suffix.lower() == ".tar" else _index_parquet)(file, str(shard))
            _INDEXES[key[0]] = known
    return known


def _refuse_large(size: int) -> None:
    if size > MAX_BYTES:
        raise OSError(errno.EFBIG, f"{size / 1e6:,.0f} MB, more than {MAX_BYTES / 1e6:.0f}")


def _plain_name(raw: str) -> str:
    """Without a leading '/', './' and doubled '/', as a path would have it."""
    return "/".join(part for part in raw.split("/") if part not in ("", "."))


def _why_not(name: str) -> str:
    """Why a name cannot be shown or used in a path, '' if it can."""
    try:
        name.encode()
    except UnicodeEncodeError:
        return "is not UTF-8"
    if one_line(name) != name:
        return "holds control characters"
    return "leads out of the shard" if ".." in name.split("/") else ""


def _plain_label(value: Any) -> str | None:
    """A class's name: text or a whole number; None for anything else, and for what is empty or too long."""
    if isinstance(value, bool) or not isinstance(value, (str, int)):
        return None
    text = one_line(str(value).encode(errors="replace").decode()).strip()
    return text if 0 < len(text) <= MAX_LABEL else None


# ---------------------------------------------------------------- tar


class _Forward(io.RawIOBase):
    """A file as tarfile wants it, read forwards only and a little at a time: hostile headers go back, or ask for gigabytes."""

    def __init__(self, file: BinaryIO, seekable: bool) -> None:
        self.file = file
        self.skips = seekable
        self.base = file.tell() if seekable else 0
        self.at = 0
        self.block = b""  # what was read last

    def tell(self) -> int:
        return self.at

    def seek(self, offset: int, whence: int = 0) -> int:
        if offset < self.at or whence:
            raise tarfile.ReadError("a header that leads backwards")
        if self.skips:
            self.file.seek(self.base + offset)
            self.at = offset
        while self.at < offset and (got := len(self.file.read(min(offset - self.at, 1 << 20)))):
            self.at += got
        return self.at

    def read(self, size: int | None = -1) -> bytes:
        if size is None or not 0 <= size <= MAX_HEADER:
            raise tarfile.ReadError("a header of absurd size")
        self.block = self.exactly(size)
        return self.block

    def exactly(self, size: int) -> bytes:
        """So many bytes, fewer at the end alone; pipes give less than they are asked for."""
        data = self.file.read(size) or b""
        while len(data) < size and (more := self.file.read(size - len(data))):
            data += more
        self.at += len(data)
        return data


@dataclass
class _Entry:
    """A regular file in a tar. key: its name up to the first dot behind its folders; extension: what follows, in lower case."""

    name: str
    key: str
    extension: str
    offset: int
    size: int
    data: bytes = b""


def _entries(source: _Forward, shown: str) -> Iterator[_Entry]:
    """All regular files, hidden ones aside. The consumer may read an entry's bytes before it asks for the next."""
    try:
        archive = tarfile.TarFile(fileobj=source, mode="r", encoding="utf-8", errors="surrogateescape")
        while (found := archive.next()) is not None:
            archive.members.clear()  # type: ignore[attr-defined]  # it would keep a kilobyte of each
            name = _plain_name(found.name)
            parts = name.split("/")
            if not found.isreg() or found.issparse() or any(part.startswith(".") and part != ".." for part in parts):
                continue
            stem, _, extension = parts[-1].partition(".")
            yield _Entry(name, "/".join([*parts[:-1], stem]), extension.lower(), found.offset_data, found.size)
    except (tarfile.TarError, ValueError, OverflowError, EOFError) as error:
        raise DataError(f"{shown}: not a whole tar file ({error}); make or copy it again") from error
    if source.block.strip(b"\0"):  # tarfile takes a header that it cannot read for the end
        raise DataError(f"{shown}: not a whole tar file (no header at byte {source.at - len(source.block):,}); make or copy it again")


def _groups(source: _Forward, shown: str, with_pictures: bool) -> Iterator[tuple[list[_Entry], str | None]]:
    """WebDataset's samples, files with the same key in a row -> their pictures and their label."""
    group: list[_Entry] = []
    seen: set[str] = set()
    for entry in _entries(source, shown):
        is_picture = PurePosixPath(entry.name).suffix.lower() in PICTURES
        if not is_picture and entry.extension not in ("cls", "json"):
            continue
        if group and group[0].key != entry.key:
            yield _pictures(group)
            group = []
        if is_picture:
            if reason := _why_not(entry.name):
                raise DataError(
                    f"{shown}: the name {entry.name.encode(errors='replace').decode()} {reason}; rename it and make the tar again"
                )
            if entry.name in seen:
                raise DataError(f"{shown}: {entry.name} is in it twice; rename one and make the tar again")
            seen.add(entry.name)
            if with_pictures and entry.size > MAX_BYTES:
                raise DataError(f"{shown}: {entry.name} has {entry.size / 1e6:,.0f} MB, more than {MAX_BYTES / 1e6:.0f}; remove it")
        if with_pictures or not is_picture:
            if not is_picture and entry.size > MAX_HEADER:
                continue
            source.seek(entry.offset)
            entry.data = source.exactly(entry.size)
            if len(entry.data) < entry.size:
                raise DataError(f"{shown}: not a whole tar file ({entry.name} is cut off); make or copy it again")
        group.append(entry)
    if group:
        yield _pictures(group)


def _pictures(group: list[_Entry]) -> tuple[list[_Entry], str | None]:
    """A sample's pictures, those whose extension is a picture's as it stands ('jpg', not 'mask.png') where there is one; and its label."""
    pictures = [entry for entry in group if PurePosixPath(entry.name).suffix.lower() in PICTURES]
    exact = [entry for entry in pictures if f".{entry.extension}" in PICTURES]
    label = None
    for entry in group:
        if entry.extension == "cls":
            label = _plain_label(entry.data.decode(errors="replace")) or label
        elif entry.extension == "json" and label is None:
            label = _json_label(entry.data)
    if label is None:
        label = _plain_label(PurePosixPath(group[0].name).parent.name)
    return exact or pictures, label


def _json_label(data: bytes) -> str | None:
    try:
        content = json.loads(data)
    except (ValueError, RecursionError):
        return None
    if not isinstance(content, dict):
        return None
    return next((label for name in LABELS if (label := _plain_label(content.get(name))) is not None), None)


def _index_tar(file: BinaryIO, shown: str) -> _Index:
    index = _Index([], {})
    for pictures, label in _groups(_Forward(file, seekable=True), shown, with_pictures=False):
        for entry in pictures:
            index.rows[entry.name] = len(index.members)
            index.members.append(Member(entry.name, label))
            index.places.extend((entry.offset, entry.size))
    return index


def _stream_tar(file: BinaryIO, shown: str) -> Iterator[tuple[str, bytes, str | None]]:
    for pictures, label in _groups(_Forward(file, seekable=False), shown, with_pictures=True):
        for entry in pictures:
            yield entry.name, entry.data, label


# ---------------------------------------------------------------- parquet


def _open_parquet(file: BinaryIO, shown: str) -> Any:
    try:
        import pyarrow.parquet as pq  # slow to import, and answering with an ONNX file does without
    except ImportError as error:
        raise DataError(f"{shown}: parquet files need pyarrow; pip install pyarrow") from error
    with _damage(shown):
        parquet = pq.ParquetFile(file, pre_buffer=False, buffer_size=1 << 20)
        rows = parquet.metadata.num_rows
        held = sum(_group_rows(parquet))
        if rows != held or rows > max(1000, file.seek(0, os.SEEK_END)):
            raise ValueError(f"it promises {rows:,} rows")
    return parquet


@contextmanager
def _damage(shown: str) -> Iterator[None]:
    """What pyarrow raises for damaged files -> DataError; it says no more of a disk that fails."""
    try:
        yield
    except (ValueError, OSError, KeyError, TypeError, OverflowError) as error:
        raise DataError(f"{shown}: not a whole parquet file ({one_line(str(error))[:160]}); make or copy it again") from error


def _group_rows(parquet: Any) -> list[int]:
    return [parquet.metadata.row_group(group).num_rows for group in range(parquet.metadata.num_row_groups)]


def _features(schema: Any) -> dict[str, dict[str, Any]]:
    """Hugging Face's description of the columns, {} where there is none."""
    try:
        features = json.loads((schema.metadata or {})[b"huggingface"])["info"]["features"]
        return {name: feature for name, feature in features.items() if isinstance(feature, dict)}
    except (KeyError, ValueError, TypeError, AttributeError, RecursionError):
        return {}


def _picture_column(schema: Any, shown: str) -> str:
    """The column as pyarrow's readers name it: 'image.bytes' for Hugging Face's struct of bytes and path."""
    import pyarrow as pa

    def is_binary(kind: Any) -> bool:
        return bool(pa.types.is_binary(kind) or pa.types.is_large_binary(kind))

    fitting: dict[str, str] = {}
    for column in schema:
        if is_binary(column.type):
            fitting[column.name] = column.name
        elif pa.types.is_struct(column.type) and any(inner.name == "bytes" and is_binary(inner.type) for inner in column.type):
            fitting[column.name] = f"{column.name}.bytes"
    described = [name for name, feature in _features(schema).items() if feature.get("_type") == "Image"]
    for name in (*described, *CONTENTS):
        if name in fitting:
            return fitting[name]
    if len(fitting) == 1:
        return next(iter(fitting.values()))
    raise DataError(f"{shown}: no column of pictures; looked for binary ones named {', '.join(CONTENTS)}")


def _labels(parquet: Any) -> list[str | None]:
    import pyarrow as pa

    schema, features = parquet.schema_arrow, _features(parquet.schema_arrow)
    described = [name for name, feature in features.items() if feature.get("_type") == "ClassLabel" and name in schema.names]
    name = next((name for name in LABELS if name in schema.names), described[0] if len(described) == 1 else None)
    kind = schema.field(name).type if name else None
    if kind is not None and pa.types.is_dictionary(kind):
        kind = kind.value_type
    if kind is None or not (pa.types.is_integer(kind) or pa.types.is_string(kind) or pa.types.is_large_string(kind)):
        return [None] * parquet.metadata.num_rows
    values = parquet.read(columns=[name], use_threads=False).column(name).to_pylist()
    classes = features.get(name or "", {}).get("names")
    if isinstance(classes, list) and pa.types.is_integer(kind):
        named = dict(enumerate(classes)) | {-1: None}  # -1 is Hugging Face's word for none
        values = [named.get(value, value) for value in values]
    return [_plain_label(value) for value in values]


def _names(parquet: Any, column: str) -> list[str]:
    """From a column of names or the paths beside the bytes, where all are there, unique and harmless; else the rows' numbers."""
    schema = parquet.schema_arrow
    struct = column.removesuffix(".bytes")
    columns = [name for name in NAMES if name in schema.names and name != column]
    if struct != column and any(inner.name == "path" for inner in schema.field(struct).type):
        columns.append(f"{struct}.path")
    for name in columns:
        values = parquet.read(columns=[name], use_threads=False).column(0).to_pylist()
        if name == f"{struct}.path":
            values = [value and value["path"] for value in values]
        if not all(isinstance(value, str) for value in values):
            continue
        plain = [_plain_name(value) for value in values]
        if not all(plain) or any(_why_not(name) for name in plain):
            continue
        plain = [name if PurePosixPath(name).suffix.lower() in PICTURES else f"{name}.jpg" for name in plain]
        if len(set(plain)) == len(plain):
            return plain
    return [f"{row:06d}.jpg" for row in range(parquet.metadata.num_rows)]


def _described(parquet: Any, shown: str) -> tuple[str, list[Member]]:
    """The column of pictures, and the members; no picture's bytes are read."""
    with _damage(shown):
        column = _picture_column(parquet.schema_arrow, shown)
        return column, [Member(name, label) for name, label in zip(_names(parquet, column), _labels(parquet), strict=True)]


def _index_parquet(file: BinaryIO, shown: str) -> _Index:
    parquet = _open_parquet(file, shown)
    column, found = _described(parquet, shown)
    for group in range(parquet.metadata.num_row_groups):
        size = parquet.metadata.row_group(group).total_byte_size
        if size > MAX_GROUP:
            raise DataError(f"{shown}: row group {group} has {size / 1e9:.1f} GB, all of it read for one picture; write groups of 100 rows")
    sizes = _group_rows(parquet)
    firsts = tuple(itertools.accumulate(sizes, initial=0))[:-1]
    return _Index(found, {member.name: row for row, member in enumerate(found)}, column=column, firsts=firsts)


def _read_row(file: BinaryIO, shown: str, key: Key, index: _Index, row: int) -> bytes:
    group = bisect.bisect_right(index.firsts, row) - 1
    place = key, group
    with _LOCK:  # threads that want neighbours wait for the first of them to read the group
        if place not in _GROUPS:
            while len(_GROUPS) >= GROUPS_HELD:
                _GROUPS.popitem(last=False)
            try:
                _GROUPS[place] = _open_parquet(file, shown).read_row_group(group, columns=[index.column], use_threads=False).column(0)
            except (DataError, ValueError, OSError) as error:
                raise OSError(errno.EIO, f"row group {group} is damaged") from error
        _GROUPS.move_to_end(place)
        column = _GROUPS[place]
    cell = column[row - index.firsts[group]]
    return _content(cell)


def _content(cell: Any) -> bytes:
    """A cell's bytes, b'' where it holds none."""
    if cell.is_valid and not hasattr(cell, "as_buffer"):
        cell = cell["bytes"]
    if not cell.is_valid:
        return b""
    buffer = cell.as_buffer()
    _refuse_large(buffer.size)
    return bytes(buffer.to_pybytes())


def _stream_parquet(file: BinaryIO, shown: str) -> Iterator[tuple[str, bytes, str | None]]:
    parquet = _open_parquet(file, shown)
    column, found = _described(parquet, shown)
    left = iter(found)
    batches = parquet.iter_batches(batch_size=STREAMED_ROWS, columns=[column], use_threads=False)
    while True:
        with _damage(shown):
            batch = next(batches, None)
        if batch is None:
            return
        for cell, member in zip(batch.column(0), left, strict=False):
            try:
                data = _content(cell)
            except OSError as error:
                raise DataError(f"{shown}: {member.name} has {error.strerror}; remove it") from error
            yield member.name, data, member.label
