"""Define the arguments and options that commands share, and print results as text or JSON."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from seewhy.core.files import nan_to_none

DATA_HELP = "caltech101, scenes, a folder of class folders, or tar or parquet shards"
RunArgument = Annotated[Path, typer.Argument(metavar="RUN", help="folder of a saved run")]
ModelArgument = Annotated[Path, typer.Argument(metavar="RUN", help="folder of a saved run, or a file of `seewhy export`")]
ImagesArgument = Annotated[list[str], typer.Argument(metavar="IMAGES", help="image files, folders or glob patterns")]
JsonOption = Annotated[bool, typer.Option("--json", help="print the result as JSON on stdout")]
SkipBadOption = Annotated[bool, typer.Option("--skip-bad", help="skip unreadable images instead of stopping")]
BackendOption = Annotated[
    str | None, typer.Option(help="local or ray: work in shards, for any number of images and addresses such as s3://bucket/images")
]
RayAddressOption = Annotated[str, typer.Option(help="running Ray cluster: auto, or ray://HOST:10001 (default: start one here)")]
RayWorkersOption = Annotated[
    int, typer.Option(min=0, show_default=False, help="Ray processes, each with a network (default: one per core or GPU)")
]


def is_batch(backend: str | None, ray_address: str, workers: int, images: list[str]) -> bool:
    """Return whether to run in shards into a table: on request, or because an input is an address."""
    from seewhy.data.remote import is_address

    return backend is not None or bool(ray_address or workers) or any(map(is_address, images))


def print_result(as_json: bool, content: Any, *lines: str) -> None:
    """Print `content` as one line of strict JSON (nan and infinities become null), or the lines for people."""
    if as_json:
        typer.echo(json.dumps(nan_to_none(content), ensure_ascii=False, allow_nan=False))
    elif lines:
        typer.echo("\n".join(lines))
