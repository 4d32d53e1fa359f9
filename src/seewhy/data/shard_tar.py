"""Index and stream the images of a tar file, with their classes, as WebDataset stores them."""

from __future__ import annotations

import errno
import io
import json
import tarfile
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import BinaryIO

import numpy as np

from seewhy.data.shard_index import IMAGES, LABELS, MAX_BYTES, Index, name_problem, plain_label, plain_name, refuse_large
from seewhy.errors import DataError

MAX_HEADER = 16_000_000  # bytes of a header, a .cls or a .json; larger ones would exhaust memory


class _ForwardReader(io.RawIOBase):
    """A file for tarfile, read forwards only and in small blocks: hostile headers seek back, or request gigabytes."""

    def __init__(self, file: BinaryIO, seekable: bool) -> None:
        self.file = file
        self.seeks = seekable
        self.base = file.tell() if seekable else 0
        self.position = 0
        self.block = b""  # the last read

    def tell(self) -> int:
        return self.position

    def seek(self, offset: int, whence: int = 0) -> int:
        if offset < self.position or whence:
            raise tarfile.ReadError("a header points backwards")
        if self.seeks:
            self.file.seek(self.base + offset)
            self.position = offset
        while self.position < offset and (skipped := len(self.file.read(min(offset - self.position, 1 << 20)))):
            self.position += skipped
        return self.position

    def read(self, size: int | None = -1) -> bytes:
        if size is None or not 0 <= size <= MAX_HEADER:
            raise tarfile.ReadError("a header is too large")
        self.block = self.read_fully(size)
        return self.block

    def read_fully(self, size: int) -> bytes:
        data = read_fully(self.file, size)
        self.position += len(data)
        return data


def read_fully(file: BinaryIO, size: int) -> bytes:
    """Read `size` bytes, fewer only at the end; pipes and unbuffered files return short reads."""
    data = file.read(size) or b""
    while len(data) < size and (more := file.read(size - len(data))):
        data += more
    return data


@dataclass
class _Entry:
    """A regular file in a tar. key: its path up to the first dot of the name; extension: the rest, in lower case."""

    name: str
    key: str
    extension: str
    offset: int
    size: int
    data: bytes = b""


def _entries(source: _ForwardReader, shard: str) -> Iterator[_Entry]:
    """Regular files without hidden ones. The consumer may read an entry's bytes before it takes the next."""
    try:
        archive = tarfile.TarFile(fileobj=source, mode="r", encoding="utf-8", errors="surrogateescape")
        while (member := archive.next()) is not None:
            archive.members.clear()  # type: ignore[attr-defined]  # a kilobyte each
            name = plain_name(member.name)
            parts = name.split("/")
            if not member.isreg() or member.issparse() or any(part.startswith(".") and part != ".." for part in parts):
                continue
            stem, _, extension = parts[-1].partition(".")
            yield _Entry(name, "/".join([*parts[:-1], stem]), extension.lower(), member.offset_data, member.size)
    except (tarfile.TarError, ValueError, OverflowError, EOFError) as error:
        raise DataError(f"{shard}: not a complete tar file ({error}); copy it again") from error
    if source.block.strip(b"\0"):  # tarfile takes an unreadable header for the end
        raise DataError(f"{shard}: not a complete tar file (no header at byte {source.position - len(source.block):,}); copy it again")


def _samples(source: _ForwardReader, shard: str, with_images: bool) -> Iterator[tuple[list[_Entry], str | None]]:
    """Yield images and label of each WebDataset sample: consecutive files with the same key."""
    group: list[_Entry] = []
    seen: set[str] = set()
    for entry in _entries(source, shard):
        is_image = PurePosixPath(entry.name).suffix.lower() in IMAGES
        if not is_image and entry.extension not in ("cls", "json"):
            continue
        if group and group[0].key != entry.key:
            yield _images(group)
            group = []
        if is_image:
            if problem := name_problem(entry.name):
                printable = entry.name.encode(errors="replace").decode()
                raise DataError(f"{shard}: the name {printable} {problem}; rename it and make the tar again")
            if entry.name in seen:
                raise DataError(f"{shard}: {entry.name} is in it twice; rename one and make the tar again")
            seen.add(entry.name)
            if with_images and entry.size > MAX_BYTES:
                raise DataError(f"{shard}: {entry.name} has {entry.size / 1e6:,.0f} MB, more than {MAX_BYTES / 1e6:.0f}; remove it")
        elif entry.size > MAX_HEADER:
            continue
        if with_images or not is_image:
            source.seek(entry.offset)
            entry.data = source.read_fully(entry.size)
            if len(entry.data) < entry.size:
                raise DataError(f"{shard}: not a complete tar file ({entry.name} is truncated); copy it again")
        group.append(entry)
    if group:
        yield _images(group)


def _images(group: list[_Entry]) -> tuple[list[_Entry], str | None]:
    """Images and label of a sample; images with a plain extension ('jpg', not 'mask.png') take precedence."""
    images = [entry for entry in group if PurePosixPath(entry.name).suffix.lower() in IMAGES]
    exact = [entry for entry in images if f".{entry.extension}" in IMAGES]
    label = None
    for entry in group:
        if entry.extension == "cls":
            label = plain_label(entry.data.decode(errors="replace")) or label
        elif entry.extension == "json" and label is None:
            label = _json_label(entry.data)
    if label is None:
        label = plain_label(PurePosixPath(group[0].name).parent.name)
    return exact or images, label


def _json_label(data: bytes) -> str | None:
    with suppress(ValueError, RecursionError, AttributeError):  # AttributeError: not an object
        content = json.loads(data)
        return next((label for name in LABELS if (label := plain_label(content.get(name))) is not None), None)
    return None


def index_tar(file: BinaryIO, shard: str) -> Index:
    """List the images of a tar without reading them. Raises DataError."""
    names: list[str] = []
    labels: list[str | None] = []
    spans: list[tuple[int, int]] = []
    for images, label in _samples(_ForwardReader(file, seekable=True), shard, with_images=False):
        names += (entry.name for entry in images)
        labels += [label] * len(images)
        spans += ((entry.offset, entry.size) for entry in images)
    return Index(names, labels, np.array(spans, dtype=np.int64))


def stream_tar(file: BinaryIO, shard: str) -> Iterator[tuple[str, bytes, str | None]]:
    """Yield (name, bytes, label) of each image. Raises DataError."""
    for images, label in _samples(_ForwardReader(file, seekable=False), shard, with_images=True):
        for entry in images:
            yield entry.name, entry.data, label


def read_entry(file: BinaryIO, index: Index, row: int) -> bytes:
    """Read the image of a row. Raises OSError if the tar is truncated or the image too large."""
    offset, size = index.spans[row].tolist()
    refuse_large(size)
    file.seek(offset)
    data = read_fully(file, size)
    if len(data) < size:
        raise OSError(errno.EINVAL, "the shard is truncated")
    return data
