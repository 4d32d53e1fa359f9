"""Split files, folders, shards, patterns and addresses into sources: bounded units of work that any machine can read."""

from __future__ import annotations

import fnmatch
import glob
import hashlib
import itertools
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from seewhy.core.parallel import batched
from seewhy.core.retry import DENIED, permanent_failure, with_retries
from seewhy.data.decode import read_bytes
from seewhy.data.listing import check_name, find_images, mixed_folder_error, shards_or_images
from seewhy.data.remote import FileInfo, is_address, list_files, open_file, read_file, without_options
from seewhy.data.shard_index import IMAGES, MAX_BYTES
from seewhy.data.shards import COMPRESSED, SUFFIXES, is_shard, shard_of, stream
from seewhy.errors import DataError, StorageUnavailableError

FILES_PER_SOURCE = 1024
ASSUMED_IMAGES = 1_000_000  # of a shard that has not been read yet
MANIFEST = "_seewhy.json"  # marks a folder of results, whose parquet parts are not shards of images
TAR_READ_AHEAD = 8_000_000  # bytes; each read of a remote file is a request


@dataclass(frozen=True, slots=True)
class Source:
    """A shard, or at most FILES_PER_SOURCE plain files.

    kind: 'tar', 'parquet' or 'files'. paths: as given, or addresses. root: folder that relative paths start from.
    key: 16 hexadecimal digits, a hash of the names, sizes and modification times of its files.
    """

    kind: str
    paths: Sequence[str]
    root: str
    key: str


def find_sources(inputs: Sequence[str | Path]) -> list[Source]:
    """Return the sources of all inputs, in the order given; each plain file once, named as `predict` names it.

    Raises DataError if an input is missing, cannot be reached or holds no images.
    """
    seen: set[str] = set()

    def list_unique() -> Iterator[FileInfo]:
        for item in map(str, inputs):
            for file in _list_remote(item) if is_address(item) else _list_local(item):
                if file.path not in seen:
                    if len(inputs) > 1:  # a single input names nothing twice
                        seen.add(file.path)
                    yield file

    runs = itertools.groupby(list_unique(), lambda file: _kind(file.path))
    blocks = ((kind, block) for kind, files in runs for block in batched(files, FILES_PER_SOURCE if kind == "files" else 1))
    sources = [_make_source(kind, block) for kind, block in blocks]
    if not sources:
        raise DataError("no images given; name files, folders or patterns")
    return sources


def sources_from_paths(paths: Sequence[Path]) -> list[Source]:
    """Return the sources of a dataset's images: the shards that hold some of them, then blocks of the plain files."""
    shards = dict.fromkeys(inner[0] for path in paths if (inner := shard_of(path)))
    blocks = batched((_stat(path) for path in paths if shard_of(path) is None), FILES_PER_SOURCE)
    return [*(_make_source(_kind(str(shard)), [_stat(shard)]) for shard in shards), *(_make_source("files", block) for block in blocks)]


def _make_source(kind: str, files: Sequence[FileInfo]) -> Source:
    text = "".join(f"{file.path}|{file.size}|{file.mtime_ns}\n" for file in files)
    key = hashlib.sha256(text.encode(errors="surrogateescape")).hexdigest()[:16]
    return Source(kind, [file.path for file in files], os.getcwd(), key)


def _kind(path: str) -> str:
    name = without_options(path).lower()
    if name.endswith(SUFFIXES) and (is_address(path) or Path(path).is_file()):
        return "tar" if name.endswith(".tar") else "parquet"
    return "files"


def _list_local(item: str) -> Iterable[FileInfo]:
    path = Path(item)
    if is_shard(path):
        return [_stat(path)]
    if path.is_dir():
        shards, _ = shards_or_images(path)
        return map(_stat, shards or find_images([item]))
    if path.is_file() or shard_of(path):
        return map(_stat, find_images([item]))
    matches = sorted({check_name(match) for match in glob.iglob(item, recursive=True) if os.path.isfile(match)})
    if not matches:
        raise DataError(f"{item}: no such file, folder or pattern")
    return map(_stat, map(Path, matches))


