"""The command line: the app, its commands, and the console script."""

from __future__ import annotations

import sys
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from seewhy.cli.deploy import export, pull, push, serve
from seewhy.cli.options import JsonOption, print_json
from seewhy.cli.predict import evaluate, explain, predict
from seewhy.cli.quality import audit, compare, robustness
from seewhy.core.progress import show_log_lines
from seewhy.core.signals import stop_on_signals
from seewhy.errors import ConfigError
from seewhy.version import __version__

if TYPE_CHECKING:
    from seewhy.api import Run
from seewhy.cli.guard import INTERRUPTED, run_guarded
from seewhy.cli.train import PRECOMPUTE_PARAMETERS, TRAIN_PARAMETERS, _precompute, _train, _with_train_options

app = typer.Typer(
    name="seewhy",
    help="Train an image classifier on your own images in minutes on a laptop, and see why it says what it says.",
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


app.command("train", help="Train a classifier, measure it on images it has not seen, and write the run and its report.")(
    _with_train_options(TRAIN_PARAMETERS, _train)
)


app.command("precompute", help="Compute the frozen features that `train` with the same options reads from the cache, here or on Ray.")(
    _with_train_options(PRECOMPUTE_PARAMETERS, _precompute)
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


for _command in (evaluate, predict, explain, audit, robustness, compare, export, serve, push, pull):
    app.command()(_command)


@app.command()
def cache(
    clear: Annotated[bool, typer.Option("--clear", help="remove everything in the cache")] = False,
    as_json: JsonOption = False,
) -> None:
    """List or clear what is kept between runs."""
    from seewhy.core.cache import cache_dir, clear_cache, list_cache

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


def main() -> None:
    """The console script."""
    stop_on_signals()
    sys.exit(run_guarded(call, ["seewhy", *sys.argv[1:]]))


if __name__ == "__main__":
    main()
