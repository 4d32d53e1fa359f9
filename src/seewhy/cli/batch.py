"""Run predict, explain, precompute and audit on any number of images, in shards, on this machine or on Ray."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import typer

from seewhy.cli.options import print_result
from seewhy.config import TrainConfig
from seewhy.data.remote import without_options
from seewhy.errors import ConfigError, RunError, one_line
from seewhy.inference.batch_runner import Task, column_types, run_batch
from seewhy.inference.onnx_model import is_exported, load_onnx
from seewhy.inference.ray_backend import get_backend
from seewhy.inference.result_store import errors_path
from seewhy.inference.work_units import find_sources


@dataclass(frozen=True)
class Batch:
    """Options that predict and explain share; see their help texts."""

    images: list[str]
    out: str | None
    skip_bad: bool
    backend: str | None
    ray_address: str
    workers: int
    as_json: bool


def predict_batch(run: Path, top_k: int, min_confidence: float | None, target_precision: float | None, batch: Batch) -> None:
    """Predict into the table or folder `batch.out`."""
    if batch.out is None:
        raise typer.BadParameter("--backend and addresses need --out: predictions.parquet (or .csv, .json), a folder/ or an address")
    get_backend(batch.backend, batch.ray_address, batch.workers)  # fails before any work
    if is_exported(run):
        loaded: Any = load_onnx(run)
    else:
        from seewhy.api import Run
        from seewhy.inference.tasks import load_model

        loaded = Run(**vars(load_model("predict", run, batch.backend == "ray")))
    min_confidence = loaded.threshold_for(target_precision) if target_precision is not None else min_confidence
    options = {"top_k": top_k, "min_confidence": min_confidence}
    types = column_types("predict", options, len(loaded.classes))
    del loaded  # workers load their own
    _run(Task("predict", str(run), options), types, batch.out, batch)


def explain_batch(run: Path, method: str, target: str | None, contrast: str | None, batch: Batch) -> None:
    """Write heatmaps into the table or folder `batch.out`."""
    from seewhy.explain.cam import PERTURBATION_METHODS, PIXEL_METHODS
    from seewhy.explain.explainer import check_method, class_index
    from seewhy.inference.tasks import load_model

    check_method(method)
    if method in (*PERTURBATION_METHODS, *PIXEL_METHODS):
        raise ConfigError(f"{method} needs many passes of the network per image; for tables use gradcam or another method of one pass")
    out = "heatmaps.parquet" if batch.out in (None, "heatmaps") else str(batch.out)
    if Path(out).suffix in (".csv", ".json"):
        raise ConfigError(f"{out}: heatmaps are arrays; write them to .parquet, a folder/ or an address")
    if is_exported(run):
        raise RunError(f"{run}: an exported file cannot write tables of heatmaps; pass the folder of its run")
    get_backend(batch.backend, batch.ray_address, batch.workers)  # fails before any work
    classes = load_model("explain", run, batch.backend == "ray").classes
    for name in (target, contrast):
        if name is not None:
            class_index(name, classes)
    options = {"method": method, "target": target, "contrast": contrast}
    _run(Task("explain", str(run), options), column_types("explain", options, 0), out, batch)


def _run(task: Task, types: dict[str, type], out: str, batch: Batch) -> None:
    backend = get_backend(batch.backend, batch.ray_address, batch.workers)
    rows, skipped = run_batch(task, types, find_sources(batch.images), out, backend, batch.skip_bad)
    errors = without_options(errors_path(out)) if skipped else None
    if skipped and not batch.as_json:
        typer.echo(one_line(f"skipped {skipped:,} unreadable images (listed in {errors})"), err=True)
    content = {"out": without_options(out), "images": rows, "skipped": skipped, "errors": errors}
    print_result(batch.as_json, content, one_line(f"{rows} images -> {without_options(out)}"))


def precompute(config: TrainConfig, backend: str | None, ray_address: str, workers: int, as_json: bool) -> None:
    """Fill the feature cache for `seewhy train`."""
    from seewhy.inference.precompute import precompute_for_training

    stores = precompute_for_training(config, get_backend(backend, ray_address, workers))
    images, skipped, computed = stores[0].images, stores[0].bad, sum(store.computed for store in stores)
    unreadable = f" (and {skipped:,} unreadable, skipped)" if skipped else ""
    line = f"{images:,} images{unreadable}: computed {computed:,} rows of features, the rest was cached"
    print_result(as_json, {"images": images, "skipped": skipped, "computed": computed}, line)


def precompute_audit(data: str, data_root: str | None, backend: str | None, ray_address: str, workers: int) -> None:
    """Fill the feature cache for `seewhy audit`."""
    from seewhy.data.listing import require_local
    from seewhy.inference.precompute import precompute_embeddings

    require_local(data)  # before any work: features can be computed from an address, the rest of an audit cannot
    precompute_embeddings(data, data_root, get_backend(backend, ray_address, workers))
