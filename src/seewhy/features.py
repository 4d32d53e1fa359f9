"""Frozen trunk x views -> Features: each picture's fixed part computed once, by whichever process it falls to, and kept."""

from __future__ import annotations

import errno
import hashlib
import itertools
import json
import time
from collections.abc import Iterable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from seewhy import distributed
from seewhy.backbones import weights_hash
from seewhy.cache import cache_dir
from seewhy.cutting import Cut
from seewhy.decoding import read_image
from seewhy.engines import make_engine, runtime_of, settled_engine, steady
from seewhy.errors import OutputError
from seewhy.images import ImageSet
from seewhy.progress import progress
from seewhy.store import KEY, FeatureStore, StoredRows, as_keys, stored_dtype, take_rows
from seewhy.streams import BATCH, in_batches, in_order
from seewhy.transforms import Preprocessing, render, view_of

EVAL_VIEW = 0  # its number among the views
FORMAT = 3
SHOWN_LATE = 60  # s until a disk that machines share shows the files of others


@dataclass(frozen=True)
class Features:
    """What the frozen trunk says of each picture and view.

    store: (R, *shape) of float16 maps or float32 vectors, on disk (memory-mapped) or in memory.
    rows: (N, V) int64, the row of view v of picture n.
    computed: how many (picture, view) pairs were computed now; the others came from the cache.
    """

    store: npt.NDArray[Any] | StoredRows
    rows: npt.NDArray[np.int64]
    computed: int

    def get(self, pictures: npt.NDArray[np.int64], views: npt.NDArray[np.int64] | int = 0) -> npt.NDArray[np.float32]:
        """(B, *shape) float32 of the given pictures (positions in `rows`) and views."""
        return take_rows(self.store, self.rows[pictures, views])


