"""Image files -> what looking at each of them said: hashed and decoded once, and kept in a record (a sqlite file in the cache)."""

from __future__ import annotations

import hashlib
import sqlite3
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import Any, get_type_hints

import numpy as np
from PIL import Image

from seewhy.core.cache import cache_dir
from seewhy.core.progress import LOG, progress
from seewhy.data.decode import decode, read_bytes, upright_size
from seewhy.data.shards import stamp
from seewhy.errors import OutputError

RECORD = "checked-4.sqlite"  # the rules for what counts as usable are part of the name: new rules, new record
RECORDED_AT_ONCE = 1024  # images; what is killed between has to look at so many again
ASKED_AT_ONCE = 500  # images, of the record
GREY_SPREAD = 8  # of 255, between the channels of a grey image


@dataclass(frozen=True, slots=True)
class Checked:
    """What looking at one file said.

    sha256: of its bytes. width, height: in pixels. problem: why it is unusable, '' if it is not.
    phash: its perceptual hash, 64 bits as 16 hexadecimal digits. grey: whether it has no colours.
    """

    sha256: str
    width: int
    height: int
    problem: str
    phash: str = ""
    grey: bool = False


FACTS: dict[str, type] = get_type_hints(Checked)  # name and type of each of its fields, in order
_COLUMNS = ", ".join(["key TEXT PRIMARY KEY", *(f"{name} {'TEXT' if kind is str else 'INT'}" for name, kind in FACTS.items())])
_INSERT = f"INSERT OR REPLACE INTO checked VALUES ({', '.join('?' * (1 + len(FACTS)))})"


def check_file(path: Path) -> Checked:
    """Read, hash and fully decode one file."""
    try:
        data = read_bytes(path)
    except OSError as error:
        return Checked("", 0, 0, (error.strerror or "cannot be read").lower())
    return check_bytes(data)


def check_bytes(data: bytes) -> Checked:
    """Hash and fully decode the content of one file."""
    sha256 = hashlib.sha256(data).hexdigest()
    try:
        image = decode(data)
    except ValueError as error:
        return Checked(sha256, 0, 0, str(error))
    import imagehash  # brings SciPy, which answering with an ONNX file does without

    small = image.resize((32, 32), Image.Resampling.BILINEAR, reducing_gap=2.0)
    width, height = upright_size(data)
    return Checked(sha256, width, height, "", str(imagehash.phash(small)), is_grey(small))


def is_grey(image: Image.Image) -> bool:
    """Whether red, green and blue agree up to what JPEG leaves between them, at 99 of 100 places."""
    values = np.asarray(image.convert("RGB"), dtype=np.int16)
    return bool(np.mean(np.ptp(values, axis=2) <= GREY_SPREAD) >= 0.99)


def check_files(paths: Sequence[Path], workers: int = 2) -> list[Checked]:
    """Checked for each file, in order; files seen before (same path, size and time) are not read again."""
    file = cache_dir() / RECORD
    try:
        try:
            return _check_files(paths, workers, file)
        except sqlite3.DatabaseError as error:
            if isinstance(error, sqlite3.OperationalError):  # the place: read-only, full, locked
                raise
            LOG.info(f"{file} is damaged ({error}); it is made anew, and all images are looked at again")
            file.unlink()
            return _check_files(paths, workers, file)
    except (sqlite3.Error, OSError) as error:
        raise OutputError(f"{file}: {error}; free some space, or set SEEWHY_CACHE to a writable folder") from error


def record_checked(paths: Sequence[Path], checked: Sequence[Checked]) -> None:
    """Keeps what was found elsewhere of these files, so that `check_files` need not look at them. Raises OutputError."""
    file = cache_dir() / RECORD
    rows = [(_stat_key(path), *astuple(each)) for path, each in zip(paths, checked, strict=True) if each.sha256]
    try:
        with closing(sqlite3.connect(file, timeout=60)) as record, record:
            record.execute(f"CREATE TABLE IF NOT EXISTS checked ({_COLUMNS})")
            record.executemany(_INSERT, rows)
    except (sqlite3.Error, OSError) as error:
        raise OutputError(f"{file}: {error}; free some space, or set SEEWHY_CACHE to a writable folder") from error


def _check_files(paths: Sequence[Path], workers: int, file: Path) -> list[Checked]:
    found: dict[int, Checked] = {}
    todo = []
    with closing(sqlite3.connect(file, timeout=60)) as record:
        record.execute(f"CREATE TABLE IF NOT EXISTS checked ({_COLUMNS})")
        for start in range(0, len(paths), ASKED_AT_ONCE):
            keys = [_stat_key(path) for path in paths[start : start + ASKED_AT_ONCE]]
            known = {row[0]: Checked(*row[1:]) for row in _known_rows(record, keys)}
            for i, key in enumerate(keys, start):
                if key in known:
                    found[i] = known[key]
                else:
                    todo.append(i)
        with ThreadPoolExecutor(max(1, workers)) as pool, progress("checking images", len(todo)) as advance:
            for start in range(0, len(todo), RECORDED_AT_ONCE):
                rows = []
                chunk = todo[start : start + RECORDED_AT_ONCE]
                keys = [_stat_key(paths[i]) for i in chunk]
                for i, key, checked in zip(chunk, keys, pool.map(lambda i: check_file(paths[i]), chunk), strict=True):
                    found[i] = checked
                    advance(1)
                    if checked.sha256:  # an unreadable file may become readable without changing
                        rows.append((key, *astuple(checked)))
                with record:
                    record.executemany(_INSERT, rows)
    return [found[i] for i in range(len(paths))]


def _stat_key(path: Path) -> str:
    try:
        return stamp(path)
    except OSError:
        return str(path.absolute())


def _known_rows(record: sqlite3.Connection, keys: Sequence[str]) -> Iterable[tuple[Any, ...]]:
    marks = ",".join("?" * len(keys))
    return record.execute(f"SELECT * FROM checked WHERE key IN ({marks})", keys)
