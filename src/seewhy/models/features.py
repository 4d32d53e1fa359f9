"""Compute the frozen trunk's features of images, once for each image and view, and cache them on disk."""

from __future__ import annotations

import errno
import hashlib
import itertools
import json
import time
from collections.abc import Iterable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass, replace
from importlib.metadata import version
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
from seewhy.models.executors import batch_invariant, make_executor, resolve_runtime
from seewhy.models.feature_store import KEY, FeatureStore, StoredRows, as_keys, stored_dtype, take_rows
from seewhy.models.fingerprint import network_hash
from seewhy.models.transforms import EVAL_VIEW, MIRRORED_VIEW, Preprocessing, eval_view, render, view_of
from seewhy.models.trunk_tail import TrunkTail, split_backbone

FORMAT = 4
SHARED_DISK_DELAY = 60  # seconds until files of other machines must appear on a shared disk


@dataclass(frozen=True)
class FeatureSpec:
    """How to compute and store features.

    runtime: 'onnx', 'torch' or 'auto'. workers: decoding threads. cache: store on disk, else in memory. dtype: see `stored_dtype`.
    distributed: all processes request the same features, and each computes its share.
    """

    runtime: str = "auto"
    workers: int = 2
    cache: bool = True
    dtype: str = "auto"
    distributed: bool = False

    @staticmethod
    def of(config: TrainConfig, distributed: bool = False) -> FeatureSpec:
        """Spec of a training with this config."""
        return FeatureSpec(config.runtime, config.workers, config.cache, config.feature_dtype, distributed)


@dataclass(frozen=True, eq=False)
class Features:
    """Outputs of the frozen trunk for N images and V views of each.

    store: (R, *shape) float16 or float32, on disk (memory-mapped) or in memory.
    rows: (N, V) int64, row in `store` of each image and view.
    computed: number of rows computed now and not read from the cache.
    """

    store: npt.NDArray[Any] | StoredRows
    rows: npt.NDArray[np.int64]
    computed: int

    def get(self, images: npt.NDArray[np.int64], views: npt.NDArray[np.int64] | int = 0) -> npt.NDArray[np.float32]:
        """(B, *shape) float32 features of images, as positions in `rows`, and views."""
        return take_rows(self.store, self.rows[images, views])


def store_name(cut: TrunkTail, preprocessing: Preprocessing, runtime: str, dtype: str = "auto") -> str:
    """Content key of a store: hash of trunk, cut point, preprocessing, runtime, dtype and format."""
    assert cut.trunk is not None  # without a trunk there are no features
    package = {"onnx": "onnxruntime", "torch": "torch"}[runtime]  # another version may round differently
    facts = {"format": FORMAT, "network": network_hash(cut.trunk), "place": cut.cut_point, "runtime": f"{package} {version(package)}"}
    facts |= preprocessing.as_dict() | ({} if dtype == "auto" else {"kept": dtype})
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:20]


def row_key(image_hash: str, view: int) -> bytes:
    """Key of one view of one image's content: sha256, 32 bytes."""
    return hashlib.sha256(f"{image_hash} {view}".encode()).digest()


