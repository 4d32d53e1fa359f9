"""A path or an address (s3://bucket/x, gs://, hdfs://, file://, whatever fsspec knows) -> what lies there, opened or written whole."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, BinaryIO, cast

from seewhy.errors import DataError, OutputError, one_line
from seewhy.writing import whole_file

# A cloud's own clients wait minutes for the address that gives machines in that cloud their credentials.
os.environ.setdefault("AWS_EC2_METADATA_DISABLED", "true" if not os.environ.get("AWS_EXECUTION_ENV") else "false")


@dataclass(frozen=True)
class Found:
    """A file. place: its path or address. size: in bytes. changed: its time, in nanoseconds, 0 where none is told."""

    place: str
    size: int
    changed: int


def is_address(place: str | Path) -> bool:
    """Whether it names a file system of its own: SCHEME://..."""
    return "://" in str(place)


def _divided(address: str) -> tuple[str, str, str]:
    """SCHEME://HOST, /what/follows, ?options (of the file system: region=, endpoint_override= for s3)."""
    head, _, options = address.partition("?")
    scheme, _, rest = head.partition("://")
    host, slash, path = rest.partition("/")
    return f"{scheme}://{host}", slash + path, f"?{options}" if options else ""


@lru_cache(maxsize=64)
def _system(root: str, options: str) -> tuple[Any, str]:
    """The file system behind SCHEME://HOST, and what its paths begin with."""
    from pyarrow import ArrowException, fs

    asked = root if root.partition("://")[2] else f"{root}/"
    if root.startswith(("gs://", "gcs://")) and "retry_limit_seconds" not in options:
        options += ("&" if options else "?") + "retry_limit_seconds=20"  # the client's own limit is a quarter of an hour
    try:
        found, base = fs.FileSystem.from_uri(asked + options)
    except (ArrowException, ValueError) as error:  # a scheme that pyarrow does not know
        try:
            import fsspec

            other, base = fsspec.core.url_to_fs(asked)
        except (ImportError, ValueError):
            raise DataError(f"{root}: no known kind of address ({_reason(error)}); use a path, s3://, gs://, hdfs:// or file://") from error
        found = fs.PyFileSystem(fs.FSSpecHandler(other))
    return found, base.rstrip("/")


def _reason(error: BaseException) -> str:
    return one_line(" ".join(str(error).split()) or type(error).__name__)[:160]


@contextmanager
def _reaching(place: str, kind: type[DataError] | type[OutputError] = DataError) -> Iterator[None]:
    """What file systems raise -> one line, without the address's options, which may hold what nobody else should read."""
    place = place.partition("?")[0] if is_address(place) else place
    try:
        yield
    except FileNotFoundError as error:
        raise kind(f"{place}: no such file or folder") from error
    except (OSError, ImportError) as error:
        raise kind(f"{place}: cannot be reached ({_reason(error)}); check the address, the network and your credentials") from error


def _opened(address: str) -> tuple[Any, str, str]:
    """File system, path in it, and what stands before its paths in an address."""
    root, path, options = _divided(address)
    system, base = _system(root, options)
    return system, base + path, root


def list_files(place: str) -> list[Found]:
    """The file, or all files in and below the folder, sorted; hidden ones are passed over. Raises DataError."""
    if not is_address(place):
        return _list_local(Path(place))
    from pyarrow import fs

    with _reaching(place):
        system, path, root = _opened(place)
        options = _divided(place)[2]
        base = _system(root, options)[1]
        info = system.get_file_info(path.rstrip("/") or "/")
        if info.type == fs.FileType.NotFound:
            raise FileNotFoundError(place)
        infos = [info] if info.type == fs.FileType.File else system.get_file_info(fs.FileSelector(info.path, recursive=True))
        found = []
        for info in infos:
            inside = info.path.removeprefix(base) if base else f"/{info.path.lstrip('/')}"
            below = info.path.removeprefix(path.rstrip("/"))
            if info.type == fs.FileType.File and not any(part.startswith(".") for part in below.split("/")):
                found.append(Found(root + inside + options, info.size or 0, info.mtime_ns or 0))
    return sorted(found, key=lambda file: file.place)


def _list_local(path: Path) -> list[Found]:
    if path.is_file():
        stat = path.stat()
        return [Found(str(path), stat.st_size, stat.st_mtime_ns)]
    found = []
    for directory, folders, names in os.walk(path):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in sorted(names):
            file = Path(directory, name)
            if not name.startswith(".") and file.is_file():
                stat = file.stat()
                found.append(Found(str(file), stat.st_size, stat.st_mtime_ns))
    return found


@contextmanager
def open_file(place: str) -> Iterator[BinaryIO]:
    """A file to read, seekable. Raises DataError where it cannot be opened."""
    if not is_address(place):
        with _reaching(place):
            file: Any = open(place, "rb")  # noqa: SIM115  # closed below, where what the caller raises is not taken for ours
    else:
        with _reaching(place):
            system, path, _ = _opened(place)
            file = system.open_input_file(path)
    with file:
        yield cast(BinaryIO, file)


def write_whole(place: str, data: bytes) -> None:
    """A file of these bytes, there whole or not at all. Raises OutputError."""
    if not is_address(place):
        with whole_file(Path(place), "choose another --out") as work:
            work.write_bytes(data)
        return
    from pyarrow import fs

    with _reaching(place, OutputError):
        system, path, root = _opened(place)
        if root.startswith(("s3://", "gs://", "gcs://")):  # an object is there when it is closed, not before
            with system.open_output_stream(path) as file:
                file.write(data)
            return
        folder = path.rpartition("/")[0]
        if folder and system.get_file_info(folder).type == fs.FileType.NotFound:
            system.create_dir(folder, recursive=True)
        work_path = f"{folder}/.{path.rpartition('/')[2]}-{os.getpid()}"
        with system.open_output_stream(work_path) as file:
            file.write(data)
        system.move(work_path, path)


def names_in(folder: str) -> list[str]:
    """Names of the files in a folder, [] where there is no such folder. Raises DataError where it cannot be reached."""
    if not is_address(folder):
        return sorted(entry.name for entry in os.scandir(folder) if entry.is_file()) if Path(folder).is_dir() else []
    from pyarrow import fs

    with _reaching(folder):
        system, path, _ = _opened(folder)
        infos = system.get_file_info(fs.FileSelector(path.rstrip("/"), allow_not_found=True))
        return sorted(info.base_name for info in infos if info.type == fs.FileType.File)


def inside(folder: str, name: str) -> str:
    """A file's place in a folder."""
    head, _, options = folder.partition("?") if is_address(folder) else (folder, "", "")
    return f"{head.rstrip('/')}/{name}" + (f"?{options}" if options else "")


def remove_file(place: str) -> None:
    """Away with a file; one that is not there is no mistake."""
    if not is_address(place):
        Path(place).unlink(missing_ok=True)
        return
    with _reaching(place, OutputError):
        system, path, _ = _opened(place)
        with suppress(FileNotFoundError):
            system.delete_file(path)
