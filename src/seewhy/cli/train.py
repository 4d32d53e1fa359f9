"""Define the train and precompute commands, whose options derive from the fields of TrainConfig."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin

import typer
from pydantic.fields import FieldInfo

from seewhy.cli.options import DATA_HELP, BackendOption, JsonOption, RayAddressOption, RayWorkersOption, print_result
from seewhy.config import TrainConfig, make_config, parse_settings, read_config
from seewhy.errors import RunError, one_line

METAVAR_WIDTH = 18  # characters; `--help` cuts longer ones off in a terminal of 80 columns
Parameters = list[tuple[str, Any, Any]]  # (name, annotation, default) of each


def _make_config(own: dict[str, Any], fields: dict[str, Any]) -> TrainConfig:
    """Build the config from --config, --set and the options; later ones override earlier ones."""
    values = read_config(own["config"]) if own["config"] else {}
    values |= parse_settings(own["set"] or []) | {name: value for name, value in fields.items() if value is not None}
    if own["data"] is not None:
        values["data"] = own["data"]
    if "data" not in values:
        raise typer.BadParameter("name a dataset (caltech101, scenes), a folder of class folders, or a --config that does")
    return make_config(**values)


def _train(own: dict[str, Any], fields: dict[str, Any]) -> Path | None:
    """Train a classifier, evaluate it on held-out images, and write the run with its report."""
    config = _make_config(own, fields)
    out, resume, repeats, as_json = own["out"], own["resume"], own["repeats"], own["json"]
    from seewhy.core import distributed

    several = own["devices"] > 1 or own["nodes"] > 1
    if own["dry_run"]:
        if several or repeats > 1:
            raise typer.BadParameter("--dry-run checks one run in one process; leave out --devices, --nodes and --repeats")
        from seewhy.training.dry_run import describe, dry_run

        facts = dry_run(config, out, resume)
        print_result(as_json, facts, *map(one_line, describe(facts)))
        return None
    if repeats > 1:
        if several or distributed.is_distributed():
            raise typer.BadParameter("--repeats trains one run after another in one process; leave out --devices, --nodes and torchrun")
        from seewhy.training.repeats import repeat, spread

        folder, table = repeat(config, repeats, out, resume)
        numbers = spread(table)
        rows = {name: numbers[f"test_{name}"] for name in ("accuracy", "mean_per_class_accuracy")}
        lines = [f"test {name.replace('_', ' '):24} {row['mean']:.2%} ± {row['sd']:.2%}" for name, row in rows.items()]
        title = f"runs    {folder} ({repeats} splits; mean ± standard deviation over them)"
        print_result(as_json, {"runs": str(folder), "n": repeats, **numbers}, title, *lines)
        return None
    if several and not distributed.is_distributed():  # without importing torch, so that the child processes start at once
        from seewhy.training.launch import launch

        path = launch(config, out, resume, own["devices"], own["nodes"], own["rendezvous"])
    else:
        from seewhy.training.pipeline import train_run

        try:
            path = train_run(config, out, resume).path
        except RuntimeError as error:
            if not (distributed.is_distributed() and distributed.is_peer_failure(error)):
                raise
            raise RunError("another process of this training failed; see its message, then re-run with --resume") from error
    if distributed.launched_as_main():
        from seewhy.models.manifest import read_manifest

        report = path / "report.html"
        facts = {name: read_manifest(path)[name] for name in ("seconds", "metrics")} if as_json else {}
        print_result(as_json, {"run": str(path), "report": str(report), **facts}, f"run     {path}", f"report  {report}")
    return path


def _precompute(own: dict[str, Any], fields: dict[str, Any]) -> None:
    """Precompute the frozen features that `train` with the same options reads from the cache, here or on Ray."""
    from seewhy.cli.batch import precompute

    precompute(_make_config(own, fields), own["backend"], own["ray_address"], own["ray_workers"], own["json"])


# ---------------------------------------------------------------- options from the fields of TrainConfig


def _field_option(name: str, field: FieldInfo) -> Any:
    """Build the option of a field of TrainConfig, which also parses values of several types."""
    kind: Any = field.annotation
    flag, default = name.replace("_", "-"), field.default
    types = [item for item in get_args(kind) if item is not type(None)]
    choices = list(map(str, types)) if get_origin(kind) is Literal else []
    notes = [f"default: {default}"] if default not in (None, True, False) else []
    metavar = "|".join(choices) or None
    if choices and len("|".join(choices)) > METAVAR_WIDTH:
        metavar, notes = name.upper(), [f"{', '.join(choices[:-1])} or {choices[-1]}", *notes]
    text = f"{field.description}" + (f" ({'; '.join(notes)})" if notes else "")
    flags = f"--{flag}/--no-{flag}" if kind is bool and default else f"--{flag}"
    option_type = types[0] if len(types) == 1 and not choices else str if types else kind
    return Annotated[option_type | None, typer.Option(flags, help=text, metavar=metavar, show_default=False)]


def _command(name: str, fixed: Parameters, work: Callable[[dict[str, Any], dict[str, Any]], Any]) -> Callable[..., Any]:
    """Build a command of `fixed` parameters and one option for each field of TrainConfig that is marked for the command line.

    work: called with the values of `fixed` and those of the fields (None if not given), each by name; its docstring is the help text.
    """
    derived = [
        (field_name, _field_option(field_name, field), None)
        for field_name, field in TrainConfig.model_fields.items()
        if isinstance(field.json_schema_extra, dict) and field.json_schema_extra.get("cli")
    ]
    parameters = [
        inspect.Parameter(name, inspect.Parameter.POSITIONAL_OR_KEYWORD, default=default, annotation=annotation)
        for name, annotation, default in [*fixed, *derived]
    ]

    def command(**values: Any) -> Any:
        return work({name: values.pop(name) for name, _, _ in fixed}, values)

    command.__name__, command.__doc__ = name, work.__doc__
    command.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]  # read by typer
    command.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return command


COMMON: Parameters = [
    ("config", Annotated[Path | None, typer.Option(help="YAML or JSON file of options, or the run.json of a run")], None),
    ("set", Annotated[list[str] | None, typer.Option(metavar="NAME=VALUE", help="set any other option; repeatable")], None),
    ("json", JsonOption, False),
]
TRAIN: Parameters = [
    ("data", Annotated[str | None, typer.Argument(metavar="DATA", help=DATA_HELP)], None),
    ("out", Annotated[Path | None, typer.Option(help="the run's folder (default: runs/NAME)")], None),
    (
        "dry_run",
        Annotated[bool, typer.Option("--dry-run", help="show data, model and estimated time, without training or writing anything")],
        False,
    ),
    ("resume", Annotated[bool, typer.Option("--resume", help="resume an unfinished run of the same options")], False),
    ("devices", Annotated[int, typer.Option(min=1, help="GPUs of this machine to train on, or processes on its CPU")], 1),
    ("nodes", Annotated[int, typer.Option(min=1, help="machines to train on; run the same command on each")], 1),
    ("rendezvous", Annotated[str | None, typer.Option(metavar="HOST:PORT", help="address of one of the machines, for --nodes")], None),
    ("repeats", Annotated[int, typer.Option(min=1, help="train on this many random splits, seeded from --seed on")], 1),
    *COMMON,
]
PRECOMPUTE: Parameters = [
    ("data", Annotated[str | None, typer.Argument(metavar="DATA", help=f"{DATA_HELP}; or an address")], None),
    ("backend", BackendOption, "local"),
    ("ray_address", RayAddressOption, ""),
    ("ray_workers", RayWorkersOption, 0),
    *COMMON,
]
train = _command("train", TRAIN, _train)
precompute = _command("precompute", PRECOMPUTE, _precompute)
