"""Read, list and write files by path or address: s3://, gs://, hdfs://, file:// and all that fsspec supports."""

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
    """Whether this process runs on a machine or service of Amazon's."""
    with suppress(OSError, ValueError):
        return bool(os.environ.get("AWS_EXECUTION_ENV")) or vendor.read_text().startswith("Amazon")
    return False


@dataclass(frozen=True, slots=True)
class FileInfo:
    """A file. path: or address. size: in bytes. mtime_ns: modification time in nanoseconds, 0 if unknown."""

    path: str
    size: int
    mtime_ns: int


def is_address(path: str | Path) -> bool:
    """Whether a path is an address, SCHEME://..."""
    return "://" in str(path)


def without_options(path: str) -> str:
    """An address without the ?options of its file system, which may hold secrets; a path as it is."""
    return path.partition("?")[0] if is_address(path) else path


def _split_address(address: str) -> tuple[str, str, str]:
    """SCHEME://HOST, /path, ?options (of the file system: region=, endpoint_override= for s3)."""
    head, _, options = address.partition("?")
    scheme, _, rest = head.partition("://")
    host, slash, path = rest.partition("/")
    return f"{scheme}://{host}", slash + path, f"?{options}" if options else ""


@lru_cache(maxsize=64)
def _file_system(root: str, options: str) -> tuple[Any, str]:
    """File system of SCHEME://HOST, and the prefix of its paths."""
    from pyarrow import ArrowException, fs

    url = root if root.partition("://")[2] else f"{root}/"
    if root.startswith(("gs://", "gcs://")) and "retry_limit_seconds" not in options:
        options += ("&" if options else "?") + "retry_limit_seconds=20"  # the client's default is 15 minutes
    try:
        # Outside of Amazon, the client would wait minutes for the metadata service.
        with environment(AWS_EC2_METADATA_DISABLED="false" if in_amazon() else "true"):
            system, prefix = fs.FileSystem.from_uri(url + options)
    except (ArrowException, ValueError) as error:  # not a scheme of pyarrow
        if options and root.startswith(("http://", "https://")):
            raise DataError(f"{root}: ?options are not supported for web servers; remove them, or download the files") from error
        try:
            import fsspec

            keywords = {name: {"true": True, "false": False}.get(value, value) for name, value in parse_qsl(options[1:], True)}
            fsspec_system, prefix = fsspec.core.url_to_fs(url, **keywords)
        except (ImportError, ValueError):
            reason = reason_of(error).partition("?")[0]
            raise DataError(f"{root}: unknown kind of address ({reason}); use a path, s3://, gs://, hdfs:// or file://") from error
        except TypeError as type_error:
            raise DataError(f"{root}: unsupported ?options ({reason_of(type_error)}); correct them") from type_error
        system = fs.PyFileSystem(fs.FSSpecHandler(fsspec_system))
    return system, prefix.rstrip("/")


@contextmanager
def _file_system_errors(path: str, kind: type[DataError] | type[OutputError] = DataError) -> Iterator[None]:
    """Raise errors of file systems as `kind`."""
    path = without_options(path)
    try:
        yield
    except FileNotFoundError as error:
        raise kind(f"{path}: no such file or folder") from error
    except (OSError, ImportError) as error:
        raise kind(f"{path}: cannot be reached ({reason_of(error)}); check the address, the network and your credentials") from error


def _open_address(address: str) -> tuple[Any, str, str]:
    """File system, path in it, and SCHEME://HOST."""
    root, path, options = _split_address(address)
    system, prefix = _file_system(root, options)
    return system, prefix + path, root


def list_files(path: str) -> list[FileInfo]:
    """The file, or all files in and below the folder, sorted, without hidden ones. Raises DataError."""
    if not is_address(path):
        return _list_local(Path(path))
    from pyarrow import fs

    with _file_system_errors(path):
        system, top, root = _open_address(path)
        options = _split_address(path)[2]
        prefix = _file_system(root, options)[1]
        info = system.get_file_info(top.rstrip("/") or "/")
        if info.type == fs.FileType.NotFound:
            raise FileNotFoundError(path)
        infos = [info] if info.type == fs.FileType.File else system.get_file_info(fs.FileSelector(info.path, recursive=True))
        files = []
        for info in infos:
            address = root + (info.path.removeprefix(prefix) if prefix else f"/{info.path.lstrip('/')}") + options
            below = info.path.removeprefix(top.rstrip("/"))
            if info.type == fs.FileType.File and not any(part.startswith(".") for part in below.split("/")):
                files.append(FileInfo(address, info.size or 0, info.mtime_ns or 0))
    return sorted(files, key=lambda file: file.path)


