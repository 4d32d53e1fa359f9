"""Files, folders, shards, patterns and addresses -> Sources: pieces of work of bounded size, each readable by itself anywhere."""

from __future__ import annotations

import fnmatch
import hashlib
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from seewhy.core.retry import DENIED, permanent_failure, with_retries
from seewhy.data.decode import read_bytes
from seewhy.data.listing import check_name, find_images, mixed_folder_error, shards_or_images
from seewhy.data.remote import FileInfo, is_address, list_files, open_file, read_file, without_options
from seewhy.data.shard_index import IMAGES, MAX_BYTES
from seewhy.data.shards import COMPRESSED, SUFFIXES, is_shard, shard_of, stream
from seewhy.errors import DataError, StorageUnavailableError

BLOCK = 1024  # plain files that are one source
RECORD = "_seewhy.json"  # stands in a folder of answers, whose parts are no shards
AHEAD = 8_000_000  # bytes of a tar that are read at a time: each read of a cloud's file is a request


@dataclass(frozen=True, slots=True)
class Source:
    """A shard, or at most BLOCK plain files.

    kind: 'tar', 'parquet' or 'files'. places: paths as they were given, or addresses. root: where relative paths begin.
    key: of what is in it, 16 hexadecimal digits: names, sizes and times of its files.
    """

    kind: str
    places: Sequence[str]
    root: str
    key: str


def find_sources(inputs: Sequence[str | Path]) -> list[Source]:
    """What is named -> sources, in the order given; each plain file once, and names as `predict` has them.

    Raises DataError where something is missing, cannot be reached or holds no images.
    """
    found: list[Source] = []
    files: list[FileInfo] = []
    seen: set[str] = set()
    for item in map(str, inputs):
        for file in _addressed(item) if is_address(item) else _local(item):
            if file.path in seen:
                continue
            if len(inputs) > 1:  # one alone names nothing twice
                seen.add(file.path)
            kind = _kind(file.path)
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
        raise DataError("no images given; name files, folders or patterns")
    return found


def sources_of(paths: Sequence[Path]) -> list[Source]:
    """Images of a dataset -> sources: the shards that hold some of them, and blocks of the plain files."""
    shards = dict.fromkeys(inner[0] for path in paths if (inner := shard_of(path)))
    plain = [path for path in paths if shard_of(path) is None]
    found = [_source(_kind(str(shard)), [_found(shard)]) for shard in shards]
    return found + [_source("files", [_found(path) for path in plain[n : n + BLOCK]]) for n in range(0, len(plain), BLOCK)]


def _source(kind: str, files: Sequence[FileInfo]) -> Source:
    text = "".join(f"{file.path}|{file.size}|{file.mtime_ns}\n" for file in files)
    key = hashlib.sha256(text.encode(errors="surrogateescape")).hexdigest()[:16]
    return Source(kind, [file.path for file in files], os.getcwd(), key)


def _kind(place: str) -> str:
    name = (place.partition("?")[0] if is_address(place) else place).lower()
    if name.endswith(SUFFIXES) and (is_address(place) or Path(place).is_file()):
        return "tar" if name.endswith(".tar") else "parquet"
    return "files"


def _local(item: str) -> Iterable[FileInfo]:
    path = Path(item)
    if is_shard(path):
        return [_found(path)]
    if path.is_dir():
        shards, _ = shards_or_images(path)
        return map(_found, shards or find_images([item]))
    if path.is_file() or shard_of(path):
        return map(_found, find_images([item]))
    import glob

    matches = sorted({check_name(match) for match in glob.iglob(item, recursive=True) if os.path.isfile(match)})
    if not matches:
        raise DataError(f"{item}: no such file, folder or pattern")
    return map(_found, map(Path, matches))


def _found(path: Path) -> FileInfo:
    """A file as it is now; a link that leads nowhere is an image that cannot be read, which reading it will say."""
    inner = shard_of(path)
    try:
        stat = (inner[0] if inner else path).stat()
    except OSError:
        return FileInfo(str(path), 0, 0)
    return FileInfo(str(path), stat.st_size, stat.st_mtime_ns)


