"""Fill the cache for a training: check all images and compute the frozen trunk's features, on any backend."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from seewhy.config import TrainConfig, dump_config, make_config
from seewhy.core.cache import cache_dir
from seewhy.core.progress import LOG
from seewhy.curation.grouping import MANY
from seewhy.data.listing import list_data
from seewhy.data.remote import is_address
from seewhy.data.verify import CHECK_FIELDS, ImageCheck, record_checks
from seewhy.errors import ConfigError, OutputError
from seewhy.inference.batch_runner import Backend, Task
from seewhy.inference.result_store import Chunk, ResultStore
from seewhy.inference.tasks import build_trunk_tail
from seewhy.inference.work_units import ASSUMED_IMAGES, Source, find_sources, sources_from_paths
from seewhy.models.executors import resolve_runtime
from seewhy.models.feature_store import FeatureStore, KeyIndex, as_keys
from seewhy.models.features import EMBEDDER, feature_shape, row_key, store_name
from seewhy.version import __version__

JOURNAL_COLUMNS: dict[str, type] = {"path": str, **CHECK_FIELDS}


@dataclass(frozen=True)
class PrecomputeResult:
    """images: number checked, now or before. bad: of them that cannot be used. computed: number of new feature rows."""

    images: int
    bad: int
    computed: int


def precompute_for_training(config: TrainConfig, backend: Backend) -> list[PrecomputeResult]:
    """Compute what `train` reads: features of the frozen trunk and, if it searches for near-duplicates, of the embedder.

    Raises ConfigError if such a training caches no features.
    """
    config = config.resolved()
    if config.unfreeze == "all" or config.fresh_views or not config.cache:
        raise ConfigError("nothing to precompute: --unfreeze all, --views 0 and --no-cache train on images; choose other values")
    sources, images, classes = _find_sources(config)
    results = [_precompute(config, max(config.views, 2 if config.tta_flip else 1), sources, images, classes, backend)]
    if config.group_by == "duplicates" and images <= MANY:
        results.append(precompute_embeddings(config.data, config.data_root, backend))
    return results


def precompute_embeddings(data: str, data_root: str | None, backend: Backend) -> PrecomputeResult:
    """Compute what `audit` and the search for near-duplicates read: one view of each image by the embedder."""
    config = make_config(data=data, data_root=data_root, backbone=EMBEDDER, unfreeze=0).resolved()
    sources, images, _ = _find_sources(config)
    return _precompute(config, 1, sources, images, 2, backend)


def _find_sources(config: TrainConfig) -> tuple[list[Source], int, int]:
    """Return the sources and the numbers of images and of classes; assumed numbers for an address, which is not listed in full."""
    if is_address(config.data):
        return find_sources([config.data]), ASSUMED_IMAGES, 2
    listing = list_data(config.data, config.data_root)
    return sources_from_paths(listing.paths), len(listing.paths), len(set(listing.class_names))


def _precompute(
    config: TrainConfig, views: int, sources: Sequence[Source], images: int, classes: int, backend: Backend
) -> PrecomputeResult:
    backbone, split = build_trunk_tail(config, classes)
    if split.trunk is None:
        raise ConfigError(f"nothing to precompute: --unfreeze {config.unfreeze} trains all of {config.backbone}; choose a smaller one")
    runtime = resolve_runtime(config.runtime, images)
    name = store_name(split, backbone.preprocessing, runtime, config.feature_dtype)
    store = FeatureStore(cache_dir() / "features" / name, feature_shape(split.trunk, backbone.preprocessing), config.feature_dtype)
    worker_config = dump_config(config)
    if config.weights and Path(config.weights).is_file():  # workers may run in another folder
        worker_config["weights"] = str(Path(config.weights).resolve())
    task = Task("features", "", {"config": worker_config, "classes": classes, "views": views, "runtime": runtime})
    manifest = {"seewhy": __version__, "store": name, "views": views}
    folder = cache_dir() / "filled" / hashlib.sha256(json.dumps(manifest).encode()).hexdigest()[:20]
    try:
        store.folder.mkdir(parents=True, exist_ok=True)
        with store.lock():
            journal = ResultStore(str(folder), manifest, JOURNAL_COLUMNS)
            journal.open(overwrite=True)
            keys, stored = [source.key for source in sources], store.key_index()
            journal.finished = {key: count for key, count in journal.finished.items() if _is_stored(journal, key, stored, views)}
            pending = [source for source in sources if source.key not in journal.finished]
            if len(pending) < len(sources):
                LOG.info(f"{len(sources) - len(pending):,} of {len(sources):,} shards and blocks of files are in the cache already")
            computed = 0
            for result in backend(task, pending) if pending else ():
                source = pending[result.source]
                computed += _store_chunk(result.chunk, is_address(source.paths[0]), store, stored)
                facts = {name: values for name, values in result.chunk.columns.items() if name in JOURNAL_COLUMNS}
                journal.add(source.key, replace(result, chunk=Chunk(facts, result.chunk.bad)))
            counts = [(chunk.rows, sum(map(bool, chunk.columns["problem"])) + len(chunk.bad)) for chunk in journal.chunks(keys)]
    except OSError as error:
        raise OutputError(
            f"{store.folder}: features cannot be written ({error.strerror}); free some space, or set SEEWHY_CACHE to another folder"
        ) from error
    return PrecomputeResult(sum(rows for rows, _ in counts), sum(bad for _, bad in counts), computed)


def _is_stored(journal: ResultStore, key: str, stored: KeyIndex, views: int) -> bool:
    """Whether the features of all images of a finished source are still in the store, which may have been cleared."""
    rows = [
        row_key(sha256, view)
        for chunk in journal.chunks([key])
        for sha256, problem in zip(chunk.columns["sha256"], chunk.columns["problem"], strict=True)
        if not problem
        for view in range(views)
    ]
    return not rows or not stored.missing(as_keys(rows)).any()


def _store_chunk(chunk: Chunk, remote: bool, store: FeatureStore, stored: KeyIndex) -> int:
    """Append a chunk's new features to the store and, unless remote, its checks to the record; return the number of new rows."""
    columns: dict[str, list[Any]] = chunk.columns
    if not columns:
        return 0
    features: dict[bytes, bytes] = {}
    for sha256, data in zip(columns["sha256"], columns["views"], strict=True):
        for view in range(len(data) // store.row_bytes):
            features[row_key(sha256, view)] = data[view * store.row_bytes : (view + 1) * store.row_bytes]
    new = [key for key, missing in zip(features, stored.missing(as_keys(list(features))), strict=True) if missing] if features else []
    if new:
        rows = np.frombuffer(b"".join(features[key] for key in new), dtype=store.dtype).reshape(len(new), *store.shape)
        store.append(iter([(new, rows)]))
        stored.add(as_keys(new))
    if not remote:
        checked = [ImageCheck(*values) for values in zip(*(columns[name] for name in CHECK_FIELDS), strict=True)]
        record_checks([Path(name) for name in columns["path"]], checked)
    return len(new)
