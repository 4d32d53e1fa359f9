"""The commands on any number of pictures, here or on Ray: predict and explain shard by shard, features, and the features of audit."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from seewhy.cam import PERTURBATION_METHODS, PIXEL_METHODS
from seewhy.cli_shared import print_json
from seewhy.errors import ConfigError, one_line
from seewhy.explain import check_method, class_index
from seewhy.jobs import Request, prepared
from seewhy.on_ray import engine_named
from seewhy.scale import answer_sources, bad_place, columns_of
from seewhy.sources import find_sources
from seewhy.storage import shown

if TYPE_CHECKING:
    from seewhy.config import TrainConfig
    from seewhy.filling import Filled


def scaled_predict(
    run: Path,
    pictures: list[str],
    out: str | None,
    top_k: int,
    least: float | None,
    precision: float | None,
    engine: str | None,
    address: str,
    workers: int,
    as_json: bool,
) -> None:
    if out is None:
        raise typer.BadParameter("--engine writes a table: add --out answers.parquet (.csv, .json, a folder/ or an address)")
    asked = engine_named(engine, address, workers)
    loaded = prepared("predict", run)
    least = loaded.threshold_for(precision) if precision is not None else least
    options = {"top_k": top_k, "least": least}
    columns = columns_of("predict", options, len(loaded.classes))
    del loaded  # workers load their own
    _tell(out, *answer_sources(Request("predict", str(run), options), columns, find_sources(pictures), out, asked), as_json)


def scaled_explain(
    run: Path,
    pictures: list[str],
    out: str,
    method: str,
    target: str | None,
    contrast: str | None,
    engine: str | None,
    address: str,
    workers: int,
    as_json: bool,
) -> None:
    check_method(method)
    if method in (*PERTURBATION_METHODS, *PIXEL_METHODS):
        raise ConfigError(f"--engine does not ask the network again, which {method} needs; choose gradcam or another closed form")
    out = "heatmaps.parquet" if out == "heatmaps" else out
    if Path(out).suffix in (".csv", ".json"):
        raise ConfigError(f"{out}: heatmaps are pictures, which go into .parquet, a folder/ or an address")
    asked = engine_named(engine, address, workers)
    loaded = prepared("explain", run)
    for name in (target, contrast):
        if name is not None:
            class_index(name, loaded.classes)
    del loaded  # workers load their own
    options = {"method": method, "target": target, "contrast": contrast}
    request = Request("explain", str(run), options)
    _tell(out, *answer_sources(request, columns_of("explain", options, 0), find_sources(pictures), out, asked), as_json)


def _tell(out: str, rows: int, bad: int, as_json: bool) -> None:
    place = bad_place(out)
    if as_json:
        print_json({"out": shown(out), "pictures": rows, "left_out": bad, "bad": shown(place) if bad else None})
        return
    if bad:
        typer.echo(one_line(f"left out: {bad:,} pictures that cannot be used, with reasons in {shown(place)}"), err=True)
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