def _stat(path: Path) -> FileInfo:
    """Return size and modification time of a file; zeros for a broken link, which fails when it is read."""
    inner = shard_of(path)
    try:
        stat = (inner[0] if inner else path).stat()
    except OSError:
        return FileInfo(str(path), 0, 0)
    return FileInfo(str(path), stat.st_size, stat.st_mtime_ns)


def _list_remote(item: str) -> list[FileInfo]:
    head, _, options = item.partition("?")
    if head.lower().endswith(COMPRESSED):
        raise DataError(f"{item}: compressed, so no image can be read without all before it; store it as plain tar")
    if "*" in head or "[" in head:
        folder = re.split(r"[*\[]", head, maxsplit=1)[0].rpartition("/")[0]
        suffix = f"?{options}" if options else ""
        pattern = (head + suffix).replace("?", "[?]")
        files = [file for file in list_files(folder + suffix) if fnmatch.fnmatchcase(file.path, pattern)]
        if not files:
            raise DataError(f"{item}: no file matches the pattern")
        return files
    files = list_files(item)
    if len(files) == 1 and files[0].path == item:
        return files
    result_folders = {_folder(file) for file in files if without_options(file.path).endswith(f"/{MANIFEST}")}
    plain = [file for file in files if Path(without_options(file.path)).suffix.lower() in IMAGES]
    shards = [file for file in files if _kind(file.path) != "files" and _folder(file) not in result_folders]
    if plain and shards:
        folder = without_options(item)
        raise mixed_folder_error(folder, *(without_options(f[0].path).removeprefix(folder).lstrip("/") for f in (shards, plain)))
    if not plain and not shards:
        raise DataError(f"{without_options(item)}: no images in this folder")
    return plain or shards


def _folder(file: FileInfo) -> str:
    return without_options(file.path).rpartition("/")[0]


def read_source(source: Source) -> Iterator[tuple[str, bytes | str]]:
    """Yield the name and bytes of each image, or its name and why it cannot be read; one image is in memory at a time.

    A damaged shard yields the images before the damage, then its own name with the reason.
    Raises DataError if a shard cannot be opened, StorageUnavailableError if storage cannot be read at the moment.
    """
    if source.kind == "files":
        yield from _read_files(source)
        return
    (path,) = source.paths
    name = without_options(path)
    with open_file(path if is_address(path) else os.path.join(source.root, path), TAR_READ_AHEAD if source.kind == "tar" else 0) as file:
        try:
            for member, data, _ in stream(file, source.kind, name):
                yield f"{name}/{member}", data
        except DataError as error:
            yield name, str(error).removeprefix(f"{name}: ")


def _read_files(source: Source) -> Iterator[tuple[str, bytes | str]]:
    """Read plain files; access denied to all of them, or to one read before, means that the credentials have expired."""
    last_read, denied = "", 0
    for path in source.paths:
        content = _read_image(path, source.root)
        if content == DENIED and is_address(path):
            denied += 1
            if (last_read and _read_image(last_read, source.root) == DENIED) or denied == len(source.paths) > 1:
                raise StorageUnavailableError(
                    f"{without_options(path)}: {DENIED}, as for the files beside it; renew your credentials and re-run to resume"
                )
        elif isinstance(content, bytes):
            last_read = path
        yield without_options(path), content


def _read_image(path: str, root: str) -> bytes | str:
    """Return an image's bytes, or why its file cannot be read. Raises StorageUnavailableError."""
    try:
        if not is_address(path):
            return with_retries(partial(read_bytes, Path(root, path)), path)
        data = read_file(path, MAX_BYTES + 1)
        return data if len(data) <= MAX_BYTES else f"more than {MAX_BYTES / 1e6:.0f} MB"
    except OSError as error:
        return permanent_failure(error)
    except DataError as error:  # from the shard that the path points into
        return str(error)


class FailureCounter:
    """Count the workers that died at each source: a Ray actor, in a module without torch to stay small."""

    def __init__(self) -> None:
        self.started: dict[int, int] = {}

    def begin(self, number: int, survived: int | None) -> int:
        """Return how many workers died at source `number`. survived: the source that this worker finished before, if any."""
        if survived is not None:
            self.started.pop(survived, None)
        deaths = self.started.get(number, 0)
        self.started[number] = deaths + 1
        return deaths
