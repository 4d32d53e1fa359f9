"""Define the commands that ship a run: export, serve, push, pull."""

from __future__ import annotations

import math
import sys
from contextlib import suppress
from pathlib import Path
from typing import Annotated

import typer

from seewhy.cli.options import JsonOption, ModelArgument, RunArgument, print_result
from seewhy.errors import ConfigError, OutputError, RunError, require

ADDRESS_HELP = "a folder, for example on a shared disk, or hf://USER/NAME"


def export(
    run: RunArgument,
    out: Annotated[Path | None, typer.Option(help="output file (default: model.onnx or model.pt2 in RUN)")] = None,
    kind: Annotated[str, typer.Option("--format", metavar="onnx|pt2", help="ONNX, or a torch.export program")] = "onnx",
    web: Annotated[Path | None, typer.Option(help="also write this folder: a static web page that predicts in the browser")] = None,
    images: Annotated[int, typer.Option(min=1, help="test images on which file and run are compared")] = 1000,
    as_json: JsonOption = False,
) -> None:
    """Export a run to one file with preprocessing, calibrated probabilities, OOD score and heatmaps of all classes."""
    from seewhy.api import load
    from seewhy.deploy.export import export_file
    from seewhy.deploy.static_site import write_static_site

    if web is not None and kind == "pt2":
        raise ConfigError("--web needs an ONNX file; leave out --format pt2")
    file, parity = export_file(load(run), out, kind, images)
    if web is not None:
        write_static_site(file, web)
    size = file.stat().st_size
    lines = [f"{file}  {size / 1e6:.1f} MB"]
    if parity is None:
        lines.append("not compared with the run: its images have moved")
    else:
        maps = ""
        if parity.correlation_mean is not None:
            maps = f", heatmap correlation {parity.correlation_mean:.4f} (minimum {parity.correlation_min:.4f})"
        lines.append(
            f"on {parity.n} test images: same class in {parity.same_class:.1%}, probabilities within {parity.max_difference:.1e}{maps}; "
            f"accuracy {parity.accuracy:.1%} (run: {parity.run_accuracy:.1%}); {parity.milliseconds:.1f} ms an image on one core"
        )
    if web is not None:
        lines.append(f"{web}  a static web page; to try it: python -m http.server --directory {web}")
    content = {"file": str(file), "bytes": size, "web": web and str(web), "parity": vars(parity) if parity else None}
    print_result(as_json, content, *lines)


def serve(
    run: ModelArgument,
    host: Annotated[str, typer.Option(help="address to bind; 0.0.0.0 accepts other machines")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="port to bind; 0: any free one")] = 8000,
    cores: Annotated[int | None, typer.Option(min=1, help="batches predicted in parallel (default: one per core)")] = None,
    target_precision: Annotated[
        float | None,
        typer.Option(help="decide only as confidently as keeps this share correct (default: the highest up to 0.95 that val supports)"),
    ] = None,
    max_files: Annotated[int, typer.Option(min=1, help="files in a request")] = 32,
    max_mb: Annotated[float, typer.Option(min=0.001, help="megabytes in a request")] = 64.0,
    max_megapixels: Annotated[float, typer.Option(min=0.001, help="megapixels in an image")] = 50.0,
    upload_seconds: Annotated[float, typer.Option(min=0.1, help="timeout of an upload")] = 30.0,
    queue: Annotated[int, typer.Option(min=1, help="images in flight, of all requests; beyond, clients get 503")] = 256,
) -> None:
    """Serve a run over HTTP: a web page and a JSON API. $SEEWHY_API_KEY, if set, is required of every client."""
    require("serve", "seewhy serve", "fastapi", "uvicorn", "python_multipart", "prometheus_client")
    from seewhy.deploy.middleware import Limits
    from seewhy.deploy.server import serve_forever

    if not all(map(math.isfinite, (max_mb, max_megapixels, upload_seconds))):
        raise ConfigError("--max-mb, --max-megapixels and --upload-seconds must be finite numbers")
    limits = Limits(max_files, round(1e6 * max_mb), round(1e6 * max_megapixels), upload_seconds, queue)
    with suppress(KeyboardInterrupt):  # raised after the last response
        serve_forever(ensure_exported(run), host, port, cores, limits, target_precision)


def ensure_exported(run: Path) -> Path:
    """Return the ONNX file of a run, exporting it if it has none yet. Raises RunError, OutputError."""
    from seewhy.inference.onnx_model import is_exported

    if is_exported(run):
        return run
    if not run.is_dir():
        raise RunError(f"{run}: neither a run nor a file of `seewhy export`; name one of them")
    file = run / "model.onnx"
    if not file.is_file():
        from seewhy.deploy.export import export_file
        from seewhy.models.saved_run import load

        print(f"exporting the run to {file} (once)", file=sys.stderr)
        try:
            export_file(load(run), file, images=100)
        except OutputError as error:
            raise OutputError(f"{error} of `seewhy export {run}`, and serve that file") from error
    return file


def push(
    run: RunArgument,
    destination: Annotated[str, typer.Argument(metavar="DESTINATION", help=ADDRESS_HELP)],
    public: Annotated[bool, typer.Option("--public", help="let anyone see the repository (default: private)")] = False,
    as_json: JsonOption = False,
) -> None:
    """Publish a run to a folder or the Hugging Face Hub, in a layout that timm reads too."""
    from seewhy.api import load

    pushed = load(run).push(destination, public)
    print_result(as_json, {"destination": pushed}, f"{run} -> {pushed}")


def pull(
    source: Annotated[str, typer.Argument(metavar="SOURCE", help=f"{ADDRESS_HELP}[@REVISION]")],
    out: Annotated[Path | None, typer.Option(help="the run's folder (default: runs/NAME)")] = None,
    report: Annotated[bool, typer.Option("--report", help="also fetch report.html, a page that can run its author's scripts")] = False,
    as_json: JsonOption = False,
) -> None:
    """Fetch a pushed run and verify it."""
    from seewhy.api import pull as fetch

    run = fetch(source, out, report)
    content = {"run": str(run.path), "classes": run.classes, "metrics": run.metrics}
    print_result(as_json, content, f"{source} -> {run.path}  ({run!r})")
