"""Define the command line app and its console script."""

from __future__ import annotations

import sys
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from seewhy.cli.deploy import export, pull, push, serve
from seewhy.cli.guard import INTERRUPTED, run_guarded
from seewhy.cli.options import JsonOption, print_result
from seewhy.cli.predict import evaluate, explain, predict
from seewhy.cli.quality import audit, compare, robustness
from seewhy.cli.train import precompute, train
from seewhy.core.progress import show_log_lines
from seewhy.core.signals import stop_on_signals
from seewhy.errors import ConfigError
from seewhy.version import __version__

if TYPE_CHECKING:
    from seewhy.api import Run

app = typer.Typer(
    name="seewhy",
    help="Train an image classifier on your own images in minutes on a laptop, and see why it says what it says.",
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)


def _show_version(requested: bool) -> None:
    if requested:
        typer.echo(f"seewhy {__version__}")
        raise typer.Exit


@app.callback()
def _main(
    version: Annotated[bool, typer.Option("--version", callback=_show_version, is_eager=True, help="print the version")] = False,
) -> None:
    show_log_lines()
    warnings.filterwarnings("ignore", module="PIL")  # unreadable images are reported with the reason


def cache(
    clear: Annotated[bool, typer.Option("--clear", help="delete all entries that are not in use")] = False,
    as_json: JsonOption = False,
) -> None:
    """List or clear the cache of features, converted networks and downloads."""
    from seewhy.core.cache import cache_dir, clear_cache, list_cache

    if clear:
        freed, in_use = clear_cache()
        kept = f"; in use and kept: {', '.join(in_use)}" if in_use else ""
        content: dict[str, Any] = {"cache": str(cache_dir()), "freed_bytes": freed, "in_use": in_use}
        print_result(as_json, content, f"freed {freed / 1e6:.1f} MB in {cache_dir()}{kept}")
        return
    entries = list_cache()
    content = {"cache": str(cache_dir()), "entries": [{"name": e.name, "size_bytes": e.size_bytes} for e in entries]}
    lines = [f"{e.size_bytes / 1e6:10.1f} MB  {e.name}" for e in entries]
    print_result(as_json, content, *lines, f"{sum(e.size_bytes for e in entries) / 1e6:10.1f} MB  in {cache_dir()}")


for _command in (train, precompute, evaluate, predict, explain, audit, robustness, compare, export, serve, push, pull, cache):
    app.command()(_command)


def call(arguments: list[str] | None = None) -> Any:
    """Run `seewhy ARGUMENTS` (None: the process's) and return what the command returns; its exceptions pass through."""
    result = app(arguments, standalone_mode=False, prog_name="seewhy")
    if result == INTERRUPTED:  # typer has caught a KeyboardInterrupt
        raise KeyboardInterrupt
    return result


def train_from_arguments(arguments: list[str]) -> Run:
    """Run `seewhy train ARGUMENTS` and return the run, in whichever processes it was trained. Raises ConfigError for several or no runs."""
    if any(argument.split("=")[0] == "--repeats" for argument in arguments):
        raise ConfigError("--repeats trains several runs and this script needs one; use `seewhy train --repeats`")
    path: Path | None = call(["train", *arguments])
    if path is None:
        raise ConfigError("--dry-run writes no run and this script needs one; use `seewhy train --dry-run`")
    from seewhy.api import load

    return load(path)


def main() -> None:
    """Run the console script."""
    stop_on_signals()
    sys.exit(run_guarded(call, ["seewhy", *sys.argv[1:]]))
