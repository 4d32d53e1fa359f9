"""What the commands share: their common arguments, and JSON on stdout."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from seewhy.writing import finite

RunArgument = Annotated[Path, typer.Argument(metavar="RUN", help="folder of a saved run")]
PicturesArgument = Annotated[list[str], typer.Argument(metavar="PICTURES...", help="files, folders or patterns")]
JsonOption = Annotated[bool, typer.Option("--json", help="print the result as JSON on stdout")]
SkipBadOption = Annotated[bool, typer.Option("--skip-bad", help="leave unusable pictures out instead of stopping")]
EngineOption = Annotated[
    str | None, typer.Option(help="local or ray: shard by shard, for any number of pictures and for addresses such as s3://bucket/pictures")
]
AddressOption = Annotated[str, typer.Option(help="a Ray cluster that runs already: auto, or ray://HOST:10001 (default: one of its own)")]
RayWorkersOption = Annotated[int, typer.Option(min=0, help="processes on Ray, each with a network (default: one a core, or one a GPU)")]


def is_batch(engine: str | None, address: str, workers: int, pictures: list[str]) -> bool:
    """Whether to go source by source into a table: asked for, or the only way, since an address is read."""
    from seewhy.storage import is_address

    return engine is not None or bool(address or workers) or any(map(is_address, pictures))


def print_json(content: Any) -> None:
    typer.echo(json.dumps(finite(content), ensure_ascii=False, allow_nan=False))
