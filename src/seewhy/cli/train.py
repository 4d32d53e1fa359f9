"""The train and features commands, whose options derive from the fields of TrainConfig."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin

import typer

from seewhy.cli.options import BackendOption, JsonOption, RayAddressOption, RayWorkersOption, print_json
from seewhy.config import TrainConfig, make_config, parse_settings, read_config
from seewhy.errors import RunError, one_line


def _config_of(own: dict[str, Any], given: dict[str, Any]) -> TrainConfig:
    """The config that --config, --set and the options make, the later ones over the earlier."""
    values = read_config(own["config"]) if own["config"] else {}
    values |= parse_settings(own["set"] or []) | {name: value for name, value in given.items() if value is not None}
    if own["data"] is not None:
        values["data"] = own["data"]
    if "data" not in values:
        raise typer.BadParameter("name a dataset (caltech101, scenes), a folder of class folders, or a --config that does")
    return make_config(**values)


def _train(own: dict[str, Any], given: dict[str, Any]) -> Path | None:
    """Train one run and return its folder; None for --repeats, which trains several."""
    config = _config_of(own, given)
    out, resume, repeats, as_json = own["out"], own["resume"], own["repeats"], own["json"]
    from seewhy.core import distributed

    several = own["devices"] > 1 or own["nodes"] > 1
    if own["dry_run"]:
        if several or repeats > 1:
            raise typer.BadParameter("--dry-run is of one run in one process; leave --devices, --nodes and --repeats out")
        _dry_run(config, out, resume, as_json)
        return None
    if repeats > 1:
        if several or distributed.is_distributed():
            raise typer.BadParameter("--repeats trains one run after another in one process; leave out --devices, --nodes and torchrun")
        _repeat(config, repeats, out, resume, as_json)
        return None
    if several and not distributed.is_distributed():  # does not import what trains: the child processes start the sooner
        from seewhy.training.launch import launch

        path = launch(config, out, resume, own["devices"], own["nodes"], own["rendezvous"])
    else:
        from seewhy.training.pipeline import train_run

        try:
            path = train_run(config, out, resume).path
        except RuntimeError as error:
            if not (distributed.is_distributed() and distributed.is_peer_failure(error)):
                raise
            line = "another process of this training has ended; its own line says why, and the same command with --resume goes on"
            raise RunError(line) from error
    if distributed.launched_as_main():
        _print_run(path, as_json)
    return path


def _print_run(path: Path, as_json: bool) -> None:
    if as_json:
        from seewhy.models.manifest import read_manifest

        manifest = read_manifest(path)
        told = {"seconds": manifest["seconds"], "metrics": manifest["metrics"]}
        print_json({"run": str(path), "report": str(path / "report.html"), **told})
    else:
        typer.echo(f"run     {path}\nreport  {path / 'report.html'}")


def _repeat(config: TrainConfig, repeats: int, out: Path | None, resume: bool, as_json: bool) -> None:
    from seewhy.training.repeats import repeat, spread

    folder, table = repeat(config, repeats, out, resume)
    numbers = spread(table)
    if as_json:
        print_json({"runs": str(folder), "n": repeats, **numbers})
        return
    typer.echo(f"runs    {folder} ({repeats} splits)")
    for name in ("accuracy", "mean_per_class_accuracy"):
        found = numbers[f"test_{name}"]
        typer.echo(f"test {name.replace('_', ' '):24} {found['mean']:.2%} ± {found['sd']:.2%} (standard deviation over the splits)")


def _dry_run(config: TrainConfig, out: Path | None, resume: bool, as_json: bool) -> None:
    from seewhy.training.dry_run import describe, dry_run

    facts = dry_run(config, out, resume)
    if as_json:
        print_json(facts)
        return
    for line in describe(facts):
        typer.echo(one_line(line))


def _precompute(own: dict[str, Any], given: dict[str, Any]) -> None:
    from seewhy.cli.batch import precompute

    precompute(_config_of(own, given), own["backend"], own["address"], own["ray_workers"], own["json"])


def _option_type(annotation: Any) -> Any:
    """The command line's type of a field: flags stay bool, everything else is read by TrainConfig."""
    arguments = [a for a in get_args(annotation) if a is not type(None)]
    if annotation is bool:
        return bool
    if get_origin(annotation) is Literal or len(arguments) > 1:
        return str
    return arguments[0] if arguments else annotation


