"""Figures: valid PNGs in both themes and any number of classes, and what is drawn in them."""

from __future__ import annotations

import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pytest
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from PIL import Image

from seewhy.explain.overlay import overlay_heatmap
from seewhy.reports import figures

HISTORY = [
    {"epoch": e, "train_loss": 2.0 / e, "val_loss": 2.2 / e, "train_accuracy": 0.1 * e, "val_accuracy": 0.09 * e} for e in range(1, 6)
]


def names(count: int) -> list[str]:
    return [f"class_{c}" for c in range(count)]


def random_confusion(count: int) -> np.ndarray:
    return np.random.default_rng(count).integers(0, 30, size=(count, count))


def opened(data: bytes) -> Image.Image:
    image = Image.open(io.BytesIO(data))
    image.load()
    assert image.format == "PNG"
    return image.convert("RGB")


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Figure]]:
    """The figures themselves instead of their PNG bytes."""
    caught: list[Figure] = []
    monkeypatch.setattr(figures, "png_of", lambda figure: caught.append(figure) or b"")
    yield caught
    plt.close("all")


# ---------------------------------------------------------------- all of them


@pytest.mark.parametrize("theme", figures.THEMES)
def test_every_figure_is_a_png_on_the_background_of_its_theme(theme: str) -> None:
    square, heatmap = np.full((20, 30, 3), 99, np.uint8), np.eye(4, dtype=np.float32)
    images = [opened(figures.confusion_figure(random_confusion(count), names(count), theme)) for count in (2, 20, 101)]
    images.append(opened(figures.training_curves(HISTORY, 3, theme)))
    images += [opened(figures.heatmap_gallery([(square, heatmap, "a")] * count, theme)) for count in (1, 5)]
    background = tuple(round(255 * part) for part in to_rgb(figures.THEMES[theme]["background"]))
    for image in images:
        assert min(image.size) > 150
        assert image.getpixel((0, 0)) == background
        assert len(image.getcolors(maxcolors=1 << 20)) > 20  # something is drawn on it
    assert plt.get_fignums() == []


def test_themes_are_given_back(drawn: list[Figure]) -> None:
    before = dict(plt.rcParams)
    figures.training_curves(HISTORY, 3, "dark")
    assert dict(plt.rcParams) == before


def test_save_png_makes_the_folder(tmp_path: Path) -> None:
    figures.save_png(b"abc", tmp_path / "new" / "a.png")
    assert (tmp_path / "new" / "a.png").read_bytes() == b"abc"


# ---------------------------------------------------------------- training curves


def test_training_curves_draw_the_history(drawn: list[Figure]) -> None:
    figures.training_curves(HISTORY, best_epoch=4)
    loss, accuracy = drawn[0].axes
    train, val, best = loss.lines
    np.testing.assert_array_equal(train.get_xdata(), [1, 2, 3, 4, 5])
    np.testing.assert_allclose(train.get_ydata(), [2.0, 1.0, 2 / 3, 0.5, 0.4])
    np.testing.assert_allclose(val.get_ydata(), [2.2, 1.1, 2.2 / 3, 0.55, 0.44])
    assert set(best.get_xdata()) == {4}
    np.testing.assert_allclose(accuracy.lines[0].get_ydata(), [10, 20, 30, 40, 50])
    np.testing.assert_allclose(accuracy.lines[1].get_ydata(), [9, 18, 27, 36, 45])
    assert [text.get_text() for text in loss.get_legend().get_texts()] == ["training", "validation", "best epoch (4)"]


def test_training_curves_of_one_epoch_are_visible_points(drawn: list[Figure]) -> None:
    figures.training_curves(HISTORY[:1], best_epoch=1)
    assert drawn[0].axes[0].lines[0].get_marker() == "o"


# ---------------------------------------------------------------- confusion matrix


def test_confusion_shows_shares_of_each_row(drawn: list[Figure]) -> None:
    figures.confusion_figure(np.array([[3, 1, 0], [0, 5, 0], [0, 0, 0]]), names(3))
    (image,) = drawn[0].axes[0].images
    np.testing.assert_allclose(image.get_array(), [[75, 25, 0], [0, 100, 0], [0, 0, 0]])  # no images: no shares
    assert image.get_clim() == (0, 100)