def _list_local(path: Path) -> list[FileInfo]:
    files = [path] if path.is_file() else []
    for directory, folders, names in os.walk(path):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        files += (file for name in sorted(names) if not name.startswith(".") and (file := Path(directory, name)).is_file())
    return [FileInfo(str(file), status.st_size, status.st_mtime_ns) for file in files for status in [file.stat()]]


def _open_unbuffered(path: str) -> tuple[Any, int]:
    """An open file, which the caller closes, and its size in bytes."""
    if not is_address(path):
        local = io.FileIO(path)
        return local, os.fstat(local.fileno()).st_size
    system, inner, _ = _open_address(path)
    file = system.open_input_file(inner)
    return file, file.size()


@contextmanager
def open_file(path: str, buffer_bytes: int = 0) -> Iterator[BinaryIO]:
    """Open a file for reading, seekable. buffer_bytes: read at a time, for small forward steps; 0: unbuffered.

    Raises DataError if the file is unreadable, StorageUnavailableError if storage fails on opening or reading.
    """
    name = without_options(path)
    try:
        raw, size = with_retries(partial(_open_unbuffered, path), name)
    except OSError as error:
        raise DataError(f"{name}: {permanent_failure(error)}; check the path and its permissions") from error
    file = RetryingFile(raw, size, name)
    with io.BufferedReader(file, buffer_bytes) if buffer_bytes else file as opened:
        yield cast(BinaryIO, opened)


def read_file(path: str, max_bytes: int) -> bytes:
    """Read at most the first `max_bytes` of a file. Raises OSError for permanent failures, else StorageUnavailableError."""

    def read() -> bytes:
        raw, size = _open_unbuffered(path)
        with raw as file:
            data: bytes = file.read(min(size, max_bytes))
        if len(data) < min(size, max_bytes):
            raise OSError(errno.EIO, "file is shorter than its size")
        return data

    return with_retries(read, without_options(path))


def write_atomic(path: str, data: bytes) -> None:
    """Write a whole file or nothing. Raises OutputError."""
    if not is_address(path):
        with atomic_write(Path(path), "choose another --out") as local:
            local.write_bytes(data)
        return
    from pyarrow import fs

    with _file_system_errors(path, OutputError):
        system, target, root = _open_address(path)
        work = target
        if not root.startswith(("s3://", "gs://", "gcs://")):  # objects appear only when they are closed
            folder, _, name = target.rpartition("/")
            if folder and system.get_file_info(folder).type == fs.FileType.NotFound:
                system.create_dir(folder, recursive=True)
            work = f"{folder}/.{name}-{os.getpid()}"
        with system.open_output_stream(work) as file:
            file.write(data)
        if work != target:
            system.move(work, target)


def list_names(folder: str) -> list[str]:
    """Sorted names of the files in a folder, [] if it is missing. Raises DataError if it cannot be reached."""
    if not is_address(folder):
        return sorted(entry.name for entry in os.scandir(folder) if entry.is_file()) if Path(folder).is_dir() else []
    from pyarrow import fs

    with _file_system_errors(folder):
        system, path, _ = _open_address(folder)
        infos = system.get_file_info(fs.FileSelector(path.rstrip("/"), allow_not_found=True))
        return sorted(info.base_name for info in infos if info.type == fs.FileType.File)


def join_path(folder: str, name: str) -> str:
    """Path or address of a file in a folder."""
    head, _, options = folder.partition("?") if is_address(folder) else (folder, "", "")
    return f"{head.rstrip('/')}/{name}" + (f"?{options}" if options else "")


def remove_file(path: str) -> None:
    """Remove a file if it exists."""
    if not is_address(path):
        Path(path).unlink(missing_ok=True)
        return
    with _file_system_errors(path, OutputError):
        system, inner, _ = _open_address(path)
        with suppress(FileNotFoundError):
            system.delete_file(inner)