def _metavar(annotation: Any) -> str | None:
    if get_origin(annotation) is Literal:
        return "|".join(str(choice) for choice in get_args(annotation))
    return None


def _with_train_options(fixed: list[tuple[str, Any, Any]], work: Callable[[dict[str, Any], dict[str, Any]], Any]) -> Any:
    """A command of `fixed` parameters and one option for every field of TrainConfig that is marked for the command line.

    fixed: (name, annotation, default) each. work: gets the values of these, and those of the fields that were given.
    """
    derived = []
    for name, field in TrainConfig.model_fields.items():
        extra = field.json_schema_extra
        if not (isinstance(extra, dict) and extra.get("cli")):
            continue
        flag = f"--{name.replace('_', '-')}"
        flags = [f"{flag}/--no-{flag[2:]}"] if field.annotation is bool and field.default else [flag]
        text = f"{field.description}" + (f" (default: {field.default})" if field.default not in (None, True, False) else "")
        option = typer.Option(*flags, help=text, metavar=_metavar(field.annotation), show_default=False)
        derived.append((name, Annotated[_option_type(field.annotation) | None, option], None))
    parameters = [
        inspect.Parameter(name, inspect.Parameter.POSITIONAL_OR_KEYWORD, default=default, annotation=annotation)
        for name, annotation, default in [*fixed, *derived]
    ]

    def command(**values: Any) -> Any:
        own = {name: values.pop(name) for name, _, _ in fixed}
        return work(own, values)

    command.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]  # read by typer
    command.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return command


DataArgument = Annotated[
    str | None, typer.Argument(metavar="DATA", help="caltech101, scenes, a folder of class folders, or tar or parquet shards")
]


ConfigOption = Annotated[Path | None, typer.Option(help="YAML or JSON with options, or a run.json")]


SetOption = Annotated[list[str] | None, typer.Option(metavar="NAME=VALUE", help="any other option of the config")]


TRAIN_PARAMETERS: list[tuple[str, Any, Any]] = [
    ("data", DataArgument, None),
    ("out", Annotated[Path | None, typer.Option(help="the run's folder (default: runs/NAME)")], None),
    (
        "dry_run",
        Annotated[bool, typer.Option("--dry-run", help="say what would be trained and about how long it takes; write nothing")],
        False,
    ),
    ("resume", Annotated[bool, typer.Option("--resume", help="go on with the unfinished run of the same options")], False),
    ("devices", Annotated[int, typer.Option(min=1, help="processes on this machine that share the work: GPUs, or parts of the cores")], 1),
    ("nodes", Annotated[int, typer.Option(min=1, help="machines that share the work; the same command on each")], 1),
    ("rendezvous", Annotated[str | None, typer.Option(metavar="HOST:PORT", help="where the machines find each other: one of them")], None),
    ("repeats", Annotated[int, typer.Option(min=1, help="train on so many random splits, with seeds from --seed on")], 1),
    ("config", ConfigOption, None),
    ("set", SetOption, None),
    ("json", JsonOption, False),
]


PRECOMPUTE_PARAMETERS: list[tuple[str, Any, Any]] = [
    ("data", Annotated[str | None, typer.Argument(metavar="DATA", help="as for train, or an address of images")], None),
    ("backend", BackendOption, "local"),
    ("address", RayAddressOption, ""),
    ("ray_workers", RayWorkersOption, 0),
    ("config", ConfigOption, None),
    ("set", SetOption, None),
    ("json", JsonOption, False),
]
