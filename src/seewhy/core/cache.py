"""Where computed things are kept (features, exported networks, image checks, the demo set): its place, its size, its clearing."""

from __future__ import annotations

import os
import shutil
import sqlite3
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import platformdirs
from filelock import FileLock, Timeout

from seewhy.errors import OutputError


def cache_path() -> Path:
    """$SEEWHY_CACHE, else the user's cache folder; it may not exist."""
    return Path(os.environ.get("SEEWHY_CACHE") or platformdirs.user_cache_dir("seewhy", appauthor=False))


def cache_dir() -> Path:
    """The same, made when missing. Raises OutputError."""
    folder = cache_path()
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(f"{folder}: the cache folder cannot be made ({error.strerror}); set SEEWHY_CACHE to a writable one") from error
    return folder


@dataclass(frozen=True)
class CacheEntry:
    """One thing in the cache and its size on disk in bytes."""

    name: str
    path: Path
    size_bytes: int


def size_of(path: Path) -> int:
    """Bytes of a file, or of all files in a folder."""
    if path.is_file():
        return path.stat().st_size
    return sum(file.stat().st_size for file in path.rglob("*") if file.is_file())


def list_cache() -> list[CacheEntry]:
    """What the cache holds: each feature store, exported networks, the demo set, the record of checked images."""
    root = cache_dir()
    stores = sorted((root / "features").glob("*")) if (root / "features").is_dir() else []
    others = sorted(path for path in root.glob("*") if path.name != "features" and not path.name.startswith("."))  # hidden: being written
    return [CacheEntry(str(path.relative_to(root)), path, size_of(path)) for path in [*stores, *others]]


def _empty(record: Path) -> None:
    """All rows out of a database, which others may have open; a file that is none is removed. OperationalError where it is in use."""
    try:
        with closing(sqlite3.connect(record, timeout=0)) as opened:
            for (table,) in opened.execute("SELECT name FROM sqlite_master WHERE type = 'table'").fetchall():
                opened.execute(f'DELETE FROM "{table}"')
            opened.commit()
            opened.execute("VACUUM")
    except sqlite3.OperationalError:
        raise
    except sqlite3.DatabaseError:
        record.unlink()


def clear_cache() -> tuple[int, list[str]]:
    """Removes everything seewhy put into the cache but what another process writes right now; the freed bytes, and what was left."""
    freed, left = 0, []
    for entry in list_cache():
        lock = FileLock(entry.path / "lock") if (entry.path / "lock").is_file() else None
        try:
            if lock is not None:
                lock.acquire(timeout=0)
            if entry.path.suffix == ".sqlite":
                _empty(entry.path)
            elif entry.path.is_dir():
                shutil.rmtree(entry.path)
            else:
                entry.path.unlink()
            freed += entry.size_bytes
        except (Timeout, sqlite3.OperationalError):
            left.append(entry.name)
        except OSError as error:
            raise OutputError(f"{entry.path}: cannot be removed ({error.strerror}); check its permissions") from error
        finally:
            if lock is not None:
                lock.release()
    return freed, left
