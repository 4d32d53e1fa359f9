"""DATA x TrainConfig -> the cache as its training wants it: checked images and the frozen trunk's features, by any backend of scale."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
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
from seewhy.inference.batch_runner import Backend, Request
from seewhy.inference.result_store import Chunk, ChunkResult, Store
from seewhy.inference.tasks import frozen_part
from seewhy.inference.work_units import Source, find_sources, sources_of
from seewhy.models.executors import resolve_runtime
from seewhy.models.feature_store import FeatureStore, KeyIndex, as_keys
from seewhy.models.features import EMBEDDER, feature_shape, row_key, store_name
from seewhy.version import __version__

KEPT: dict[str, type] = {"path": str, **CHECK_FIELDS}  # of an image, beside its features


@dataclass(frozen=True)
class Filled:
    """images: looked at now or before. bad: those of them that cannot be used. computed: rows of features that are new."""

    images: int
    bad: int
    computed: int


def fill_for_training(config: TrainConfig, backend: Backend) -> list[Filled]:
    """What `train` with this config reads: features of the frozen trunk and, where near-duplicates are looked for, of the embedder.

    Raises ConfigError where such a training keeps no features.
    """
    config = config.resolved()
    if config.unfreeze == "all" or config.fresh_views or not config.cache:
        raise ConfigError("nothing to keep: --unfreeze all, --views 0 and --no-cache train on images; choose an --unfreeze and views")
    sources, images, classes = _sources_of(config)
    filled = [_fill(config, max(config.views, 2 if config.tta_flip else 1), sources, images, classes, backend)]
    if config.group_by == "duplicates" and images <= MANY:
        filled.append(fill_for_embedding(config.data, config.data_root, backend))
    return filled


def fill_for_embedding(data: str, data_root: str | None, backend: Backend) -> Filled:
    """What `audit` and the search for near-duplicates read: one view by the network that comes with the package."""
    config = make_config(data=data, data_root=data_root, backbone=EMBEDDER, unfreeze=0).resolved()
    sources, images, _ = _sources_of(config)
    return _fill(config, 1, sources, images, 2, backend)


def _sources_of(config: TrainConfig) -> tuple[list[Source], int, int]:
    """Sources, the number of images (a million where only reading would tell) and of classes."""
    if is_address(config.data):
        return find_sources([config.data]), 1_000_000, 2
    listing = list_data(config.data, config.data_root)
    return sources_of(listing.paths), len(listing.paths), len(set(listing.class_names))


def _fill(config: TrainConfig, views: int, sources: Sequence[Source], images: int, classes: int, backend: Backend) -> Filled:
    backbone, cut = frozen_part(config, classes)
    if cut.trunk is None:
        raise ConfigError(f"nothing to keep: --unfreeze {config.unfreeze} trains all of {config.backbone}; choose a smaller one")
    runs = resolve_runtime(config.runtime, images)
    name = store_name(cut, backbone.preprocessing, runs, config.feature_dtype)
    store = FeatureStore(cache_dir() / "features" / name, feature_shape(cut.trunk, backbone.preprocessing), config.feature_dtype)
    given = dump_config(config)
    if config.weights and Path(config.weights).is_file():  # workers may stand in another folder
        given["weights"] = str(Path(config.weights).resolve())
    options = {"config": given, "classes": classes, "views": views, "runtime": runs}
    record = {"seewhy": __version__, "store": name, "views": views}
    place = cache_dir() / "filled" / hashlib.sha256(json.dumps(record).encode()).hexdigest()[:20]
    try:
        store.folder.mkdir(parents=True, exist_ok=True)
        with store.lock():
            journal = Store(str(place), record, KEPT)
            journal.open(own=True)
            keys, known = [source.key for source in sources], store.key_index()
            journal.finished = {key: count for key, count in journal.finished.items() if _stored(journal, key, known, views)}
            left = [number for number, key in enumerate(keys) if key not in journal.finished]
            if len(left) < len(sources):
                LOG.info(f"going on: {len(sources) - len(left):,} of {len(sources):,} shards and blocks of files are in the cache")
            computed = 0
            request = Request("features", "", options)
            for outcome in backend(request, [sources[number] for number in left]) if left else ():
                source = sources[left[outcome.source]]
                computed += _keep(outcome, source, store, known)
                journal.add(source.key, _facts(outcome))
            counts = [(piece.rows, sum(map(bool, piece.columns["problem"])) + len(piece.bad)) for piece in journal.pieces(keys)]
    except OSError as error:
        raise OutputError(
            f"{store.folder}: features cannot be kept ({error.strerror}); free some space, or set SEEWHY_CACHE to another folder"
        ) from error
    return Filled(sum(rows for rows, _ in counts), sum(bad for _, bad in counts), computed)


def _stored(journal: Store, key: str, known: KeyIndex, views: int) -> bool:
    """Whether the rows of all images of a source are in the store, which may have been cleared since."""
    names = [
        row_key(sha256, view)
        for piece in journal.pieces([key])
        for sha256, problem in zip(piece.columns["sha256"], piece.columns["problem"], strict=True)
        if not problem
        for view in range(views)
    ]
    return not names or not known.missing(as_keys(names)).any()


def _keep(outcome: ChunkResult, source: Source, store: FeatureStore, known: KeyIndex) -> int:
    """A piece's features into the store, those that it lacks, and its facts into the record of checked files; the number of new rows."""
    columns = outcome.piece.columns
    if not columns:
        return 0
    new: dict[bytes, bytes] = {}
    for sha256, data in zip(columns["sha256"], columns["views"], strict=True):
        for view in range(len(data) // store.row_bytes):
            new[row_key(sha256, view)] = data[view * store.row_bytes : (view + 1) * store.row_bytes]
    if new:
        missing = [name for name, is_missing in zip(new, known.missing(as_keys(list(new))), strict=True) if is_missing]
        rows = np.frombuffer(b"".join(new[name] for name in missing), dtype=store.dtype).reshape(len(missing), *store.shape)
        if missing:
            store.append(iter([(missing, rows)]))
            known.add(as_keys(missing))
    if not is_address(source.places[0]):
        checked = [ImageCheck(*values) for values in zip(*(columns[name] for name in CHECK_FIELDS), strict=True)]
        record_checks([Path(name) for name in columns["path"]], checked)
    return len(missing) if new else 0


def _facts(outcome: ChunkResult) -> ChunkResult:
    """A piece without its features."""
    columns: dict[str, list[Any]] = {name: values for name, values in outcome.piece.columns.items() if name in KEPT}
    return ChunkResult(outcome.source, outcome.number, outcome.last, Chunk(columns, outcome.piece.bad))
