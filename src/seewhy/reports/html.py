"""Facts -> one HTML file with everything inside: the templates' environment, and images as data URLs."""

from __future__ import annotations

import base64
import io
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from jinja2 import Environment, PackageLoader, select_autoescape
from PIL import Image

from seewhy.data.decode import read_image


def render_page(template: str, facts: dict[str, Any]) -> str:
    """A template of `templates/` with these facts; what comes from file names and class names is escaped."""
    environment = Environment(
        loader=PackageLoader("seewhy.reports"),
        autoescape=select_autoescape(default=True, default_for_string=True),
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template(template).render(facts)


def thumbnail_url(path: Path | str, side: int = 200) -> str:
    """An image file, at most `side` pixels a side, as a data URL."""
    image = read_image(path, 2 * side)
    image.thumbnail((side, side))
    return jpeg_url(np.asarray(image))


def jpeg_url(image: npt.NDArray[np.uint8]) -> str:
    """(H, W, 3) uint8 RGB as a data URL."""
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "JPEG", quality=85)
    return data_url(buffer.getvalue(), "jpeg")


def data_url(data: bytes, kind: str) -> str:
    """The bytes of an image of that kind ('png', 'jpeg') as a data URL."""
    return f"data:image/{kind};base64,{base64.b64encode(data).decode()}"
