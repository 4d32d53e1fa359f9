"""A tar file, a WebDataset's too -> its images, their classes, and where their bytes lie."""

from __future__ import annotations

import errno
import io
import json
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import BinaryIO

import numpy as np

from seewhy.data.shard_index import IMAGES, LABELS, MAX_BYTES, Index, plain_label, plain_name, refuse_large, why_not
from seewhy.errors import DataError

MAX_HEADER = 16_000_000  # bytes of a header, a .cls or a .json; larger ones are made to exhaust memory


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
        data = exactly(self.file, size)
        self.at += len(data)
        return data


def exactly(file: BinaryIO, size: int) -> bytes:
    """So many bytes, fewer at the end alone; pipes and unbuffered files give less than they are asked for."""
    data = file.read(size) or b""
    while len(data) < size and (more := file.read(size - len(data))):
        data += more
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
            name = plain_name(found.name)
            parts = name.split("/")
            if not found.isreg() or found.issparse() or any(part.startswith(".") and part != ".." for part in parts):
                continue
            stem, _, extension = parts[-1].partition(".")
            yield _Entry(name, "/".join([*parts[:-1], stem]), extension.lower(), found.offset_data, found.size)
    except (tarfile.TarError, ValueError, OverflowError, EOFError) as error:
        raise DataError(f"{shown}: not a whole tar file ({error}); make or copy it again") from error
    if source.block.strip(b"\0"):  # tarfile takes a header that it cannot read for the end
        raise DataError(f"{shown}: not a whole tar file (no header at byte {source.at - len(source.block):,}); make or copy it again")


def _groups(source: _Forward, shown: str, with_images: bool) -> Iterator[tuple[list[_Entry], str | None]]:
    """WebDataset's samples, files with the same key in a row -> their images and their label."""
    group: list[_Entry] = []
    seen: set[str] = set()
    for entry in _entries(source, shown):
        is_image = PurePosixPath(entry.name).suffix.lower() in IMAGES
        if not is_image and entry.extension not in ("cls", "json"):
            continue
        if group and group[0].key != entry.key:
            yield _images(group)
            group = []
        if is_image:
            if reason := why_not(entry.name):
                raise DataError(
                    f"{shown}: the name {entry.name.encode(errors='replace').decode()} {reason}; rename it and make the tar again"
                )
            if entry.name in seen:
                raise DataError(f"{shown}: {entry.name} is in it twice; rename one and make the tar again")
            seen.add(entry.name)
            if with_images and entry.size > MAX_BYTES:
                raise DataError(f"{shown}: {entry.name} has {entry.size / 1e6:,.0f} MB, more than {MAX_BYTES / 1e6:.0f}; remove it")
        if with_images or not is_image:
            if not is_image and entry.size > MAX_HEADER:
                continue
            source.seek(entry.offset)
            entry.data = source.exactly(entry.size)
            if len(entry.data) < entry.size:
                raise DataError(f"{shown}: not a whole tar file ({entry.name} is cut off); make or copy it again")
        group.append(entry)
    if group:
        yield _images(group)


def _images(group: list[_Entry]) -> tuple[list[_Entry], str | None]:
    """A sample's images, those whose extension is an image's as it stands ('jpg', not 'mask.png') where there is one; and its label."""
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
    try:
        content = json.loads(data)
    except (ValueError, RecursionError):
        return None
    if not isinstance(content, dict):
        return None
    return next((label for name in LABELS if (label := plain_label(content.get(name))) is not None), None)


def index_tar(file: BinaryIO, shown: str) -> Index:
    names: list[str] = []
    labels: list[str | None] = []
    places: list[tuple[int, int]] = []
    for images, label in _groups(_Forward(file, seekable=True), shown, with_images=False):
        for entry in images:
            names.append(entry.name)
            labels.append(label)
            places.append((entry.offset, entry.size))
    return Index(names, labels, np.array(places, dtype=np.int64))


def stream_tar(file: BinaryIO, shown: str) -> Iterator[tuple[str, bytes, str | None]]:
    for images, label in _groups(_Forward(file, seekable=False), shown, with_images=True):
        for entry in images:
            yield entry.name, entry.data, label


def read_entry(file: BinaryIO, index: Index, row: int) -> bytes:
    """A member's bytes; OSError where the file has become shorter, or it is too large for an image."""
    offset, size = index.places[row].tolist()
    refuse_large(size)
    file.seek(offset)
    data = exactly(file, size)
    if len(data) < size:
        raise OSError(errno.EINVAL, "the shard ends in the middle of it")
    return data
