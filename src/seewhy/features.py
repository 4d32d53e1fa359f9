"""Frozen trunk x views -> Features: each picture's fixed part computed once and kept in a memory-mapped store."""

from __future__ import annotations

import errno
import hashlib
import itertools
import json
import mmap
import os
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt
import torch
from filelock import FileLock, Timeout
from torch import Tensor, nn

from seewhy.backbones import weights_hash
from seewhy.cache import cache_dir
from seewhy.cutting import Cut
from seewhy.decoding import read_image
from seewhy.engines import make_engine, runtime_of, settled_engine, steady
from seewhy.errors import OutputError
from seewhy.images import ImageSet
from seewhy.progress import LOG, progress
from seewhy.streams import BATCH, in_batches, in_order
from seewhy.transforms import Preprocessing, render, view_of

EVAL_VIEW = 0  # its number among the views
FORMAT = 3
SYNC_S = 2.0  # of computing is the most that a kill or a power cut takes away


@dataclass(frozen=True)
class Features:
    """What the frozen trunk says of each picture and view.

    store: (R, *shape) of float16 maps or float32 vectors, on disk (memory-mapped) or in memory.
    rows: (N, V) int64, the row of view v of picture n.
    computed: how many (picture, view) pairs were computed now; the others came from the cache.
    """

    store: npt.NDArray[Any]
    rows: npt.NDArray[np.int64]
    computed: int

    def get(self, pictures: npt.NDArray[np.int64], views: npt.NDArray[np.int64] | int = 0) -> npt.NDArray[np.float32]:
        """(B, *shape) float32 of the given pictures (positions in `rows`) and views."""
        return take_rows(self.store, self.rows[pictures, views])


def take_rows(store: npt.NDArray[Any], rows: npt.NDArray[np.int64]) -> npt.NDArray[np.float32]:
    """A float32 copy of some rows. Pages of a mapped file are let go at once, so that memory does not grow to its size.

    They stay in the system's cache, from where the next epoch has them back.
    """
    taken = np.asarray(store[rows], dtype=np.float32)
    mapped = getattr(store, "_mmap", None)  # numpy's name for the mmap object of a memmap
    if mapped is not None and hasattr(mmap, "MADV_DONTNEED"):
        mapped.madvise(mmap.MADV_DONTNEED)
    return taken


def stored_dtype(shape: Sequence[int]) -> type[np.float16] | type[np.float32]:
    """Maps are kept in half precision (a quarter of a 224-pixel picture's float32 size), vectors in single.

    What trains on pictures directly rounds the same way, so that cached or not is the same mathematics.
    """
    return np.float32 if len(shape) == 1 else np.float16


# ---------------------------------------------------------------- the store


