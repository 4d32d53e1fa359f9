"""The commands on any number of images, here or on Ray: predict and explain into tables, features, and the features of audit."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from seewhy.cli.options import print_json
from seewhy.data.remote import without_options
from seewhy.errors import ConfigError, RunError, one_line
from seewhy.inference.batch_runner import Request, columns_of, run_batch
from seewhy.inference.onnx_model import is_exported, load_onnx
from seewhy.inference.ray_backend import get_backend
from seewhy.inference.result_store import errors_path
from seewhy.inference.work_units import find_sources

if TYPE_CHECKING:
    from seewhy.config import TrainConfig
    from seewhy.inference.precompute import Filled


@dataclass(frozen=True)
class Batch:
    """What the commands that write tables are given alike: see their options."""

    images: list[str]
    out: str | None
    skip_bad: bool
    backend: str | None
    address: str
    workers: int
    as_json: bool


def predict_batch(run: Path, top_k: int, least: float | None, precision: float | None, batch: Batch) -> None:
    if batch.out is None:
        raise typer.BadParameter(
            "--backend and addresses want a table to write: add --out answers.parquet (.csv, .json, a folder/ or an address)"
        )
    get_backend(batch.backend, batch.address, batch.workers)  # refused before any work
    if is_exported(run):
        loaded: Any = load_onnx(run)
    else:
        from seewhy.inference.tasks import prepared

        loaded = prepared("predict", run, batch.backend == "ray")
    least = loaded.threshold_for(precision) if precision is not None else least
    options = {"top_k": top_k, "min_confidence": least}
    types = columns_of("predict", options, len(loaded.classes))
    del loaded  # workers load their own
    _answer(Request("predict", str(run), options), types, batch.out, batch)


def explain_batch(run: Path, method: str, target: str | None, contrast: str | None, batch: Batch) -> None:
    from seewhy.explain.cam import PERTURBATION_METHODS, PIXEL_METHODS
    from seewhy.explain.explainer import check_method, class_index
    from seewhy.inference.tasks import prepared

    check_method(method)
    if method in (*PERTURBATION_METHODS, *PIXEL_METHODS):
        raise ConfigError(
            f"heatmaps for a table come from one pass of the network, and {method} wants more; choose gradcam or another closed form"
        )
    out = "heatmaps.parquet" if batch.out in (None, "heatmaps") else str(batch.out)
    if Path(out).suffix in (".csv", ".json"):
        raise ConfigError(f"{out}: heatmaps are images, which go into .parquet, a folder/ or an address")
    if is_exported(run):
        raise RunError(f"{run}: an exported file answers, it does not explain images in numbers; pass its run")
    get_backend(batch.backend, batch.address, batch.workers)  # refused before any work
    classes = prepared("explain", run, batch.backend == "ray").classes
    for name in (target, contrast):
        if name is not None:
            class_index(name, classes)
    options = {"method": method, "target": target, "contrast": contrast}
    _answer(Request("explain", str(run), options), columns_of("explain", options, 0), out, batch)


def _answer(request: Request, types: dict[str, type], out: str, batch: Batch) -> None:
    backend = get_backend(batch.backend, batch.address, batch.workers)
    rows, bad = run_batch(request, types, find_sources(batch.images), out, backend, batch.skip_bad)
    place = without_options(errors_path(out))
    if batch.as_json:
        print_json({"out": without_options(out), "images": rows, "skipped": bad, "bad": place if bad else None})
        return
    if bad:
        typer.echo(one_line(f"left out: {bad:,} images that cannot be used, with reasons in {place}"), err=True)
    typer.echo(one_line(f"{rows} images -> {without_options(out)}"))


def precompute(config: TrainConfig, backend: str | None, address: str, workers: int, as_json: bool) -> None:
    """The command `features`."""
    from seewhy.inference.precompute import fill_for_training

    filled = fill_for_training(config, get_backend(backend, address, workers))
    first = filled[0]
    if as_json:
        numbers: dict[str, Any] = {"images": first.images, "skipped": first.bad, "computed": sum(each.computed for each in filled)}
        print_json(numbers)
        return
    typer.echo(_said(filled))


def fill_audit(data: str, data_root: str | None, backend: str | None, address: str, workers: int) -> None:
    """What `audit` reads, by --backend."""
    from seewhy.data.listing import require_local
    from seewhy.inference.precompute import fill_for_embedding

    require_local(data)  # before any work: its features alone could be made of an address
    fill_for_embedding(data, data_root, get_backend(backend, address, workers))


def _said(filled: list[Filled]) -> str:
    first = filled[0]
    bad = f", {first.bad:,} that cannot be used" if first.bad else ""
    return f"{first.images:,} images{bad}; {sum(each.computed for each in filled):,} rows of features computed, all others were there"
