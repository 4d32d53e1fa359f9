"""Hash and decode each image file once, and remember the result in a SQLite database in the cache."""

from __future__ import annotations

import hashlib
import sqlite3
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import astuple, dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar, get_type_hints

import numpy as np
from PIL import Image

from seewhy.core.cache import cache_dir
from seewhy.core.parallel import batched
from seewhy.core.progress import LOG, progress
from seewhy.data.decode import decode, read_bytes, upright_size
from seewhy.data.shards import file_key
from seewhy.errors import OutputError

R = TypeVar("R")

DATABASE = "checked-4.sqlite"  # raise the number when the rules for usable images change
INSERT_BATCH = 1024  # images; a killed process repeats at most so many
SELECT_BATCH = 500  # images
GREY_SPREAD = 8  # of 255, between the channels of a grey image


@dataclass(frozen=True, slots=True)
class ImageCheck:
    """Result of checking one file.

    sha256: of its bytes. width, height: in pixels. problem: why it is unusable, '' if usable.
    phash: perceptual hash, 64 bits as 16 hexadecimal digits. grey: whether it has no colours.
    """

    sha256: str
    width: int
    height: int
    problem: str
    phash: str = ""
    grey: bool = False


CHECK_FIELDS: dict[str, type] = get_type_hints(ImageCheck)
_COLUMNS = ", ".join(["key TEXT PRIMARY KEY", *(f"{name} {'TEXT' if kind is str else 'INT'}" for name, kind in CHECK_FIELDS.items())])


def check_file(path: Path) -> ImageCheck:
    """Read, hash and decode one file."""
    try:
        data = read_bytes(path)
    except OSError as error:
        return ImageCheck("", 0, 0, (error.strerror or "cannot be read").lower())
    return check_bytes(data)


def check_bytes(data: bytes) -> ImageCheck:
    """Hash and decode the content of one file."""
    sha256 = hashlib.sha256(data).hexdigest()
    try:
        image = decode(data)
    except ValueError as error:
        return ImageCheck(sha256, 0, 0, str(error))
    import imagehash  # imports SciPy, which is not a requirement of the ONNX runtime

    small = image.resize((32, 32), Image.Resampling.BILINEAR, reducing_gap=2.0)
    width, height = upright_size(data)
    return ImageCheck(sha256, width, height, "", str(imagehash.phash(small)), is_grey(small))


def is_grey(image: Image.Image) -> bool:
    """Whether the channels differ by at most GREY_SPREAD, as JPEG leaves them, in 99% of the pixels."""
    values = np.asarray(image.convert("RGB"), dtype=np.int16)
    return bool(np.mean(np.ptp(values, axis=2) <= GREY_SPREAD) >= 0.99)


def check_files(paths: Sequence[Path], workers: int = 2) -> list[ImageCheck]:
    """Check files, in order; those checked before (same path, size and time) are not read again. Raises OutputError."""
    return _with_database(partial(_check_files, paths, workers))


def record_checks(paths: Sequence[Path], checks: Sequence[ImageCheck]) -> None:
    """Store checks made elsewhere, so that `check_files` need not read these files. Raises OutputError."""
    rows = [(file_key(path), *astuple(check)) for path, check in zip(paths, checks, strict=True) if check.sha256]
    _with_database(partial(_insert, rows))


def _with_database(work: Callable[[sqlite3.Connection], R]) -> R:
    """Run work(database) on the database of checks, again on a new one if it is damaged. Raises OutputError."""
    file = cache_dir() / DATABASE
    for replace in (True, False):
        try:
            with closing(sqlite3.connect(file, timeout=60)) as database:
                database.execute(f"CREATE TABLE IF NOT EXISTS checked ({_COLUMNS})")
                return work(database)
        except (sqlite3.Error, OSError) as error:
            unavailable = isinstance(error, sqlite3.OperationalError | OSError)  # read-only, full, locked
            if unavailable or not replace:
                raise OutputError(f"{file}: {error}; free some space, or set SEEWHY_CACHE to a writable folder") from error
            LOG.info(f"{file} is damaged ({error}); replacing it and checking all images again")
            file.unlink()
    raise AssertionError("unreachable")


def _insert(rows: Sequence[tuple[Any, ...]], database: sqlite3.Connection) -> None:
    with database:
        database.executemany(f"INSERT OR REPLACE INTO checked VALUES ({', '.join('?' * (1 + len(CHECK_FIELDS)))})", rows)


def _check_files(paths: Sequence[Path], workers: int, database: sqlite3.Connection) -> list[ImageCheck]:
    checks: dict[int, ImageCheck] = {}
    pending: list[int] = []
    for chunk in batched(enumerate(paths), SELECT_BATCH):
        keys = [file_key(path) for _, path in chunk]
        rows = database.execute(f"SELECT * FROM checked WHERE key IN ({','.join('?' * len(keys))})", keys)
        stored = {key: ImageCheck(*fields) for key, *fields in rows}
        for (i, _), key in zip(chunk, keys, strict=True):
            if key in stored:
                checks[i] = stored[key]
            else:
                pending.append(i)
    with ThreadPoolExecutor(max(1, workers)) as pool, progress("checking images", len(pending)) as advance:
        for batch in batched(pending, INSERT_BATCH):
            keys = [file_key(paths[i]) for i in batch]  # before reading: a file may change meanwhile
            for i, check in zip(batch, pool.map(lambda i: check_file(paths[i]), batch), strict=True):
                checks[i] = check
                advance(1)
            # An unreadable file may become readable without a change of its key.
            _insert([(key, *astuple(checks[i])) for i, key in zip(batch, keys, strict=True) if checks[i].sha256], database)
    return [checks[i] for i in range(len(paths))]
