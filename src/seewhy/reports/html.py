"""Render templates as self-contained HTML pages, with images as data URLs."""

from __future__ import annotations

import base64
import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from jinja2 import Environment, PackageLoader, select_autoescape
from PIL import Image

from seewhy.data.decode import read_image


def render_page(template: str, facts: dict[str, Any]) -> str:
    """Render a template of `templates/`, with escaped file and class names."""
    environment = Environment(
        loader=PackageLoader("seewhy.reports"),
        autoescape=select_autoescape(default=True, default_for_string=True),
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"thumbnail": thumbnail_url, "short_path": short_path, "percent": percent, "thousands": "{:,}".format}
    return environment.get_template(template).render(facts)


def percent(share: float) -> str:
    """A share of 0..1 in percent with one digit, without the sign."""
    return f"{100 * share:.1f}"


def short_path(path: Path | str) -> str:
    """The last folder and the name of a file."""
    return "/".join(Path(path).parts[-2:])


def thumbnail_url(path: Path | str, side: int = 200) -> str:
    """An image file as a data URL of at most `side` pixels a side."""
    image = read_image(path, 2 * side)
    image.thumbnail((side, side))
    return jpeg_url(np.asarray(image))


def jpeg_url(image: npt.NDArray[np.uint8]) -> str:
    """(H, W, 3) uint8 RGB as a data URL."""
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "JPEG", quality=85)
    return _data_url(buffer.getvalue(), "jpeg")


def themed_urls(draw: Callable[[str], bytes]) -> dict[str, str]:
    """{"light": url, "dark": url} of a figure; draw: theme -> PNG bytes."""
    return {theme: _data_url(draw(theme), "png") for theme in ("light", "dark")}


def _data_url(data: bytes, kind: str) -> str:
    return f"data:image/{kind};base64,{base64.b64encode(data).decode()}"
