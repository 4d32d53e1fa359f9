"""Test overlays: clear at 0, the last colour at 1, aligned with the network's view."""

from __future__ import annotations

import io
import json
import re
from pathlib import Path

import numpy as np
from PIL import Image

from seewhy.explain import overlay as drawing


def pixels(values: list[list[float]], size: tuple[int, int], crop_fraction: float | None = None) -> np.ndarray:
    image = Image.open(io.BytesIO(drawing.heatmap_png(np.array(values), size, crop_fraction)))
    assert image.mode == "RGBA"
    return np.asarray(image)


def test_ends_and_stops_of_the_colours() -> None:
    assert pixels([[0.0]], (3, 2)).tolist() == [[drawing.COLOURS[0].tolist()] * 3] * 2
    assert pixels([[1.0]], (1, 1)).tolist() == [[drawing.COLOURS[-1].tolist()]]
    assert pixels([[0.5]], (1, 1)).tolist() == [[drawing.COLOURS[2].tolist()]]
    assert pixels([[0.125]], (1, 1))[0, 0, 3] == 45  # half way between the first two


def test_size_is_the_image_s_but_not_without_end() -> None:
    assert pixels([[0.0, 1.0]], (640, 480)).shape == (480, 640, 4)
    assert pixels([[0.0, 1.0]], (4096, 1024)).shape == (256, 1024, 4)
    left, right = pixels([[0.0, 1.0]], (640, 480))[0, [0, -1], 3]
    assert (left, right) == (0, 225)


def test_a_centred_square_covers_no_more() -> None:
    alpha = pixels([[1.0]], (100, 60), crop_fraction=0.5)[:, :, 3]
    rows, columns = np.nonzero(alpha)
    assert (rows.min(), rows.max(), columns.min(), columns.max()) == (15, 44, 35, 64)
    assert (alpha[15:45, 35:65] == 225).all()


def test_the_browser_has_the_same_colours() -> None:
    script = (Path(drawing.__file__).parents[1] / "deploy" / "web" / "heat.js").read_text()
    stops, colours = (json.loads(re.search(rf"const {name} = (.*);", script).group(1)) for name in ("STOPS", "COLOURS"))
    assert stops == drawing.STOPS.tolist()
    assert colours == drawing.COLOURS.tolist()


# ---------------------------------------------------------------- over an image


def test_map_of_zeros_leaves_no_glow() -> None:
    image = np.random.default_rng(0).integers(0, 256, size=(12, 16, 3), dtype=np.uint8)
    overlay = drawing.overlay_heatmap(image, np.zeros((3, 4), np.float32))
    expected = (0.55 * image + 0.25 * image.mean(axis=2, keepdims=True)).round()
    np.testing.assert_allclose(overlay, expected, atol=1)
    assert overlay.dtype == np.uint8


def test_hot_place_is_warmer_and_brighter_than_the_rest() -> None:
    image = np.full((70, 70, 3), 90, np.uint8)
    heatmap = np.zeros((7, 7), np.float32)
    heatmap[1, 5] = 1
    overlay = drawing.overlay_heatmap(image, heatmap).astype(int)
    warmth = overlay[..., 0] - overlay[..., 2]
    row, column = np.unravel_index(warmth.argmax(), warmth.shape)
    assert (row // 10, column // 10) == (1, 5)
    assert warmth.max() > 60
    assert overlay[15, 55].sum() > 1.5 * overlay[60, 10].sum()
    assert abs(warmth[40:, :30]).max() == 0


def test_hotter_is_warmer_without_steps_back() -> None:
    image = np.full((8, 400, 3), 90, np.uint8)
    overlay = drawing.overlay_heatmap(image, np.linspace(0, 1, 100, dtype=np.float32)[None, :].repeat(2, axis=0)).astype(int)
    brightness = overlay[4].sum(axis=1)
    assert (np.diff(brightness) >= -1).all()
    assert brightness[-1] > 2 * brightness[0]


def test_overlay_stays_within_range_beside_sharp_edges() -> None:
    white = np.full((40, 40, 3), 255, np.uint8)
    checkers = (np.indices((8, 8)).sum(axis=0) % 2).astype(np.float32)  # bicubic enlargement overshoots here
    overlay = drawing.overlay_heatmap(white, checkers)
    plain = drawing.overlay_heatmap(white, np.ones((8, 8), np.float32))
    cold = drawing.overlay_heatmap(white, np.zeros((8, 8), np.float32))
    np.testing.assert_array_equal(overlay[2, 37], plain[0, 0])  # a hot cell's middle is as hot as a map of ones
    np.testing.assert_array_equal(overlay[2, 2], cold[0, 0])
