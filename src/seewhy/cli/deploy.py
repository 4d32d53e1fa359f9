"""The commands that let a run out of the house and one in: export, serve, push, pull."""

from __future__ import annotations

import math
import sys
from contextlib import suppress
from pathlib import Path
from typing import Annotated

import typer

from seewhy.cli.options import JsonOption, RunArgument, print_json
from seewhy.errors import ConfigError, OutputError, RunError, require


def export(
    run: RunArgument,
    out: Annotated[Path | None, typer.Option(help="the file (default: model.onnx or model.pt2 in RUN)")] = None,
    kind: Annotated[str, typer.Option("--format", metavar="onnx|pt2", help="pt2: for PyTorch")] = "onnx",
    web: Annotated[Path | None, typer.Option(help="write this folder too: a page that answers in the browser, for any web host")] = None,
    images: Annotated[int, typer.Option(min=1, help="test images on which the file is compared with the run")] = 1000,
    as_json: JsonOption = False,
) -> None:
    """Write a run as one file that carries its preprocessing, probabilities and the heatmaps of all classes."""
    from seewhy.api import load
    from seewhy.deploy.export import export_file
    from seewhy.deploy.static_site import write_website

    if web is not None and kind == "pt2":
        raise ConfigError("--web needs a file that a browser can run; leave --format pt2 out")
    file, parity = export_file(load(run), out, kind, images)
    if web is not None:
        write_website(file, web)
    size = file.stat().st_size
    if as_json:
        print_json({"file": str(file), "bytes": size, "web": web and str(web), "parity": vars(parity) if parity else None})
        return
    typer.echo(f"{file}  {size / 1e6:.1f} MB")
    if parity is None:
        typer.echo("not compared with the run: its images are not where they were")
    else:
        maps = ""
        if parity.correlation_mean is not None:
            maps = f", heatmaps correlate {parity.correlation_mean:.4f} (least {parity.correlation_least:.4f})"
        typer.echo(
            f"on {parity.n} test images: the same class in {parity.same_class:.1%}, probabilities within {parity.difference:.1e}{maps}; "
            f"accuracy {parity.accuracy:.1%}, the run's {parity.run_accuracy:.1%}; {parity.milliseconds:.1f} ms an image on one core"
        )
    if web is not None:
        typer.echo(f"{web}  a page for any web host; to try it here: python -m http.server --directory {web}")


def serve(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="folder of a saved run, or a file of `seewhy export`")],
    host: Annotated[str, typer.Option(help="address to listen at; 0.0.0.0 lets other machines in")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0: any free one")] = 8000,
    cores: Annotated[int | None, typer.Option(min=1, help="batches answered side by side (default: one a core)")] = None,
    target_precision: Annotated[
        float | None,
        typer.Option(
            help="share of decisions that are right; less confident answers get none (default: the highest up to 0.95 that val can promise)"
        ),
    ] = None,
    max_files: Annotated[int, typer.Option(min=1, help="files a request")] = 32,
    max_mb: Annotated[float, typer.Option(min=0.001, help="megabytes a request")] = 64.0,
    max_megapixels: Annotated[float, typer.Option(min=0.001, help="of an image")] = 50.0,
    upload_seconds: Annotated[float, typer.Option(min=0.1, help="until a request must be here")] = 30.0,
    queue: Annotated[int, typer.Option(min=1, help="images under way, of all requests; more get 503")] = 256,
) -> None:
    """Answer over HTTP: a page for people, JSON for programs. $SEEWHY_API_KEY, if set, is wanted of every caller."""
    require("serve", "seewhy serve", "fastapi", "uvicorn", "python_multipart", "prometheus_client")
    from seewhy.deploy.middleware import Limits
    from seewhy.deploy.server import serve_forever

    if not all(map(math.isfinite, (max_mb, max_megapixels, upload_seconds))):
        raise ConfigError("limits have to be finite numbers")
    limits = Limits(max_files, round(1e6 * max_mb), round(1e6 * max_megapixels), upload_seconds, queue)
    with suppress(KeyboardInterrupt):  # how it ends, after it has answered what it had
        serve_forever(exported(run), host, port, cores, limits, target_precision)


def exported(run: Path) -> Path:
    """The ONNX file of a run, made where there is none yet."""
    from seewhy.inference.onnx_model import is_exported

    if is_exported(run):
        return run
    if not run.is_dir():
        raise RunError(f"{run}: no run and no file of `seewhy export`; name one of them")
    file = run / "model.onnx"
    if not file.is_file():
        from seewhy.deploy.export import export_file
        from seewhy.models.saved_run import load

        print(f"exporting {file} first", file=sys.stderr)
        try:
            export_file(load(run), file, images=100)
        except OutputError as error:
            raise OutputError(f"{error} of `seewhy export {run}`, and serve the file") from error
    return file


DestinationArgument = Annotated[str, typer.Argument(metavar="DESTINATION", help="a folder, on a shared disk say, or hf://USER/NAME")]
SourceArgument = Annotated[str, typer.Argument(metavar="SOURCE", help="a folder, on a shared disk say, or hf://USER/NAME")]


def push(
    run: RunArgument,
    destination: DestinationArgument,
    public: Annotated[bool, typer.Option("--public", help="everybody may see the repository (default: private)")] = False,
    as_json: JsonOption = False,
) -> None:
    """Copy a run to where others can have it, in Hugging Face's layout, with a config.json that timm reads."""
    from seewhy.api import load

    pushed = load(run).push(destination, public)
    if as_json:
        print_json({"destination": pushed})
        return
    typer.echo(f"{run} -> {pushed}")


def pull(
    source: SourceArgument,
    out: Annotated[Path | None, typer.Option(help="the run's folder (default: runs/NAME)")] = None,
    report: Annotated[bool, typer.Option("--report", help="take report.html too; it runs what its writer wrote when you open it")] = False,
    as_json: JsonOption = False,
) -> None:
    """Fetch a run that somebody has pushed, and check it."""
    from seewhy.api import pull as fetch

    run = fetch(source, out, report)
    if as_json:
        print_json({"run": str(run.path), "classes": run.classes, "metrics": run.metrics})
        return
    typer.echo(f"{source} -> {run.path}  ({run!r})")
