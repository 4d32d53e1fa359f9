"""The commands on any number of pictures, here or on Ray: predict and explain into tables, features, and the features of audit."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from seewhy.cli_shared import print_json
from seewhy.errors import ConfigError, RunError, one_line
from seewhy.on_ray import engine_named
from seewhy.result_store import bad_place
from seewhy.runtime import is_exported, load_onnx
from seewhy.scale import Request, answer_sources, columns_of
from seewhy.sources import find_sources
from seewhy.storage import shown

if TYPE_CHECKING:
    from seewhy.config import TrainConfig
    from seewhy.filling import Filled


@dataclass(frozen=True)
class Batch:
    """What the commands that write tables are given alike: see their options."""

    pictures: list[str]
    out: str | None
    skip_bad: bool
    engine: str | None
    address: str
    workers: int
    as_json: bool


def predict_batch(run: Path, top_k: int, least: float | None, precision: float | None, batch: Batch) -> None:
    if batch.out is None:
        raise typer.BadParameter(
            "--engine and addresses want a table to write: add --out answers.parquet (.csv, .json, a folder/ or an address)"
        )
    engine_named(batch.engine, batch.address, batch.workers)  # refused before any work
    if is_exported(run):
        loaded: Any = load_onnx(run)
    else:
        from seewhy.jobs import prepared

        loaded = prepared("predict", run)
    least = loaded.threshold_for(precision) if precision is not None else least
    options = {"top_k": top_k, "least": least}
    types = columns_of("predict", options, len(loaded.classes))
    del loaded  # workers load their own
    _answer(Request("predict", str(run), options), types, batch.out, batch)


def explain_batch(run: Path, method: str, target: str | None, contrast: str | None, batch: Batch) -> None:
    from seewhy.cam import PERTURBATION_METHODS, PIXEL_METHODS
    from seewhy.explain import check_method, class_index
    from seewhy.jobs import prepared

    check_method(method)
    if method in (*PERTURBATION_METHODS, *PIXEL_METHODS):
        raise ConfigError(
            f"heatmaps for a table come from one pass of the network, and {method} wants more; choose gradcam or another closed form"
        )
    out = "heatmaps.parquet" if batch.out in (None, "heatmaps") else str(batch.out)
    if Path(out).suffix in (".csv", ".json"):
        raise ConfigError(f"{out}: heatmaps are pictures, which go into .parquet, a folder/ or an address")
    if is_exported(run):
        raise RunError(f"{run}: an exported file answers, it does not explain pictures in numbers; pass its run")
    engine_named(batch.engine, batch.address, batch.workers)  # refused before any work
    classes = prepared("explain", run).classes
    for name in (target, contrast):
        if name is not None:
            class_index(name, classes)
    options = {"method": method, "target": target, "contrast": contrast}
    _answer(Request("explain", str(run), options), columns_of("explain", options, 0), out, batch)


def _answer(request: Request, types: dict[str, type], out: str, batch: Batch) -> None:
    engine = engine_named(batch.engine, batch.address, batch.workers)
    rows, bad = answer_sources(request, types, find_sources(batch.pictures), out, engine, batch.skip_bad)
    place = shown(bad_place(out))
    if batch.as_json:
        print_json({"out": shown(out), "pictures": rows, "left_out": bad, "bad": place if bad else None})
        return
    if bad:
        typer.echo(one_line(f"left out: {bad:,} pictures that cannot be used, with reasons in {place}"), err=True)
    typer.echo(one_line(f"{rows} pictures -> {shown(out)}"))


def fill_features(config: TrainConfig, engine: str | None, address: str, workers: int, as_json: bool) -> None:
    """The command `features`."""
    from seewhy.filling import fill_for_training

    filled = fill_for_training(config, engine_named(engine, address, workers))
    first = filled[0]
    if as_json:
        numbers: dict[str, Any] = {"pictures": first.pictures, "left_out": first.bad, "computed": sum(each.computed for each in filled)}
        print_json(numbers)
        return
    typer.echo(_said(filled))


def fill_audit(data: str, data_root: str | None, engine: str | None, address: str, workers: int) -> None:
    """What `audit` reads, by --engine."""
    from seewhy.filling import fill_for_embedding
    from seewhy.images import check_here

    check_here(data)  # before any work: its features alone could be made of an address
    fill_for_embedding(data, data_root, engine_named(engine, address, workers))


def _said(filled: list[Filled]) -> str:
    first = filled[0]
    bad = f", {first.bad:,} that cannot be used" if first.bad else ""
    return f"{first.pictures:,} pictures{bad}; {sum(each.computed for each in filled):,} rows of features computed, all others were there"
