"""Frozen trunk x views -> Features: each image's fixed part computed once, by whichever process it falls to, and kept."""

from __future__ import annotations

import errno
import hashlib
import itertools
import json
import time
from collections.abc import Iterable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from torch import Tensor, nn

from seewhy.config import TrainConfig
from seewhy.core import distributed
from seewhy.core.cache import cache_dir
from seewhy.core.parallel import BATCH, batched, map_ordered
from seewhy.core.progress import progress
from seewhy.data.decode import read_image
from seewhy.data.image_set import ImageSet
from seewhy.errors import OutputError
from seewhy.models.backbones import create_backbone
from seewhy.models.executors import batch_invariant, make_executor, resolve_runtime, runtime_of
from seewhy.models.feature_store import KEY, FeatureStore, StoredRows, as_keys, stored_dtype, take_rows
from seewhy.models.fingerprint import network_hash
from seewhy.models.transforms import EVAL_VIEW, MIRRORED_VIEW, Preprocessing, eval_view, render, view_of
from seewhy.models.trunk_tail import TrunkTail, split_backbone

FORMAT = 4
SHOWN_LATE = 60  # s until a disk that machines share shows the files of others


@dataclass(frozen=True)
class FeatureSpec:
    """How features are computed and kept.

    runtime: onnx, torch or auto. workers: threads that decode. cache: keep them on disk, or in memory alone. dtype: see `stored_dtype`.
    distributed: all processes of a training ask for the same, and each computes its share of it.
    """

    runtime: str = "auto"
    workers: int = 2
    cache: bool = True
    dtype: str = "auto"
    distributed: bool = False

    @staticmethod
    def of(config: TrainConfig, distributed: bool = False) -> FeatureSpec:
        """What this config asks for."""
        return FeatureSpec(config.runtime, config.workers, config.cache, config.feature_dtype, distributed)


@dataclass(frozen=True, eq=False)
class Features:
    """What the frozen trunk says of each image and view.

    store: (R, *shape) of float16 maps or float32 vectors, on disk (memory-mapped) or in memory.
    rows: (N, V) int64, the row of view v of image n.
    computed: how many (image, view) pairs were computed now; the others came from the cache.
    """

    store: npt.NDArray[Any] | StoredRows
    rows: npt.NDArray[np.int64]
    computed: int

    def get(self, images: npt.NDArray[np.int64], views: npt.NDArray[np.int64] | int = 0) -> npt.NDArray[np.float32]:
        """(B, *shape) float32 of the given images (positions in `rows`) and views."""
        return take_rows(self.store, self.rows[images, views])


def store_name(cut: TrunkTail, preprocessing: Preprocessing, runtime: str, kept: str = "auto") -> str:
    """The content key of a store: trunk (structure and weights), cut point, preprocessing, what computes, what it is kept as, format."""
    assert cut.trunk is not None  # callers have a trunk, or nothing to store
    facts = {"format": FORMAT, "network": network_hash(cut.trunk), "place": cut.place, "runtime": runtime_of(runtime)}
    facts |= preprocessing.as_dict() | ({} if kept == "auto" else {"kept": kept})
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:20]


def row_key(image_hash: str, view: int) -> bytes:
    """32 bytes that stand for one view of one image's content."""
    return hashlib.sha256(f"{image_hash} {view}".encode()).digest()


# ---------------------------------------------------------------- extraction