def _addressed(item: str) -> list[FileInfo]:
    head, _, options = item.partition("?")
    if head.lower().endswith(COMPRESSED):
        raise DataError(f"{item}: compressed, so that no image can be reached without all before it; store it as plain tar")
    if "*" in head or "[" in head:
        fixed = re.split(r"[*\[]", head, maxsplit=1)[0].rpartition("/")[0]
        pattern = head + (f"?{options}" if options else "")
        known = list_files(fixed + (f"?{options}" if options else ""))
        found = [file for file in known if fnmatch.fnmatchcase(file.path, pattern.replace("?", "[?]"))]
        if not found:
            raise DataError(f"{item}: no file there fits the pattern")
        return found
    listed = list_files(item)
    if len(listed) == 1 and listed[0].path == item:
        return listed
    answers = {_folder(file) for file in listed if without_options(file.path).endswith(f"/{RECORD}")}
    plain = [file for file in listed if Path(without_options(file.path)).suffix.lower() in IMAGES]
    shards = [file for file in listed if _kind(file.path) != "files" and _folder(file) not in answers]
    if plain and shards:
        folder = without_options(item)
        raise mixed_folder_error(folder, *(without_options(f[0].path).removeprefix(folder).lstrip("/") for f in (shards, plain)))
    if not plain and not shards:
        raise DataError(f"{without_options(item)}: no images in this folder")
    return plain or shards


def _folder(file: FileInfo) -> str:
    return without_options(file.path).rpartition("/")[0]


def read_source(source: Source) -> Iterator[tuple[str, bytes | str]]:
    """Name and bytes of each image, or its name and why it cannot be read; one image is held at a time.

    A shard that is damaged gives the images before the damage, then its own name with the reason.
    Raises DataError where a shard cannot be opened, StorageUnavailableError where what is there cannot be read at the moment.
    """
    if source.kind == "files":
        yield from _plain(source)
        return
    (place,) = source.places
    name = without_options(place)
    whole = place if is_address(place) else os.path.join(source.root, place)
    with open_file(whole, AHEAD if source.kind == "tar" else 0) as file:
        try:
            for member, data, _ in stream(file, source.kind, name):
                yield f"{name}/{member}", data
        except DataError as error:
            yield name, str(error).removeprefix(f"{name}: ")


def _plain(source: Source) -> Iterator[tuple[str, bytes | str]]:
    """Images in files. A cloud may say 'denied' of one; where it says so of all, or of one read before, credentials have ended."""
    read, denied = "", 0
    for place in source.places:
        content = _content(place, source.root)
        if content == DENIED and is_address(place):
            denied += 1
            if (read and _content(read, source.root) == DENIED) or denied == len(source.places) > 1:
                raise StorageUnavailableError(
                    f"{without_options(place)}: {DENIED}, as for others beside it; renew your credentials, and the same command goes on"
                )
        elif isinstance(content, bytes):
            read = place
        yield without_options(place), content


def _content(place: str, root: str) -> bytes | str:
    """An image's bytes, or what is wrong with its file. Raises StorageUnavailableError."""
    try:
        if not is_address(place):
            return with_retries(partial(read_bytes, Path(root, place)), place)
        data = read_file(place, MAX_BYTES + 1)
        return data if len(data) <= MAX_BYTES else f"more than {MAX_BYTES / 1e6:.0f} MB"
    except OSError as error:
        return permanent_failure(error)
    except DataError as error:  # of the shard that a path leads into
        return str(error)


class FailureCounter:
    """Counts how often a source was begun by workers that then began no other: an actor of Ray's, without torch, so that it is small."""

    def __init__(self) -> None:
        self.begun: dict[int, int] = {}

    def begin(self, number: int, survived: int | None) -> int:
        """How many workers a source has cost. survived: what the worker that now begins it has done before, if anything."""
        if survived is not None:
            self.begun.pop(survived, None)
        cost = self.begun.get(number, 0)
        self.begun[number] = cost + 1
        return cost
