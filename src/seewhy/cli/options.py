"""What the commands share: their common arguments, and JSON on stdout."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from seewhy.core.files import nan_to_none

RunArgument = Annotated[Path, typer.Argument(metavar="RUN", help="folder of a saved run")]
ImagesArgument = Annotated[list[str], typer.Argument(metavar="IMAGES...", help="files, folders or patterns")]
JsonOption = Annotated[bool, typer.Option("--json", help="print the result as JSON on stdout")]
SkipBadOption = Annotated[bool, typer.Option("--skip-bad", help="leave unusable images out instead of stopping")]
BackendOption = Annotated[
    str | None, typer.Option(help="local or ray: shard by shard, for any number of images and for addresses such as s3://bucket/images")
]
RayAddressOption = Annotated[str, typer.Option(help="a Ray cluster that runs already: auto, or ray://HOST:10001 (default: one of its own)")]
RayWorkersOption = Annotated[int, typer.Option(min=0, help="processes on Ray, each with a network (default: one a core, or one a GPU)")]


def is_batch(backend: str | None, address: str, workers: int, images: list[str]) -> bool:
    """Whether to go source by source into a table: asked for, or the only way, since an address is read."""
    from seewhy.data.remote import is_address

    return backend is not None or bool(address or workers) or any(map(is_address, images))


def print_json(content: Any) -> None:
    typer.echo(json.dumps(nan_to_none(content), ensure_ascii=False, allow_nan=False))