@pytest.mark.parametrize("theme", figures.THEMES)
def test_confusion_writes_counts_that_stand_out_from_their_cell(drawn: list[Figure], theme: str) -> None:
    figures.confusion_figure(np.array([[3, 1], [4, 5]]), names(2), theme)
    axis = drawn[0].axes[0]
    texts = {text.get_position(): text for text in axis.texts}
    assert {place: text.get_text() for place, text in texts.items()} == {(0, 0): "3", (1, 0): "1", (0, 1): "4", (1, 1): "5"}
    cells = axis.images[0].cmap(axis.images[0].norm(axis.images[0].get_array()))[..., :3]
    for (column, row), text in texts.items():
        assert contrast(to_rgb(text.get_color()), cells[row, column]) > 3


@pytest.mark.parametrize("theme", figures.THEMES)
@pytest.mark.parametrize("share", [2, 25, 40, 50, 56, 60, 75, 100])
def test_counts_are_readable_at_every_share(drawn: list[Figure], theme: str, share: int) -> None:
    figures.confusion_figure(np.array([[share, 100 - share], [0, 1]]), names(2), theme)
    axis = drawn[0].axes[0]
    cells = axis.images[0].cmap(axis.images[0].norm(axis.images[0].get_array()))[..., :3]
    first = next(text for text in axis.texts if text.get_position() == (0, 0))
    assert contrast(to_rgb(first.get_color()), cells[0, 0]) > 3


def contrast(one: tuple[float, ...], other: tuple[float, ...]) -> float:
    """WCAG 2 contrast ratio of two sRGB colours, 1 to 21."""

    def luminance(colour: tuple[float, ...]) -> float:
        linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in colour]
        return float(np.dot([0.2126, 0.7152, 0.0722], linear))

    dark, light = sorted((luminance(one), luminance(other)))
    return (light + 0.05) / (dark + 0.05)


@pytest.mark.parametrize(("count", "labels", "numbers"), [(15, 15, True), (16, 16, False), (40, 40, False), (101, 0, False)])
def test_confusion_carries_names_and_counts_while_they_fit(drawn: list[Figure], count: int, labels: int, numbers: bool) -> None:
    figures.confusion_figure(random_confusion(count) + 1, names(count))
    axis = drawn[0].axes[0]
    shown = [text.get_text() for text in axis.get_yticklabels() if text.get_text().startswith("class_")]
    assert shown == names(labels)
    assert len(axis.texts) == (count * count if numbers else 0)
    assert ("number in alphabetical order" in axis.get_xlabel()) == (labels == 0)


# ---------------------------------------------------------------- galleries and scores


def test_gallery_shows_each_image_beside_its_overlay(drawn: list[Figure]) -> None:
    items = [(np.full((10, 10, 3), 20 * n, np.uint8), np.full((2, 2), n / 5, np.float32), f"image {n}") for n in range(5)]
    figures.heatmap_gallery(items)
    shown = [axis for axis in drawn[0].axes if axis.images]
    assert len(shown) == 10
    assert [axis.get_title(loc="left") for axis in shown[::2]] == [f"image {n}" for n in range(5)]
    for n, (square, heatmap, _) in enumerate(items):
        np.testing.assert_array_equal(shown[2 * n].images[0].get_array(), square)
        np.testing.assert_array_equal(shown[2 * n + 1].images[0].get_array(), overlay_heatmap(square, heatmap))


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_method_scores_shows_each_method_and_every_baseline(theme: str, monkeypatch: pytest.MonkeyPatch) -> None:
    numbers = {"better": "higher", "low": 0.4, "mean": 0.5, "high": 0.6, "n": 9}
    places = [
        ("gradcam", "pointing game"),
        ("random", "pointing game"),
        ("gradcam", "energy-based pointing game"),
        ("object area (chance level)", "energy-based pointing game"),
    ]
    table = [{"method": method, "score": score, **numbers} for method, score in places]
    drawn: list[Any] = []
    monkeypatch.setattr(figures, "png_of", lambda figure: drawn.append(figure) or b"")
    figures.method_scores(table, ["random", "object area (chance level)"], theme)
    (figure,) = drawn
    assert [axis.get_title() for axis in figure.axes] == [
        f"{score}\nhigher is better, n = 9" for score in ("pointing game", "energy-based pointing game")
    ]
    assert [label.get_text() for label in figure.axes[0].get_yticklabels()] == ["gradcam"]
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["random", "object area (chance level)"]
