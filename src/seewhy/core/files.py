"""Write files and folders atomically, lock them against other processes, and format JSON and CSV."""

from __future__ import annotations

import errno
import glob
import json
import math
import os
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from filelock import FileLock, Timeout

from seewhy.errors import OutputError

if TYPE_CHECKING:
    import pandas as pd

STALE_S = 86_400  # age of a temporary file whose process must have been killed


@contextmanager
def _output_errors(path: Path, advice: str) -> Iterator[None]:
    """Raise OutputError for any OSError but filelock.Timeout."""
    try:
        yield
    except Timeout:
        raise
    except OSError as error:
        raise OutputError(f"{path}: cannot be written ({error.strerror or error}); {advice}") from error


@contextmanager
def atomic_write(path: Path, advice: str = "choose another path") -> Iterator[Path]:
    """Yield a temporary file to write, then rename it to `path`; on any exception, `path` stays as it was.

    Raises OutputError, ending with `advice`, if the file cannot be written.
    """
    work = path.parent / f".{path.name}-{os.getpid()}"  # not tempfile, whose files only their owner may read
    new_parent = not path.parent.exists()
    with _output_errors(path, advice):
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            _remove_stale_files(path)
            yield work
            fsync_path(work)
            os.replace(work, path)
            fsync_path(path.parent)
        except BaseException:
            with suppress(OSError):
                work.unlink()
            _remove_empty(path.parent, new_parent)
            raise


def _remove_empty(folder: Path, new: bool) -> None:
    """Remove a folder created by this process if nothing is in it."""
    if new:
        with suppress(OSError):
            folder.rmdir()


def acquire_lock(path: Path, advice: str = "choose another --out", wait_s: float = 0) -> Callable[[], None]:
    """Lock `path` for this process, creating its parent folder. Returns the function that releases the lock.

    Release removes the lock file, and the parent folder if it was created here and is empty.
    wait_s: how long to wait for another process; -1: without limit.
    Raises filelock.Timeout if another process holds the lock, OutputError if the folder cannot be written.
    """
    new_parent = not path.parent.exists()
    lock = FileLock(path.parent / f".{path.name}.lock")
    with _output_errors(path, advice):
        path.parent.mkdir(parents=True, exist_ok=True)
        lock.acquire(timeout=wait_s)

    def release() -> None:
        with suppress(OSError):
            Path(lock.lock_file).unlink()
        lock.release()
        _remove_empty(path.parent, new_parent)

    return release


@contextmanager
def locked(path: Path, advice: str = "choose another --out", wait_s: float = 0) -> Iterator[None]:
    """Hold `acquire_lock` for a block. Raises OutputError, ending with `advice`, if another process holds it or `path` is not writable."""
    try:
        release = acquire_lock(path, advice, wait_s)
    except Timeout as error:
        raise OutputError(f"{path}: another process writes it right now; {advice}") from error
    try:
        yield
    finally:
        release()


@contextmanager
def atomic_folder(target: Path, advice: str = "choose another path", durable: bool = True) -> Iterator[Path]:
    """Yield a hidden folder to fill, then rename it to `target`, which must be missing or empty.

    durable: fsync each file first. Raises OutputError, ending with `advice`, if `target` is not empty or cannot be written.
    """
    work = target.parent / f".{target.name}-{os.getpid()}"
    with _output_errors(target, advice):
        try:
            if target.is_symlink() or (target.exists() and (not target.is_dir() or any(target.iterdir()))):
                raise OutputError(f"{target}: exists already; remove it, or {advice}")
            remove_tree(work)
            work.mkdir(parents=True)
            yield work
            move_folder(work, target, durable)
        finally:
            remove_tree(work)


def move_folder(work: Path, target: Path, durable: bool = True) -> None:
    """Rename a folder to `target`, which must be missing or empty."""
    for path in [*work.rglob("*"), work] if durable else ():
        fsync_path(path)
    if target.is_dir():
        target.rmdir()  # raises unless empty
    work.rename(target)
    fsync_path(target.parent)


def _remove_stale_files(path: Path) -> None:
    """Remove temporary files that killed processes left beside `path`."""
    for name in glob.glob(f".{glob.escape(path.name)}-*", root_dir=path.parent):
        stale = path.parent / name
        with suppress(OSError, ValueError):
            int(name.rpartition("-")[2])  # a process id
            if time.time() - stale.stat().st_mtime > STALE_S:
                stale.unlink()


def nan_to_none(content: Any) -> Any:
    """Replace nan and infinities, which JSON lacks, by None at any depth."""
    if isinstance(content, float):
        return content if math.isfinite(content) else None
    if isinstance(content, dict):
        return {name: nan_to_none(value) for name, value in content.items()}
    if isinstance(content, list | tuple):
        return [nan_to_none(value) for value in content]
    return content


def write_json(path: Path, content: Any) -> None:
    """Write indented JSON, with None for nan and infinities."""
    path.write_text(json.dumps(nan_to_none(content), indent=1, ensure_ascii=False, allow_nan=False) + "\n", encoding="utf-8")


def remove_tree(path: Path) -> None:
    """Remove a folder if it exists."""
    shutil.rmtree(path, ignore_errors=True)


def fsync_path(path: Path) -> None:
    """Flush a file, or the names in a folder, to the disk; else a rename may survive a power cut and the content not."""
    if path.is_dir() and os.name == "nt":  # Windows flushes names itself and cannot open folders
        return
    descriptor = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if not path.is_dir() or error.errno not in (errno.EINVAL, errno.ENOTSUP):  # some file systems do not sync folders
            raise
    finally:
        os.close(descriptor)


def escape_formula(cell: Any) -> Any:
    """Prefix text that a spreadsheet would run as a formula with an apostrophe.

    Source: OWASP, "CSV Injection".
    """
    return f"'{cell}" if isinstance(cell, str) and cell.startswith(("=", "+", "-", "@", "\t", "\r")) else cell


def escape_formula_path(name: str) -> str:
    """`escape_formula` for a path, which stays valid: `-x.jpg` becomes `./-x.jpg`."""
    return f"./{name}" if escape_formula(name) != name else name


def csv_text(table: pd.DataFrame) -> str:
    """A table as CSV with formulas escaped; columns whose name begins with `path` hold paths."""
    safe = table.copy()
    for name in safe.columns:
        safe[name] = safe[name].map(escape_formula_path if str(name).startswith("path") else escape_formula)
    return str(safe.to_csv(index=False))