def store_name(cut: Cut, preprocessing: Preprocessing, engine: str, kept: str = "auto") -> str:
    """The content key of a store: trunk weights, where it is cut, preprocessing, what computes, what it is kept as, and format."""
    assert cut.trunk is not None  # callers have a trunk, or nothing to store
    facts = {"format": FORMAT, "weights": weights_hash(cut.trunk), "place": cut.place, "runtime": runtime_of(engine)}
    facts |= preprocessing.as_dict() | ({} if kept == "auto" else {"kept": kept})
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
    kept: str = "auto",
    together: bool = False,
) -> Features:
    """Features of `views` views of the pictures at `indices`; what the cache holds is not computed again.

    Interrupted at any moment, the finished rows are kept. `keep=False` leaves the disk alone and
    holds the features in memory. kept: see `stored_dtype`.
    together: all processes of a training ask for the same, and each computes its share of it.
    """
    assert cut.trunk is not None
    engine = settled_engine(engine, len(images))
    shape = feature_shape(cut.trunk, preprocessing)
    keys = (row_key(images.hashes[i], v) for i in indices for v in range(views))
    wanted = np.fromiter(keys, dtype=KEY, count=len(indices) * views)

    def compute(todo: npt.NDArray[np.int64], every: bool) -> Iterator[tuple[list[bytes], npt.NDArray[Any]]]:
        assert cut.trunk is not None
        mine = todo if every else todo[np.isin(todo // views, distributed.shard(np.unique(todo // views)))]
        return _compute(images, _jobs(indices, mine, views), len(mine), cut.trunk, preprocessing, engine, workers, kept)

    if not keep:
        unique, place = np.unique(wanted, return_inverse=True)
        store = np.empty((len(unique), *shape), dtype=stored_dtype(shape, kept))
        for names, features in compute(_firsts(wanted, np.ones(len(wanted), dtype=bool)), True):
            store[np.searchsorted(unique, as_keys(names))] = features
        return Features(store, place.reshape(-1, views), len(unique))
    folder = cache_dir() / "features" / store_name(cut, preprocessing, engine, kept)
    alone = not together or distributed.world_size() == 1
    try:
        folder.mkdir(parents=True, exist_ok=True)
        feature_store = FeatureStore(folder, shape, kept)
        rows = feature_store.find(wanted)
        missing = bool((rows < 0).any())
        if not (distributed.all_reduce_scalar(missing) if together else missing):  # without the lock, which may be held for long
            return Features(feature_store.open_rows(), rows.reshape(-1, views), 0)
        with feature_store.lock() if alone or distributed.is_main_process() else nullcontext():
            if not alone:
                distributed.barrier()  # the main process holds the lock for all
            todo = _firsts(wanted, feature_store.find(wanted) < 0)  # another training may have written some meanwhile
            if not alone:
                distributed.barrier()  # all have looked before anybody writes
            if len(todo):
                number, writers = (0, 1) if alone else (distributed.rank(), distributed.world_size())
                feature_store.append(compute(todo, alone), number, writers)
            if not alone:
                distributed.barrier()
        rows = feature_store.find(wanted)
        waited = 0 if alone else SHOWN_LATE
        while waited and (rows < 0).any():
            time.sleep(1)
            rows, waited = feature_store.find(wanted), waited - 1
        if (rows < 0).any():
            raise OutputError(
                f"{folder}: lacks features that another machine has computed; set SEEWHY_CACHE to a folder that all machines share"
            )
        return Features(feature_store.open_rows(), rows.reshape(-1, views), len(todo))
    except OSError as error:
        advice = "free some space or" if error.errno == errno.ENOSPC else "make it writable, or"
        raise OutputError(
            f"{folder}: features cannot be kept ({error.strerror}); {advice} set SEEWHY_CACHE to another folder, or pass --no-cache"
        ) from error


def _firsts(wanted: npt.NDArray[np.bytes_], missing: npt.NDArray[np.bool_]) -> npt.NDArray[np.int64]:
    """Ascending places of the keys that no file has, each where it occurs first: what occurs twice is computed once."""
    order = np.argsort(wanted, kind="stable")
    ordered = wanted[order]
    first = order[np.append(True, ordered[1:] != ordered[:-1])[: len(ordered)]]
    return np.sort(first[missing[first]])


def _jobs(indices: npt.NDArray[np.int64], todo: npt.NDArray[np.int64], views: int) -> Iterator[tuple[int, list[int]]]:
    """(picture, its missing views) of each picture that lacks some. todo: places in the pictures at `indices`, view after view."""
    for n, places in itertools.groupby(todo, key=lambda place: int(place) // views):
        yield int(indices[n]), [int(place) % views for place in places]


@torch.inference_mode()
def feature_shape(trunk: nn.Module, preprocessing: Preprocessing) -> tuple[int, ...]:
    """Shape of one picture's features."""
    device = next(trunk.parameters()).device
    example = torch.zeros(1, 3, preprocessing.size, preprocessing.size, device=device)
    return tuple(trunk.eval()(example).shape[1:])


def _compute(
    images: ImageSet,
    jobs: Iterable[tuple[int, list[int]]],
    count: int,
    trunk: nn.Module,
    preprocessing: Preprocessing,
    engine: str,
    workers: int,
    kept: str,
) -> Iterator[tuple[list[bytes], npt.NDArray[Any]]]:
    """Batches of (keys, features) of the missing views, `count` in all, each picture read once for all of its views."""
    if not count:
        return
    run = make_engine(trunk, preprocessing, count, engine)
    dtype = stored_dtype(feature_shape(trunk, preprocessing), kept)

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
    with progress("features", count) as advance:
        for names, features in in_order(features_of, in_batches(squares, BATCH), run.lanes, ahead=run.lanes):
            yield names, features
            advance(len(names))


def rounded(features: npt.NDArray[np.float32], dtype: type[Any]) -> npt.NDArray[Any]:
    """Features as the store keeps them. Raises OutputError where they do not fit half precision."""
    with np.errstate(over="ignore"):
        rounded = features.astype(dtype)
    if not np.isfinite(rounded).all() and np.isfinite(features).all():
        raise OutputError("features of this network exceed half precision (65,504); pass --set feature_dtype=float32")
    return rounded


def render_view(picture: Any, view: int, picture_hash: str, preprocessing: Preprocessing) -> npt.NDArray[np.uint8]:
    """One numbered view of an RGB picture as the network's square, (size, size, 3) uint8."""
    chosen = view_of(view, picture_hash, picture.width, picture.height, preprocessing)
    size = preprocessing.size
    return render(picture, chosen, (size, size), preprocessing.interpolation)


def square_in(picture: Any, preprocessing: Preprocessing) -> npt.NDArray[np.uint8]:
    """An RGB picture as the network sees it when it answers: (size, size, 3) uint8."""
    return render_view(picture, EVAL_VIEW, "", preprocessing)


def square_of(path: Path, preprocessing: Preprocessing) -> npt.NDArray[np.uint8]:
    """`square_in` of a picture file."""
    return square_in(read_image(path, preprocessing.enough), preprocessing)


def round_like_stored(features: Tensor, kept: str = "auto") -> Tensor:
    """Rounds (N, *shape) features as the store does, and gives float32 back."""
    return features.half().float() if stored_dtype(features.shape[1:], kept) is np.float16 else features.float()
