"""Corruptions by hand and by their properties; the table on a run; slices by hand."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from seewhy.api import Run
from seewhy.curation.split import read_split
from seewhy.data.image_set import open_images
from seewhy.errors import ConfigError
from seewhy.evaluation.corruptions import CORRUPTIONS, corrupt
from seewhy.evaluation.metrics import wilson_interval
from seewhy.evaluation.robustness import robustness, run_robustness, slices
from seewhy.reports.tables import save_robustness


@pytest.fixture(scope="module")
def square() -> np.ndarray:
    rng = np.random.default_rng(0)
    return np.asarray(Image.fromarray(rng.integers(40, 200, (14, 14, 3), dtype=np.uint8)).resize((112, 112), Image.Resampling.BICUBIC))


@pytest.mark.parametrize("name", CORRUPTIONS)
def test_stronger_is_farther_from_the_image_and_repeatable(square: np.ndarray, name: str) -> None:
    before = square.copy()
    found = [corrupt(square, name, strength) for strength in range(1, 6)]
    distances = [float(np.abs(f.astype(float) - square).mean()) for f in found]
    assert distances == sorted(distances) or name == "rotation"  # a smooth image may come to resemble itself again
    assert distances[0] > 0.5
    assert all(f.shape == square.shape and f.dtype == np.uint8 for f in found)
    assert np.array_equal(found[2], corrupt(square, name, 3))
    assert np.array_equal(square, before)


def test_brightness_by_hand() -> None:
    square = np.full((8, 8, 3), (100, 50, 0), dtype=np.uint8)
    brighter = corrupt(square, "brightness", 1)[0, 0]  # value 100/255 + 0.1, same hue and saturation
    np.testing.assert_allclose(brighter, [125.5, 62.75, 0], atol=1)
    assert corrupt(np.zeros((8, 8, 3), np.uint8), "brightness", 5).tolist() == np.full((8, 8, 3), 128).tolist()
    assert corrupt(square, "darkness", 5).max() == 0


def test_noise_has_the_deviation_it_says() -> None:
    grey = np.full((128, 128, 3), 128, dtype=np.uint8)
    assert (corrupt(grey, "noise", 2).astype(float) - 128).std() / 255 == pytest.approx(0.12, rel=0.03)


def test_jpeg_is_what_pillow_makes_of_that_quality(square: np.ndarray) -> None:
    import io

    buffer = io.BytesIO()
    Image.fromarray(square).save(buffer, "JPEG", quality=10)
    theirs = np.asarray(Image.open(buffer)).astype(float)
    assert np.abs(corrupt(square, "jpeg", 4) - theirs).mean() < 1


def test_rotation_keeps_the_middle_and_turns_the_rim() -> None:
    square = np.zeros((101, 101, 3), dtype=np.uint8)
    square[48:53, 70:80] = 255  # a bar to the right of the middle
    turned = corrupt(square, "rotation", 5)  # by 45 degrees, against the clock
    assert turned[50, 70:80].max() == 0
    y, x = np.argwhere(turned[..., 0] > 200).mean(axis=0)  # up and to the right, 24.5 pixels from the middle
    np.testing.assert_allclose([y, x], [50 - 24.5 / 2**0.5, 50 + 24.5 / 2**0.5], atol=1.0)


def test_table_on_a_run_agrees_with_its_evaluation(demo_run: Run, tmp_path: Path) -> None:
    images = open_images("scenes")
    test = read_split(demo_run.path, images).test
    table = robustness(demo_run, images, test, ["blur", "darkness"])
    assert table["corruption"].tolist() == ["none"] + ["blur"] * 5 + ["darkness"] * 5
    assert table.loc[0, "accuracy"] == pytest.approx(demo_run.metrics["test"]["accuracy"])
    low, high = wilson_interval(round(table.loc[0, "accuracy"] * len(test)), len(test))
    assert (table.loc[0, "low"], table.loc[0, "high"], table.loc[0, "n"]) == (low, high, len(test))
    for name in ("blur", "darkness"):
        by_strength = table[table["corruption"] == name]["accuracy"].to_numpy()
        assert by_strength[-1] < by_strength[0] - 0.1
    with pytest.raises(ConfigError, match="unknown corruption 'fog'"):
        robustness(demo_run, images, test, ["fog"])


def test_run_robustness_and_files(demo_run: Run, tmp_path: Path) -> None:
    table, parts = run_robustness(demo_run, 16, ["jpeg"])
    assert table["n"].unique().tolist() == [16]
    assert parts[parts["by"] == "colour"]["n"].sum() == demo_run.metrics["test"]["n"]
    files = save_robustness(table, parts, tmp_path / "new")
    assert [file.name for file in files] == ["robustness.csv", "robustness.png", "slices.csv"]
    assert len(pd.read_csv(files[0])) == 6
    assert Image.open(files[1]).width > 300


def test_slices_by_hand(cache: Path, tmp_path: Path) -> None:
    for c, name in enumerate("ab"):
        (tmp_path / name).mkdir()
        for n in range(6):
            side = 20 + 20 * n
            image = Image.new("RGB", (side, side), (80, 80, 80) if n % 2 else (200, 30 * c, 10))
            image.putpixel((n, c), (9 * n, 9 * n, 9 * n) if n % 2 else (9 * n, 0, 50))  # no two are equal
            image.save(tmp_path / name / f"{n}.png")
    images = open_images(str(tmp_path))
    right = np.array([True] * 9 + [False] * 3)
    found = slices(images, np.arange(12), right, np.array([5, 50])).set_index(["by", "slice"])
    assert found.loc[("colour", "grey"), ["accuracy", "n"]].tolist() == [4 / 6, 6]
    assert found.loc[("image size", "20 to 40 pixels a side"), ["accuracy", "n"]].tolist() == [1.0, 4]
    assert found.loc[("image size", "100 to 120 pixels a side"), ["accuracy", "n"]].tolist() == [0.5, 4]
    assert found.loc[("training images of the class", "5 to 5"), ["accuracy", "n"]].tolist() == [1.0, 6]
    assert found.loc[("training images of the class", "50 to 50"), ["accuracy", "n"]].tolist() == [0.5, 6]
