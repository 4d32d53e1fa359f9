"""What the commands share: their common arguments, and JSON on stdout."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from seewhy.jsonable import finite

RunArgument = Annotated[Path, typer.Argument(metavar="RUN", help="folder of a saved run")]
PicturesArgument = Annotated[list[str], typer.Argument(metavar="PICTURES...", help="files, folders or patterns")]
JsonOption = Annotated[bool, typer.Option("--json", help="print the result as JSON on stdout")]
SkipBadOption = Annotated[bool, typer.Option("--skip-bad", help="leave unusable pictures out instead of stopping")]


def print_json(content: Any) -> None:
    typer.echo(json.dumps(finite(content), ensure_ascii=False, allow_nan=False))