class FeatureStore:
    """A folder with rows.bin (features) and keys.bin (32 bytes a row: which picture and view).

    Rows are on the disk before their keys, so whatever ends a run, every key has its row;
    a tail without keys is cut off by the next writer. One writer at a time (a lock file).
    """

    def __init__(self, folder: Path, shape: tuple[int, ...]) -> None:
        self.folder = folder
        self.shape = shape
        self.dtype = np.dtype(stored_dtype(shape))
        self.row_bytes = self.dtype.itemsize * int(np.prod(shape))

    def keys(self) -> dict[bytes, int]:
        """Key -> row of everything that is completely written."""
        try:
            data = (self.folder / "keys.bin").read_bytes()
            complete = (self.folder / "rows.bin").stat().st_size // self.row_bytes
        except FileNotFoundError:
            return {}
        count = min(len(data) // 32, complete)
        return {data[32 * i : 32 * i + 32]: i for i in range(count)}

    def open_rows(self) -> npt.NDArray[Any]:
        """(R, *shape), memory-mapped, read-only."""
        count = (self.folder / "rows.bin").stat().st_size // self.row_bytes
        return np.memmap(self.folder / "rows.bin", dtype=self.dtype, mode="r", shape=(count, *self.shape))

    def append(self, batches: Iterator[tuple[list[bytes], npt.NDArray[Any]]]) -> None:
        """Adds rows under their keys; to be called under `lock()`.

        Every SYNC_S seconds the rows are brought to the disk, and their keys after them: not even a power cut leaves a key
        without its row. Whatever ends this keeps what was finished before; a full disk gets back what is of no use.
        """
        count = len(self.keys())
        pending: list[bytes] = []
        with open(self.folder / "rows.bin", "ab", buffering=0) as rows, open(self.folder / "keys.bin", "ab", buffering=0) as keys:
            rows.truncate(count * self.row_bytes)
            keys.truncate(count * 32)

            def commit() -> None:
                nonlocal count
                os.fsync(rows.fileno())
                _write_all(keys, b"".join(pending))
                count += len(pending)
                pending.clear()

            committed = time.monotonic()
            try:
                for names, features in batches:
                    _write_all(rows, np.ascontiguousarray(features, dtype=self.dtype).tobytes())
                    pending += names
                    if time.monotonic() - committed > SYNC_S:
                        commit()
                        committed = time.monotonic()
            except OSError:
                rows.truncate(count * self.row_bytes)
                raise
            except BaseException:
                commit()
                raise
            commit()

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Held by the one who writes; says so where another process has to be waited for."""
        lock = FileLock(self.folder / "lock")
        try:
            lock.acquire(timeout=0)
        except Timeout:
            LOG.info("another process computes the same kind of features; waiting for it")
            lock.acquire()
        try:
            yield
        finally:
            lock.release()


def _write_all(file: BinaryIO, data: bytes) -> None:
    """All of `data` to an unbuffered file; OSError where the disk is full, with as much written as it took."""
    left = memoryview(data)
    while left:
        left = left[file.write(left) :]


def store_name(cut: Cut, preprocessing: Preprocessing, engine: str) -> str:
    """The content key of a store: trunk weights, where it is cut, preprocessing, what computes, and format."""
    assert cut.trunk is not None  # callers have a trunk, or nothing to store
    facts = {"format": FORMAT, "weights": weights_hash(cut.trunk), "place": cut.place, "runtime": runtime_of(engine)}
    facts |= preprocessing.as_dict()
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:20]


def row_key(picture_hash: str, view: int) -> bytes:
    """32 bytes that stand for one view of one picture's content."""
    return hashlib.sha256(f"{picture_hash} {view}".encode()).digest()


# ---------------------------------------------------------------- extraction


def extract_features(
    images: ImageSet,
    indices: npt.NDArray[np.int64],
    views: int,
    cut: Cut,
    preprocessing: Preprocessing,
    engine: str = "auto",
    workers: int = 2,
    keep: bool = True,
) -> Features:
    """Features of `views` views of the pictures at `indices`; what the cache holds is not computed again.

    Interrupted at any moment, the finished rows are kept. `keep=False` leaves the disk alone and
    holds the features in memory.
    """
    assert cut.trunk is not None
    engine = settled_engine(engine, len(images))
    shape = feature_shape(cut.trunk, preprocessing)
    wanted = [row_key(images.hashes[i], v) for i in indices for v in range(views)]
    if not keep:
        todo = list(dict.fromkeys(wanted))
        batches = _compute(images, indices, views, set(todo), cut.trunk, preprocessing, engine, workers)
        place: dict[bytes, int] = {}
        store = np.empty((len(todo), *shape), dtype=stored_dtype(shape))
        for names, features in batches:
            store[len(place) : len(place) + len(names)] = features
            place.update({name: len(place) + k for k, name in enumerate(names)})
        return Features(store, _rows(wanted, place, views), len(todo))
    folder = cache_dir() / "features" / store_name(cut, preprocessing, engine)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        feature_store = FeatureStore(folder, shape)
        try:  # without the lock, which another process may hold for long
            rows = _rows(wanted, feature_store.keys(), views)
            return Features(feature_store.open_rows(), rows, 0)
        except (KeyError, FileNotFoundError):
            pass
        with feature_store.lock():
            missing = set(wanted) - feature_store.keys().keys()  # another process may have written some meanwhile
            if missing:
                feature_store.append(_compute(images, indices, views, missing, cut.trunk, preprocessing, engine, workers))
            return Features(feature_store.open_rows(), _rows(wanted, feature_store.keys(), views), len(missing))
    except OSError as error:
        advice = "free some space or" if error.errno == errno.ENOSPC else "make it writable, or"
        raise OutputError(
            f"{folder}: features cannot be kept ({error.strerror}); {advice} set SEEWHY_CACHE to another folder, or pass --no-cache"
        ) from error


def _rows(wanted: list[bytes], place: dict[bytes, int], views: int) -> npt.NDArray[np.int64]:
    return np.array([place[key] for key in wanted], dtype=np.int64).reshape(-1, views)


@torch.inference_mode()
def feature_shape(trunk: nn.Module, preprocessing: Preprocessing) -> tuple[int, ...]:
    """Shape of one picture's features."""
    device = next(trunk.parameters()).device
    example = torch.zeros(1, 3, preprocessing.size, preprocessing.size, device=device)
    return tuple(trunk.eval()(example).shape[1:])


def _compute(
    images: ImageSet,
    indices: npt.NDArray[np.int64],
    views: int,
    missing: set[bytes],
    trunk: nn.Module,
    preprocessing: Preprocessing,
    engine: str,
    workers: int,
) -> Iterator[tuple[list[bytes], npt.NDArray[Any]]]:
    """Batches of (keys, features) of the missing views, each picture read once for all of its views."""
    jobs: list[tuple[int, list[int]]] = []
    claimed: set[bytes] = set()
    for i in indices:
        todo = [v for v in range(views) if (key := row_key(images.hashes[i], v)) in missing and key not in claimed]
        claimed.update(row_key(images.hashes[i], v) for v in todo)
        if todo:
            jobs.append((int(i), todo))
    run = make_engine(trunk, preprocessing, len(missing), engine)
    dtype = stored_dtype(feature_shape(trunk, preprocessing))

    def squares_of(job: tuple[int, list[int]]) -> list[tuple[bytes, npt.NDArray[np.uint8]]]:
        i, todo = job
        picture = read_image(images.paths[i], preprocessing.enough)
        squares: dict[int, npt.NDArray[np.uint8]] = {}
        for v in todo:
            mirrored = v == 1 and EVAL_VIEW in squares  # the same pixels the other way round
            squares[v] = (
                np.ascontiguousarray(squares[EVAL_VIEW][:, ::-1]) if mirrored else render_view(picture, v, images.hashes[i], preprocessing)
            )
        return [(row_key(images.hashes[i], v), square) for v, square in squares.items()]

    def features_of(batch: list[tuple[bytes, npt.NDArray[np.uint8]]]) -> tuple[list[bytes], npt.NDArray[Any]]:
        return [name for name, _ in batch], rounded(steady(run, np.stack([square for _, square in batch])), dtype)

    squares = itertools.chain.from_iterable(in_order(squares_of, jobs, workers))
    with progress("features", len(missing)) as advance:
        for names, features in in_order(features_of, in_batches(squares, BATCH), run.lanes, ahead=run.lanes):
            yield names, features
            advance(len(names))


def rounded(features: npt.NDArray[np.float32], dtype: type[Any]) -> npt.NDArray[Any]:
    """Features as the store keeps them. Raises OutputError where they do not fit half precision."""
    with np.errstate(over="ignore"):
        rounded = features.astype(dtype)
    if not np.isfinite(rounded).all() and np.isfinite(features).all():
        raise OutputError("features of this network exceed half precision (65,504); train with --unfreeze 0 or all")
    return rounded


def render_view(picture: Any, view: int, picture_hash: str, preprocessing: Preprocessing) -> npt.NDArray[np.uint8]:
    """One numbered view of an RGB picture as the network's square, (size, size, 3) uint8."""
    chosen = view_of(view, picture_hash, picture.width, picture.height, preprocessing)
    size = preprocessing.size
    return render(picture, chosen, (size, size), preprocessing.interpolation)


def square_of(path: Path, preprocessing: Preprocessing) -> npt.NDArray[np.uint8]:
    """A picture file as the network sees it when it answers: (size, size, 3) uint8."""
    return render_view(read_image(path, preprocessing.enough), EVAL_VIEW, "", preprocessing)


def round_like_stored(features: Tensor) -> Tensor:
    """Rounds (N, *shape) features as the store does, and gives float32 back."""
    return features.half().float() if stored_dtype(features.shape[1:]) is np.float16 else features.float()