def extract_features(
    images: ImageSet,
    indices: npt.NDArray[np.int64],
    views: int,
    cut: TrunkTail,
    preprocessing: Preprocessing,
    spec: FeatureSpec = FeatureSpec(),
) -> Features:
    """Compute the features of `views` views of the images at `indices`, except those in the cache.

    An interruption keeps the finished rows. Raises OutputError if the cache cannot be written.
    """
    assert cut.trunk is not None
    spec = replace(spec, runtime=resolve_runtime(spec.runtime, len(images)))
    shape = feature_shape(cut.trunk, preprocessing)
    keys = (row_key(images.hashes[i], v) for i in indices for v in range(views))
    wanted = np.fromiter(keys, dtype=KEY, count=len(indices) * views)

    def compute(todo: npt.NDArray[np.int64], sharded: bool) -> Iterator[tuple[list[bytes], npt.NDArray[Any]]]:
        assert cut.trunk is not None
        mine = todo[np.isin(todo // views, distributed.shard(np.unique(todo // views)))] if sharded else todo
        return _compute(images, _jobs(indices, mine, views), len(mine), cut.trunk, preprocessing, spec)

    if not spec.cache:
        unique, rows = np.unique(wanted, return_inverse=True)
        store = np.empty((len(unique), *shape), dtype=stored_dtype(shape, spec.dtype))
        for keys_of_batch, features in compute(_first_missing(wanted, np.ones(len(wanted), dtype=bool)), sharded=False):
            store[np.searchsorted(unique, as_keys(keys_of_batch))] = features
        return Features(store, rows.reshape(-1, views), len(unique))
    folder = cache_dir() / "features" / store_name(cut, preprocessing, spec.runtime, spec.dtype)
    sharded = spec.distributed and distributed.world_size() > 1
    try:
        folder.mkdir(parents=True, exist_ok=True)
        feature_store = FeatureStore(folder, shape, spec.dtype)
        rows = feature_store.find(wanted)
        missing = bool((rows < 0).any())
        if not (distributed.all_reduce_scalar(missing) if spec.distributed else missing):  # without waiting for the lock
            return Features(feature_store.open_rows(), rows.reshape(-1, views), 0)
        barrier = distributed.barrier if sharded else lambda: None
        with feature_store.lock() if not sharded or distributed.is_main_process() else nullcontext():
            barrier()  # the main process holds the lock for all
            todo = _first_missing(wanted, feature_store.find(wanted) < 0)  # another training may have written some meanwhile
            barrier()  # every process has read before any writes
            if len(todo):
                feature_store.append(compute(todo, sharded), distributed.rank() if sharded else 0)
            barrier()
        rows = feature_store.find(wanted)
        seconds_left = SHARED_DISK_DELAY if sharded else 0
        while seconds_left and (rows < 0).any():
            time.sleep(1)
            rows, seconds_left = feature_store.find(wanted), seconds_left - 1
        if (rows < 0).any():
            raise OutputError(f"{folder}: features of another machine are missing; set SEEWHY_CACHE to a folder shared by all machines")
        return Features(feature_store.open_rows(), rows.reshape(-1, views), len(todo))
    except OSError as error:
        advice = "free some space or" if error.errno == errno.ENOSPC else "make it writable, or"
        raise OutputError(
            f"{folder}: cannot write features ({error.strerror}); {advice} set SEEWHY_CACHE to another folder, or pass --no-cache"
        ) from error


def _first_missing(wanted: npt.NDArray[np.bytes_], missing: npt.NDArray[np.bool_]) -> npt.NDArray[np.int64]:
    """Sorted positions of the first occurrence of each missing key."""
    first = np.unique(wanted, return_index=True)[1]
    return np.sort(first[missing[first]])


def _jobs(indices: npt.NDArray[np.int64], todo: npt.NDArray[np.int64], views: int) -> Iterator[tuple[int, list[int]]]:
    """Pairs of an image and its views to compute. todo: positions n * views + v, sorted, for view v of the image at indices[n]."""
    for n, positions in itertools.groupby(todo, key=lambda position: int(position) // views):
        yield int(indices[n]), [int(position) % views for position in positions]


@torch.inference_mode()
def feature_shape(trunk: nn.Module, preprocessing: Preprocessing) -> tuple[int, ...]:
    """Shape of one image's features, without the batch axis."""
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
    """Compute batches of keys and features of `count` views; each image is read once for all of its views."""
    if not count:
        return
    run = make_executor(trunk, preprocessing, count, spec.runtime)
    dtype = stored_dtype(feature_shape(trunk, preprocessing), spec.dtype)

    def render_views(job: tuple[int, list[int]]) -> list[tuple[bytes, npt.NDArray[np.uint8]]]:
        i, todo = job
        image = read_image(images.paths[i], preprocessing.min_decode_side)
        pixels: dict[int, npt.NDArray[np.uint8]] = {}
        for v in todo:
            if v == MIRRORED_VIEW and EVAL_VIEW in pixels:
                pixels[v] = np.ascontiguousarray(pixels[EVAL_VIEW][:, ::-1])
            else:
                pixels[v] = render_view(image, v, images.hashes[i], preprocessing)
        return [(row_key(images.hashes[i], v), pixels[v]) for v in todo]

    def run_batch(batch: list[tuple[bytes, npt.NDArray[np.uint8]]]) -> tuple[list[bytes], npt.NDArray[Any]]:
        return [key for key, _ in batch], round_to(batch_invariant(run, np.stack([pixels for _, pixels in batch])), dtype)

    views = itertools.chain.from_iterable(map_ordered(render_views, jobs, spec.workers))
    with progress("features", count) as advance:
        for keys, features in map_ordered(run_batch, batched(views, BATCH), run.max_parallel_batches, ahead=run.max_parallel_batches):
            yield keys, features
            advance(len(keys))


def round_to(features: npt.NDArray[np.float32], dtype: type[Any]) -> npt.NDArray[Any]:
    """Round features to the stored type. Raises OutputError if they overflow half precision."""
    with np.errstate(over="ignore"):
        rounded = features.astype(dtype)
    if not np.isfinite(rounded).all() and np.isfinite(features).all():
        raise OutputError("features of this network exceed half precision (65,504); pass --set feature_dtype=float32")
    return rounded


def render_view(image: Image.Image, view: int, image_hash: str, preprocessing: Preprocessing) -> npt.NDArray[np.uint8]:
    """Render view number `view` of an RGB image as network input, (size, size, 3) uint8."""
    rendered = view_of(view, image_hash, image.width, image.height, preprocessing)
    return render(image, rendered, (preprocessing.size, preprocessing.size), preprocessing.interpolation)


def eval_pixels(image: Image.Image, preprocessing: Preprocessing) -> npt.NDArray[np.uint8]:
    """Render the evaluation view of an RGB image as network input, (size, size, 3) uint8."""
    view = eval_view(image.width, image.height, preprocessing)
    return render(image, view, (preprocessing.size, preprocessing.size), preprocessing.interpolation)


def load_pixels(path: Path, preprocessing: Preprocessing) -> npt.NDArray[np.uint8]:
    """Read an image file and render its evaluation view, (size, size, 3) uint8."""
    return eval_pixels(read_image(path, preprocessing.min_decode_side), preprocessing)


def round_like_stored(features: Tensor, dtype: str = "auto") -> Tensor:
    """Round (N, *shape) features as the store does, to float32, so that training without the cache gives the same bits."""
    return features.half().float() if stored_dtype(features.shape[1:], dtype) is np.float16 else features.float()


EMBEDDER = "efficientnet_lite0"


def embed(images: ImageSet, indices: npt.NDArray[np.int64] | None = None, workers: int = 2, cache: bool = True) -> npt.NDArray[np.float32]:
    """(N, 1280) pooled features of the images, or of those at `indices`, by efficientnet_lite0.

    `--backbone efficientnet_lite0 --unfreeze 0` trains on the same features and finds them in the cache.
    """
    indices = np.arange(len(images)) if indices is None else indices
    backbone = create_backbone(EMBEDDER, 2)
    spec = FeatureSpec(workers=workers, cache=cache, distributed=cache)
    features = extract_features(images, indices, 1, split_backbone(backbone, 0), backbone.preprocessing, spec)
    return features.get(np.arange(len(indices)))
