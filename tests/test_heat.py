"""Overlays: clear where nothing speaks, the last colour where most does, in the place that the network saw."""

from __future__ import annotations

import io
import json
import re
from pathlib import Path

import numpy as np
from PIL import Image

from seewhy import heat


def pixels(values: list[list[float]], size: tuple[int, int], box_share: float | None = None) -> np.ndarray:
    picture = Image.open(io.BytesIO(heat.heat_png(np.array(values), size, box_share)))
    assert picture.mode == "RGBA"
    return np.asarray(picture)


def test_ends_and_stops_of_the_colours() -> None:
    assert pixels([[0.0]], (3, 2)).tolist() == [[heat.COLOURS[0].tolist()] * 3] * 2
    assert pixels([[1.0]], (1, 1)).tolist() == [[heat.COLOURS[-1].tolist()]]
    assert pixels([[0.5]], (1, 1)).tolist() == [[heat.COLOURS[2].tolist()]]
    assert pixels([[0.125]], (1, 1))[0, 0, 3] == 45  # half way between the first two


def test_size_is_the_picture_s_but_not_without_end() -> None:
    assert pixels([[0.0, 1.0]], (640, 480)).shape == (480, 640, 4)
    assert pixels([[0.0, 1.0]], (4096, 1024)).shape == (256, 1024, 4)
    left, right = pixels([[0.0, 1.0]], (640, 480))[0, [0, -1], 3]
    assert (left, right) == (0, 225)


def test_a_centred_square_covers_no_more() -> None:
    alpha = pixels([[1.0]], (100, 60), box_share=0.5)[:, :, 3]
    rows, columns = np.nonzero(alpha)
    assert (rows.min(), rows.max(), columns.min(), columns.max()) == (15, 44, 35, 64)
    assert (alpha[15:45, 35:65] == 225).all()


def test_the_browser_has_the_same_colours() -> None:
    script = (Path(heat.__file__).parent / "web" / "heat.js").read_text()
    stops, colours = (json.loads(re.search(rf"const {name} = (.*);", script).group(1)) for name in ("STOPS", "COLOURS"))
    assert stops == heat.STOPS.tolist()
    assert colours == heat.COLOURS.tolist()
