"""The command line: parse, call, print; every error is one line and exit status 2."""

from __future__ import annotations

import inspect
import shlex
import sys
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, get_args, get_origin

import typer

from seewhy.cli_out import export, pull, push, serve
from seewhy.cli_shared import AddressOption, EngineOption, JsonOption, RayWorkersOption, print_json
from seewhy.cli_trust import audit, compare, robustness
from seewhy.cli_use import evaluate, explain, predict
from seewhy.config import TrainConfig, make_config, parse_settings, read_config
from seewhy.errors import ConfigError, RunError, SeewhyError, one_line
from seewhy.progress import show_log_lines
from seewhy.signals import stop_on_signals
from seewhy.version import __version__

if TYPE_CHECKING:
    from seewhy.api import Run

INTERRUPTED = 130  # exit status, as shells have it

app = typer.Typer(
    name="seewhy",
    help="Train an image classifier on your own pictures in minutes on a laptop, and see why it says what it says.",
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"seewhy {__version__}")
        raise typer.Exit


@app.callback()
def _main(
    version: Annotated[bool, typer.Option("--version", callback=_show_version, is_eager=True, help="print the version")] = False,
) -> None:
    show_log_lines()
    warnings.filterwarnings("ignore", module="PIL")  # what cannot be used is named, with the reason


# ---------------------------------------------------------------- train: options derived from TrainConfig


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
    from seewhy import distributed

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
        from seewhy.launch import launch

        path = launch(config, out, resume, own["devices"], own["nodes"], own["rendezvous"])
    else:
        from seewhy.workflow import train_run

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
        from seewhy.manifest import read_manifest

        manifest = read_manifest(path)
        told = {"seconds": manifest["seconds"], "metrics": manifest["metrics"]}
        print_json({"run": str(path), "report": str(path / "report.html"), **told})
    else:
        typer.echo(f"run     {path}\nreport  {path / 'report.html'}")


def _repeat(config: TrainConfig, repeats: int, out: Path | None, resume: bool, as_json: bool) -> None:
    from seewhy.compare import repeat, spread

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
    from seewhy.dry_run import describe, dry_run

    facts = dry_run(config, out, resume)
    if as_json:
        print_json(facts)
        return
    for line in describe(facts):
        typer.echo(one_line(line))


def _features(own: dict[str, Any], given: dict[str, Any]) -> None:
    from seewhy.cli_scale import fill_features

    fill_features(_config_of(own, given), own["engine"], own["address"], own["ray_workers"], own["json"])


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

FEATURES_PARAMETERS: list[tuple[str, Any, Any]] = [
    ("data", Annotated[str | None, typer.Argument(metavar="DATA", help="as for train, or an address of pictures")], None),
    ("engine", EngineOption, "local"),
    ("address", AddressOption, ""),
    ("ray_workers", RayWorkersOption, 0),
    ("config", ConfigOption, None),
    ("set", SetOption, None),
    ("json", JsonOption, False),
]

app.command("train", help="Train a classifier, measure it on pictures it has not seen, and write the run and its report.")(
    _with_train_options(TRAIN_PARAMETERS, _train)
)
app.command("features", help="Compute what `train` with the same options will read from the cache, here or on Ray.")(
    _with_train_options(FEATURES_PARAMETERS, _features)
)


def call(arguments: list[str] | None = None) -> Any:
    """`seewhy ARGUMENTS` (None: those of the process) without its shell: returns what the command returns, raises what it raises."""
    found = app(arguments, standalone_mode=False, prog_name="seewhy")
    if found == INTERRUPTED:  # what typer makes of Ctrl-C
        raise KeyboardInterrupt
    return found


def train_from_arguments(arguments: list[str]) -> Run:
    """What `seewhy train ARGUMENTS` does, for scripts; returns the run, whichever processes trained it."""
    if any(argument.split("=")[0] == "--repeats" for argument in arguments):
        raise ConfigError("--repeats trains several runs, and this script goes on with one; use `seewhy train --repeats`")
    path: Path | None = call(["train", *arguments])
    if path is None:
        raise ConfigError("--dry-run makes no run that this script could go on with; use `seewhy train --dry-run`")
    from seewhy.api import load

    return load(path)


# ---------------------------------------------------------------- the other commands


for _command in (evaluate, predict, explain, audit, robustness, compare, export, serve, push, pull):
    app.command()(_command)


@app.command()
def cache(
    clear: Annotated[bool, typer.Option("--clear", help="remove everything in the cache")] = False,
    as_json: JsonOption = False,
) -> None:
    """List or clear what is kept between runs."""
    from seewhy.cache import cache_dir, clear_cache, list_cache

    if clear:
        freed, left = clear_cache()
        if as_json:
            print_json({"cache": str(cache_dir()), "freed_bytes": freed, "in_use": left})
        else:
            typer.echo(f"freed {freed / 1e6:.1f} MB in {cache_dir()}" + (f"; in use and left: {', '.join(left)}" if left else ""))
        return
    entries = list_cache()
    if as_json:
        print_json({"cache": str(cache_dir()), "entries": [{"name": e.name, "size_bytes": e.size_bytes} for e in entries]})
        return
    for entry in entries:
        typer.echo(f"{entry.size_bytes / 1e6:10.1f} MB  {entry.name}")
    typer.echo(f"{sum(e.size_bytes for e in entries) / 1e6:10.1f} MB  in {cache_dir()}")


# ---------------------------------------------------------------- the shell


def run_guarded(work: Callable[[], Any], command: Sequence[str] = ()) -> int:
    """Calls work() and turns what it raises into one line on stderr and an exit status, which docs/reference/errors.md lists.

    command: as it was given, for what is said when it is interrupted.
    """
    try:
        status = work()
        return status if isinstance(status, int) else 0
    except SeewhyError as error:
        return _complain(str(error))
    except KeyboardInterrupt:
        return _complain(f"interrupted; {_how_to_go_on(command)}", status=INTERRUPTED)
    except ModuleNotFoundError as error:  # of a light installation, see requirements-runtime.txt
        if (error.name or "seewhy").split(".")[0] == "seewhy":
            raise
        return _complain(f"this needs {error.name}, which is not installed; the full installation (README) brings it")
    except OSError as error:  # of a disk, mostly; one raised by a mistake of ours has no number
        if error.errno is None:
            raise
        where = f"{error.filename}: " if error.filename else ""
        return _complain(f"{one_line(where)}{error.strerror}; check the disk and its permissions")
    except Exception as error:
        # typer's own errors (unknown options, missing arguments) carry their text in format_message.
        if not hasattr(error, "format_message"):
            raise
        context = getattr(error, "ctx", None)
        where = f"; see {context.command_path} --help" if context is not None else ""
        return _complain(f"{' '.join(error.format_message().split()).rstrip('.')}{where}")


def _how_to_go_on(command: Sequence[str]) -> str:
    """The command after which nothing that was finished is computed again."""
    if {"train", "train.py"} & set(command[:2]):
        return f"go on with: {shlex.join([*command, *(['--resume'] if '--resume' not in command else [])])}"
    return "the same command again uses what was finished"


def _complain(text: str, status: int = 2) -> int:
    typer.echo(f"seewhy: {text}", err=True)
    return status


def main() -> None:
    """The console script."""
    stop_on_signals()
    sys.exit(run_guarded(call, ["seewhy", *sys.argv[1:]]))


if __name__ == "__main__":
    main()
