"""Files, folders, shards, patterns and addresses -> Sources: pieces of work of bounded size, each readable by itself anywhere."""

from __future__ import annotations

import fnmatch
import hashlib
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from seewhy.decoding import read_bytes
from seewhy.errors import DataError
from seewhy.images import check_name
from seewhy.predictions import BLOCK, find_pictures
from seewhy.shard_names import MAX_BYTES, PICTURES
from seewhy.shards import COMPRESSED, SUFFIXES, is_shard, shard_of, shards_in, stream
from seewhy.storage import Found, is_address, list_files, open_file


@dataclass(frozen=True, slots=True)
class Source:
    """A shard, or at most BLOCK plain files.

    kind: 'tar', 'parquet' or 'files'. places: paths as they were given, or addresses. root: where relative paths begin.
    key: of what is in it, 16 hexadecimal digits: names, sizes and times of its files.
    """

    kind: str
    places: tuple[str, ...]
    root: str
    key: str


def find_sources(inputs: Sequence[str | Path]) -> list[Source]:
    """What is named -> sources, in the order given; each plain file once, and names as `predict` has them.

    Raises DataError where something is missing, cannot be reached or holds no pictures.
    """
    found: list[Source] = []
    files: list[Found] = []
    seen: set[str] = set()
    for item in inputs:
        for file in _expanded(str(item)):
            if file.place in seen:
                continue
            seen.add(file.place)
            kind = _kind(file.place)
            if kind == "files":
                files.append(file)
                if len(files) == BLOCK:
                    found.append(_source(kind, files))
                    files = []
            else:
                if files:
                    found.append(_source("files", files))
                    files = []
                found.append(_source(kind, [file]))
    if files:
        found.append(_source("files", files))
    if not found:
        raise DataError("no pictures given; name files, folders or patterns")
    return found


def sources_of(paths: Sequence[Path]) -> list[Source]:
    """Pictures of a dataset -> sources: the shards that hold some of them, and blocks of the plain files."""
    shards = dict.fromkeys(inner[0] for path in paths if (inner := shard_of(path)))
    plain = [path for path in paths if shard_of(path) is None]
    found = [_source(_kind(str(shard)), [_found(shard)]) for shard in shards]
    return found + [_source("files", [_found(path) for path in plain[n : n + BLOCK]]) for n in range(0, len(plain), BLOCK)]


def _source(kind: str, files: Sequence[Found]) -> Source:
    text = "".join(f"{file.place}|{file.size}|{file.changed}\n" for file in files)
    key = hashlib.sha256(text.encode(errors="surrogateescape")).hexdigest()[:16]
    return Source(kind, tuple(file.place for file in files), os.getcwd(), key)


def _kind(place: str) -> str:
    name = (place.partition("?")[0] if is_address(place) else place).lower()
    if name.endswith(SUFFIXES) and (is_address(place) or Path(place).is_file()):
        return "tar" if name.endswith(".tar") else "parquet"
    return "files"


def _expanded(item: str) -> list[Found]:
    return _addressed(item) if is_address(item) else _local(item)


def _local(item: str) -> list[Found]:
    path = Path(item)
    if is_shard(path):
        return [_found(path)]
    if path.is_dir():
        shards = [] if _has_pictures(path) else shards_in(path)
        return [_found(each) for each in shards or find_pictures([item])]
    if path.is_file() or shard_of(path):
        return [_found(each) for each in find_pictures([item])]
    import glob

    matches = [Path(check_name(match)) for match in sorted(glob.glob(item, recursive=True)) if Path(match).is_file()]
    if not matches:
        raise DataError(f"{item}: no such file, folder or pattern")
    return [_found(each) for each in matches]


def _has_pictures(folder: Path) -> bool:
    for _, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".")]
        if any(not name.startswith(".") and Path(name).suffix.lower() in PICTURES for name in names):
            return True
    return False


def _found(path: Path) -> Found:
    inner = shard_of(path)
    stat = (inner[0] if inner else path).stat()
    return Found(str(path), stat.st_size, stat.st_mtime_ns)


def _addressed(item: str) -> list[Found]:
    head, _, options = item.partition("?")
    if head.lower().endswith(COMPRESSED):
        raise DataError(f"{item}: compressed, so that no picture can be reached without all before it; store it as plain tar")
    if "*" in head or "[" in head:
        fixed = re.split(r"[*\[]", head, maxsplit=1)[0].rpartition("/")[0]
        pattern = head + (f"?{options}" if options else "")
        known = list_files(fixed + (f"?{options}" if options else ""))
        found = [file for file in known if fnmatch.fnmatchcase(file.place, pattern.replace("?", "[?]"))]
        if not found:
            raise DataError(f"{item}: no file there fits the pattern")
        return found
    listed = list_files(item)
    if len(listed) == 1 and listed[0].place == item:
        return listed
    plain = [file for file in listed if Path(file.place.partition("?")[0]).suffix.lower() in PICTURES]
    found = plain or [file for file in listed if _kind(file.place) != "files"]
    if not found:
        raise DataError(f"{item}: no pictures in this folder")
    return found


def shown(place: str) -> str:
    """A place without the options of its file system, which may hold what nobody else should read."""
    return place.partition("?")[0] if is_address(place) else place


def read_source(source: Source) -> Iterator[tuple[str, bytes | str]]:
    """Name and bytes of each picture, or its name and why it cannot be read; one picture is held at a time.

    A shard that is damaged gives the pictures before the damage, then its own name with the reason.
    Raises DataError where a shard cannot be reached at all.
    """
    if source.kind == "files":
        for place in source.places:
            yield shown(place), _content(place, source.root)
        return
    (place,) = source.places
    name = shown(place)
    with open_file(place if is_address(place) else os.path.join(source.root, place)) as file:
        try:
            for member, data, _ in stream(file, source.kind, name):
                yield f"{name}/{member}", data
        except DataError as error:
            yield name, str(error).removeprefix(f"{name}: ")


def _content(place: str, root: str) -> bytes | str:
    if is_address(place):
        try:
            with open_file(place) as file:
                data = file.read(MAX_BYTES + 1)
        except DataError as error:
            return str(error).removeprefix(f"{place}: ")
        return data if len(data) <= MAX_BYTES else f"more than {MAX_BYTES / 1e6:.0f} MB"
    try:
        return read_bytes(Path(root, place))
    except FileNotFoundError:
        return "no such file"
    except OSError as error:
        return error.strerror or "cannot be read"
