"""Test object masks of the demo set and Caltech-101, and images without one."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from scipy.io import savemat

from seewhy.errors import ImageError
from seewhy.explain.masks import object_mask
from seewhy.models.transforms import Preprocessing

SQUASH = Preprocessing(20, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5), "bilinear", 0.5)
CROP = Preprocessing(20, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5), "bilinear", 0.5, "crop")


def image_at(path: Path, size: tuple[int, int] = (80, 40)) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size).save(path)
    return path


def test_mask_beside_the_images_is_seen_as_the_network_sees(tmp_path: Path) -> None:
    image = image_at(tmp_path / "images" / "cat" / "1.jpg")
    mask = Image.new("L", (80, 40))
    mask.paste(255, (0, 0, 40, 20))  # the top left quarter
    (tmp_path / "masks" / "cat").mkdir(parents=True)
    mask.save(tmp_path / "masks" / "cat" / "1.png")
    found = object_mask(image, SQUASH)
    assert found is not None
    expected = np.zeros((20, 20), dtype=bool)
    expected[:10, :10] = True
    assert np.array_equal(found, expected)
    # The centred square of half the short side, 30..50 by 10..30: the mask covers its top left quarter too.
    assert np.array_equal(object_mask(image, CROP), expected)


def test_contour_of_caltech_by_hand(tmp_path: Path) -> None:
    image = image_at(tmp_path / "101_ObjectCategories" / "airplanes" / "image_0007.jpg")
    folder = tmp_path / "Annotations" / "Airplanes_Side_2"
    folder.mkdir(parents=True)
    # A box whose contour is its border: rows 9..28, columns 21..60, counted from 1.
    contour = np.array([[0.0, 39, 39, 0], [0, 0, 19, 19]])
    savemat(folder / "annotation_0007.mat", {"box_coord": np.array([[9, 28, 21, 60]]), "obj_contour": contour})
    found = object_mask(image, SQUASH)
    assert found is not None
    rows, columns = np.flatnonzero(found.any(axis=1)), np.flatnonzero(found.any(axis=0))
    assert (rows[0], rows[-1], columns[0], columns[-1]) == (4, 13, 5, 14)
    assert found.sum() == 100


def test_a_broken_outline_is_one_line(tmp_path: Path) -> None:
    image = image_at(tmp_path / "101_ObjectCategories" / "ant" / "image_0001.jpg")
    folder = tmp_path / "Annotations" / "ant"
    folder.mkdir(parents=True)
    (folder / "annotation_0001.mat").write_bytes(b"no matlab file" * 20)
    with pytest.raises(ImageError, match=r"annotation_0001.mat: its outline cannot be read") as caught:
        object_mask(image, SQUASH)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("path", ["cat/1.jpg", "images/cat/1.jpg", "101_ObjectCategories/ant/image_0001.jpg", "a/b/odd.jpg"])
def test_no_outline(tmp_path: Path, path: str) -> None:
    assert object_mask(image_at(tmp_path / path), SQUASH) is None


def test_outlines_of_real_airplanes_hold_the_object(caltech_root: Path) -> None:
    folder = caltech_root / "caltech101" / "101_ObjectCategories" / "airplanes"
    shares = []
    for n in (1, 60, 300):
        found = object_mask(folder / f"image_{n:04d}.jpg", SQUASH)
        assert found is not None
        shares.append(found.mean())
        assert not found[0].any()  # no aeroplane touches the upper edge
    assert all(0.05 < share < 0.6 for share in shares)
