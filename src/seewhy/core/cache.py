"""Locate, list and clear the cache: features, exported networks, image checks, the demo set."""

from __future__ import annotations

import os
import shutil
import sqlite3
from contextlib import closing, nullcontext
from dataclasses import dataclass
from pathlib import Path

import platformdirs
from filelock import FileLock, Timeout

from seewhy.errors import OutputError


def cache_path() -> Path:
    """$SEEWHY_CACHE, else the user's cache folder; it may not exist."""
    return Path(os.environ.get("SEEWHY_CACHE") or platformdirs.user_cache_dir("seewhy", appauthor=False))


def cache_dir() -> Path:
    """`cache_path`, created if missing. Raises OutputError."""
    folder = cache_path()
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(f"{folder}: cannot create the cache folder ({error.strerror}); set SEEWHY_CACHE to a writable one") from error
    return folder


@dataclass(frozen=True)
class CacheEntry:
    """A file or folder in the cache and its size on disk in bytes."""

    name: str
    path: Path
    size_bytes: int


def size_of(path: Path) -> int:
    """Bytes of a file, or of all files in a folder."""
    return sum(file.stat().st_size for file in [path, *path.rglob("*")] if file.is_file())


def list_cache() -> list[CacheEntry]:
    """Entries of the cache: each feature store, exported networks, the demo set, the database of image checks."""
    root = cache_dir()
    others = (path for path in root.glob("*") if path.name != "features" and not path.name.startswith("."))  # hidden: being written
    return [CacheEntry(str(path.relative_to(root)), path, size_of(path)) for path in [*sorted(root.glob("features/*")), *sorted(others)]]


def _clear_database(file: Path) -> None:
    """Delete all rows of a database that other processes may have open; raises sqlite3.OperationalError while one writes it."""
    try:
        with closing(sqlite3.connect(file, timeout=0)) as database:
            for (table,) in database.execute("SELECT name FROM sqlite_master WHERE type = 'table'").fetchall():
                database.execute(f'DELETE FROM "{table}"')
            database.commit()
            database.execute("VACUUM")
    except sqlite3.OperationalError:
        raise
    except sqlite3.DatabaseError:  # not a database
        file.unlink()


def clear_cache() -> tuple[int, list[str]]:
    """Remove all entries of the cache that no other process is writing. Returns the freed bytes and the names of the entries left."""
    freed, left = 0, []
    for entry in list_cache():
        lock = entry.path / "lock"
        try:
            with FileLock(lock, timeout=0) if lock.is_file() else nullcontext():
                if entry.path.suffix == ".sqlite":
                    _clear_database(entry.path)
                elif entry.path.is_dir():
                    shutil.rmtree(entry.path)
                else:
                    entry.path.unlink()
            freed += entry.size_bytes
        except (Timeout, sqlite3.OperationalError):
            left.append(entry.name)
        except OSError as error:
            raise OutputError(f"{entry.path}: cannot be removed ({error.strerror}); check its permissions") from error
    return freed, left
