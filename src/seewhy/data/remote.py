"""A path or an address (s3://bucket/x, gs://, hdfs://, file://, whatever fsspec knows) -> what lies there, opened or written whole."""

from __future__ import annotations

import errno
import io
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, BinaryIO, cast
from urllib.parse import parse_qsl

from seewhy.core.files import atomic_write
from seewhy.core.process_state import environment
from seewhy.core.retry import RetryingFile, permanent_failure, with_retries
from seewhy.errors import DataError, OutputError, reason_of


def in_amazon(vendor: Path = Path("/sys/class/dmi/id/sys_vendor")) -> bool:
    """Whether this machine, or what runs this process, is Amazon's."""
    with suppress(OSError, ValueError):
        return bool(os.environ.get("AWS_EXECUTION_ENV")) or vendor.read_text().startswith("Amazon")
    return False


@dataclass(frozen=True, slots=True)
class Found:
    """A file. place: its path or address. size: in bytes. changed: its time, in nanoseconds, 0 where none is told."""

    place: str
    size: int
    changed: int


def is_address(place: str | Path) -> bool:
    """Whether it names a file system of its own: SCHEME://..."""
    return "://" in str(place)


def shown(place: str) -> str:
    """A place without the options of its file system, which may hold what nobody else should read."""
    return place.partition("?")[0] if is_address(place) else place


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
        # Outside of Amazon its client would wait minutes for the address that gives Amazon's machines their credentials.
        with environment(AWS_EC2_METADATA_DISABLED="false" if in_amazon() else "true"):
            found, base = fs.FileSystem.from_uri(asked + options)
    except (ArrowException, ValueError) as error:  # a scheme that pyarrow does not know
        if options and root.startswith(("http://", "https://")):
            raise DataError(f"{root}: a web server's addresses take no ?options here; leave them out, or download the files") from error
        try:
            import fsspec

            given = {name: {"true": True, "false": False}.get(value, value) for name, value in parse_qsl(options[1:], True)}
            other, base = fsspec.core.url_to_fs(asked, **given)
        except (ImportError, ValueError):
            why = reason_of(error).partition("?")[0]
            raise DataError(f"{root}: no known kind of address ({why}); use a path, s3://, gs://, hdfs:// or file://") from error
        except TypeError as refused:
            raise DataError(f"{root}: its file system does not take these ?options ({reason_of(refused)}); correct them") from refused
        found = fs.PyFileSystem(fs.FSSpecHandler(other))
    return found, base.rstrip("/")


@contextmanager
def _reaching(place: str, kind: type[DataError] | type[OutputError] = DataError) -> Iterator[None]:
    """What file systems raise -> one line, without the address's options, which may hold what nobody else should read."""
    place = shown(place)
    try:
        yield
    except FileNotFoundError as error:
        raise kind(f"{place}: no such file or folder") from error
    except (OSError, ImportError) as error:
        raise kind(f"{place}: cannot be reached ({reason_of(error)}); check the address, the network and your credentials") from error


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


def _raw(place: str) -> tuple[Any, int]:
    """A file without a buffer, for the caller to close, and its size."""
    if not is_address(place):
        local = io.FileIO(place)
        return local, os.fstat(local.fileno()).st_size
    system, path, _ = _opened(place)
    file = system.open_input_file(path)
    return file, file.size()


@contextmanager
def open_file(place: str, ahead: int = 0) -> Iterator[BinaryIO]:
    """A file to read, seekable. ahead: bytes to read at a time, for those who go forwards in small steps; 0: what is asked for.

    Raises DataError where it is no file that can be read, StorageUnavailableError where the way to it fails, now or while it is read.
    """
    try:
        raw, size = with_retries(partial(_raw, place), shown(place))
    except OSError as error:
        raise DataError(f"{shown(place)}: {permanent_failure(error)}; leave it out, or see to it that you may read it") from error
    file = RetryingFile(raw, size, shown(place))
    with io.BufferedReader(file, ahead) if ahead else file as opened:
        yield cast(BinaryIO, opened)


def read_file(place: str, most: int) -> bytes:
    """Read a file's first bytes, at most so many; OSError for its own failure (`permanent_failure`), else StorageUnavailableError."""

    def read() -> bytes:
        raw, size = _raw(place)
        with raw as file:
            data: bytes = file.read(min(size, most))
        if len(data) < min(size, most):
            raise OSError(errno.EIO, "it ends before its size")
        return data

    return with_retries(read, shown(place))


def write_whole(place: str, data: bytes) -> None:
    """A file of these bytes, there whole or not at all. Raises OutputError."""
    if not is_address(place):
        with atomic_write(Path(place), "choose another --out") as work:
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
