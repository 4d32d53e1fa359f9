"""Path -> a work file beside it, which takes its place when all of it is written and on the disk; what two processes must not write."""

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

LEFT_OVER_S = 86_400  # a work file that nobody has written to for so long belongs to a process that was killed


@contextmanager
def atomic_write(path: Path, advice: str = "choose another place") -> Iterator[Path]:
    """Where to write; `path` is there afterwards, whole, and as it was before if anything is raised.

    Raises OutputError, which ends with `advice`, where the place cannot be written.
    """
    work = path.parent / f".{path.name}-{os.getpid()}"  # not by tempfile, whose files their owner alone may read
    new_parent = not path.parent.exists()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _remove_left_overs(path)
        yield work
        fsync_path(work)
        os.replace(work, path)
        fsync_path(path.parent)
    except BaseException as error:
        with suppress(OSError):  # where the folder could not be made, neither is there a file to remove
            work.unlink()
        if new_parent:
            with suppress(OSError):
                path.parent.rmdir()
        if isinstance(error, OSError):
            raise OutputError(f"{path}: cannot be written ({error.strerror or error}); {advice}") from error
        raise


def claim(path: Path, advice: str = "choose another --out", wait_s: float = 0) -> Callable[[], None]:
    """Makes the folder above `path` and holds a lock beside it, so that one process writes `path` at a time; gives back how to let go.

    Letting go removes the lock file, and the folder if it was made here and nothing was left in it.
    wait_s: for another process; -1: for ever.
    Raises filelock.Timeout where another process holds the lock, OutputError where the folder cannot be written.
    """
    new_parent = not path.parent.exists()
    lock = FileLock(path.parent / f".{path.name}.lock")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        lock.acquire(timeout=wait_s)
    except Timeout:
        raise
    except OSError as error:
        raise OutputError(f"{path}: cannot be written ({error.strerror or error}); {advice}") from error

    def let_go() -> None:
        with suppress(OSError):
            Path(lock.lock_file).unlink()
        lock.release()
        if new_parent:
            with suppress(OSError):
                path.parent.rmdir()  # succeeds only where it is empty

    return let_go


@contextmanager
def locked(path: Path, advice: str = "choose another --out", wait_s: float = 0) -> Iterator[None]:
    """`claim` for a block. Raises OutputError, which ends with `advice`, where another process writes `path` or nobody can."""
    try:
        let_go = claim(path, advice, wait_s)
    except Timeout as error:
        raise OutputError(f"{path}: another process writes it right now; {advice}") from error
    try:
        yield
    finally:
        let_go()


@contextmanager
def atomic_folder(target: Path, advice: str = "choose another place", durable: bool = True) -> Iterator[Path]:
    """A hidden folder to fill; what is in it stands at `target` afterwards, or nothing does. An empty folder there is replaced.

    durable: whether each file is brought to the disk first. Raises OutputError, which ends with `advice`, where something is there or the
    place cannot be written.
    """
    work = target.parent / f".{target.name}-{os.getpid()}"
    try:
        if target.is_symlink() or (target.exists() and (not target.is_dir() or any(target.iterdir()))):
            raise OutputError(f"{target}: exists already; remove it, or {advice}")
        remove_tree(work)
        work.mkdir(parents=True)
        yield work
        move_folder(work, target, durable)
    except OSError as error:
        raise OutputError(f"{target}: cannot be written ({error.strerror or error}); {advice}") from error
    finally:
        remove_tree(work)  # not there any more where all went well


def move_folder(work: Path, target: Path, durable: bool = True) -> None:
    """One rename of a whole folder; `target` is not there yet, or empty."""
    for path in [*work.rglob("*"), work] if durable else ():
        fsync_path(path)
    if target.is_dir():
        target.rmdir()  # succeeds only where it is empty
    work.rename(target)
    fsync_path(target.parent)


def _remove_left_overs(path: Path) -> None:
    for name in glob.glob(f".{glob.escape(path.name)}-*", root_dir=path.parent):
        left_over = path.parent / name
        with suppress(OSError, ValueError):
            int(name.rpartition("-")[2])  # ours end with a process number
            if time.time() - left_over.stat().st_mtime > LEFT_OVER_S:
                left_over.unlink()


def nan_to_none(content: Any) -> Any:
    """Content with None for nan and infinities at any depth; JSON has neither, and strict readers refuse a file that does."""
    if isinstance(content, float):
        return content if math.isfinite(content) else None
    if isinstance(content, dict):
        return {name: nan_to_none(value) for name, value in content.items()}
    if isinstance(content, list | tuple):
        return [nan_to_none(value) for value in content]
    return content


def write_json(path: Path, content: Any) -> None:
    """For people to read, too; what JSON cannot hold (nan, NumPy's numbers) as `finite` has it."""
    path.write_text(json.dumps(nan_to_none(content), indent=1, ensure_ascii=False, allow_nan=False) + "\n", encoding="utf-8")


def remove_tree(path: Path) -> None:
    """Deletes a folder of ours; missing is fine."""
    shutil.rmtree(path, ignore_errors=True)


def fsync_path(path: Path) -> None:
    """Waits until a file, or the names in a folder, would survive a power cut.

    Otherwise the new name may be on the disk before the content, and both readable after a crash of the system: a file of zeros.
    """
    if path.is_dir() and os.name == "nt":  # Windows keeps names by itself, and opens no folders
        return
    place = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(place)
    except OSError as error:
        if not path.is_dir() or error.errno not in (errno.EINVAL, errno.ENOTSUP):  # some file systems do not sync folders
            raise
    finally:
        os.close(place)


def escape_formula(cell: Any) -> Any:
    """What a CSV may hold: text that a spreadsheet would run as a formula gets an apostrophe in front.

    Source: OWASP, "CSV Injection". Numbers are left alone.
    """
    return f"'{cell}" if isinstance(cell, str) and cell.startswith(("=", "+", "-", "@", "\t", "\r")) else cell


def csv_text(table: pd.DataFrame) -> str:
    """A table as CSV, text made `harmless`; columns whose name begins with `path` hold paths."""
    safe = table.copy()
    for name in safe.columns:
        safe[name] = safe[name].map(escape_formula_path if str(name).startswith("path") else escape_formula)
    text: str = safe.to_csv(index=False)
    return text


def escape_formula_path(name: str) -> str:
    """The same for a path, which stays one: `-x.jpg` becomes `./-x.jpg`."""
    return f"./{name}" if escape_formula(name) != name else name