def extract_features(
    images: ImageSet,
    indices: npt.NDArray[np.int64],
    views: int,
    cut: TrunkTail,
    preprocessing: Preprocessing,
    spec: FeatureSpec = FeatureSpec(),
) -> Features:
    """Features of `views` views of the images at `indices`; what the cache holds is not computed again.

    Interrupted at any moment, the finished rows are kept.
    """
    assert cut.trunk is not None
    spec = replace(spec, runtime=resolve_runtime(spec.runtime, len(images)))
    shape = feature_shape(cut.trunk, preprocessing)
    keys = (row_key(images.hashes[i], v) for i in indices for v in range(views))
    wanted = np.fromiter(keys, dtype=KEY, count=len(indices) * views)

    def compute(todo: npt.NDArray[np.int64], every: bool) -> Iterator[tuple[list[bytes], npt.NDArray[Any]]]:
        assert cut.trunk is not None
        mine = todo if every else todo[np.isin(todo // views, distributed.shard(np.unique(todo // views)))]
        return _compute(images, _jobs(indices, mine, views), len(mine), cut.trunk, preprocessing, spec)

    if not spec.cache:
        unique, place = np.unique(wanted, return_inverse=True)
        store = np.empty((len(unique), *shape), dtype=stored_dtype(shape, spec.dtype))
        for names, features in compute(_firsts(wanted, np.ones(len(wanted), dtype=bool)), True):
            store[np.searchsorted(unique, as_keys(names))] = features
        return Features(store, place.reshape(-1, views), len(unique))
    folder = cache_dir() / "features" / store_name(cut, preprocessing, spec.runtime, spec.dtype)
    alone = not spec.distributed or distributed.world_size() == 1
    try:
        folder.mkdir(parents=True, exist_ok=True)
        feature_store = FeatureStore(folder, shape, spec.dtype)
        rows = feature_store.find(wanted)
        missing = bool((rows < 0).any())
        if not (distributed.all_reduce_scalar(missing) if spec.distributed else missing):  # without the lock, which may be held for long
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
    """(image, its missing views) of each image that lacks some. todo: places in the images at `indices`, view after view."""
    for n, places in itertools.groupby(todo, key=lambda place: int(place) // views):
        yield int(indices[n]), [int(place) % views for place in places]


@torch.inference_mode()
def feature_shape(trunk: nn.Module, preprocessing: Preprocessing) -> tuple[int, ...]:
    """Shape of one image's features."""
    device = next(trunk.parameters()).device
    example = torch.zeros(1, 3, preprocessing.size, preprocessing.size, device=device)
    return tuple(trunk.eval()(example).shape[1:])


def _compute(
    images: ImageSet,
    jobs: Iterable[tuple[int, list[int]]],
    count: int,
    trunk: nn.Module,
    preprocessing: Preprocessing,
    spec: FeatureSpec,
) -> Iterator[tuple[list[bytes], npt.NDArray[Any]]]:
    """Batches of (keys, features) of the missing views, `count` in all, each image read once for all of its views."""
    if not count:
        return
    run = make_executor(trunk, preprocessing, count, spec.runtime)
    dtype = stored_dtype(feature_shape(trunk, preprocessing), spec.dtype)

    def squares_of(job: tuple[int, list[int]]) -> list[tuple[bytes, npt.NDArray[np.uint8]]]:
        i, todo = job
        image = read_image(images.paths[i], preprocessing.min_decode_side)
        squares: dict[int, npt.NDArray[np.uint8]] = {}
        for v in todo:
            mirrored = v == MIRRORED_VIEW and EVAL_VIEW in squares  # the same pixels the other way round
            squares[v] = (
                np.ascontiguousarray(squares[EVAL_VIEW][:, ::-1]) if mirrored else render_view(image, v, images.hashes[i], preprocessing)
            )
        return [(row_key(images.hashes[i], v), square) for v, square in squares.items()]

    def features_of(batch: list[tuple[bytes, npt.NDArray[np.uint8]]]) -> tuple[list[bytes], npt.NDArray[Any]]:
        return [name for name, _ in batch], rounded(batch_invariant(run, np.stack([square for _, square in batch])), dtype)

    squares = itertools.chain.from_iterable(map_ordered(squares_of, jobs, spec.workers))
    with progress("features", count) as advance:
        for names, features in map_ordered(features_of, batched(squares, BATCH), run.max_parallel_batches, ahead=run.max_parallel_batches):
            yield names, features
            advance(len(names))


def rounded(features: npt.NDArray[np.float32], dtype: type[Any]) -> npt.NDArray[Any]:
    """Features as the store keeps them. Raises OutputError where they do not fit half precision."""
    with np.errstate(over="ignore"):
        rounded = features.astype(dtype)
    if not np.isfinite(rounded).all() and np.isfinite(features).all():
        raise OutputError("features of this network exceed half precision (65,504); pass --set feature_dtype=float32")
    return rounded


def render_view(image: Image.Image, view: int, image_hash: str, preprocessing: Preprocessing) -> npt.NDArray[np.uint8]:
    """One numbered view of an RGB image as the network's square, (size, size, 3) uint8."""
    chosen = view_of(view, image_hash, image.width, image.height, preprocessing)
    size = preprocessing.size
    return render(image, chosen, (size, size), preprocessing.interpolation)


def eval_square(image: Image.Image, preprocessing: Preprocessing) -> npt.NDArray[np.uint8]:
    """An RGB image as the network sees it when it answers: (size, size, 3) uint8."""
    view = eval_view(image.width, image.height, preprocessing)
    return render(image, view, (preprocessing.size, preprocessing.size), preprocessing.interpolation)


def square_of(path: Path, preprocessing: Preprocessing) -> npt.NDArray[np.uint8]:
    """An image file as the network sees it when it answers: (size, size, 3) uint8."""
    return eval_square(read_image(path, preprocessing.min_decode_side), preprocessing)


def round_like_stored(features: Tensor, kept: str = "auto") -> Tensor:
    """Rounds (N, *shape) features as the store does, and gives float32 back."""
    return features.half().float() if stored_dtype(features.shape[1:], kept) is np.float16 else features.float()


EMBEDDER = "efficientnet_lite0"


def embed(images: ImageSet, indices: npt.NDArray[np.int64] | None = None, workers: int = 2, keep: bool = True) -> npt.NDArray[np.float32]:
    """(N, 1280) pooled features of the images (or of those at `indices`); what the cache holds is not computed again.

    keep: whether to leave them in the cache.

    They are the features that `--backbone efficientnet_lite0 --unfreeze 0` trains on, so such a run finds them ready.
    """
    chosen = np.arange(len(images)) if indices is None else indices
    backbone = create_backbone(EMBEDDER, 2)
    cut = split_backbone(backbone, 0)
    spec = FeatureSpec(workers=workers, cache=keep, distributed=keep)
    features = extract_features(images, chosen, 1, cut, backbone.preprocessing, spec)
    return features.get(np.arange(len(chosen)))
