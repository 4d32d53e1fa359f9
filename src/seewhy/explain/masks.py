"""Read the mask of the object in an image, from the demo set, Caltech-101's annotations, or the user's own masks."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw

from seewhy.data.decode import read_image
from seewhy.errors import ImageError
from seewhy.models.transforms import Preprocessing, View, eval_view

# Caltech-101's annotation folders that are not named after the class.
CALTECH_FOLDERS = {"airplanes": "Airplanes_Side_2", "Faces": "Faces_2", "Faces_easy": "Faces_3", "Motorbikes": "Motorbikes_16"}


def object_mask(path: Path, preprocessing: Preprocessing) -> npt.NDArray[np.bool_] | None:
    """Return (size, size) bool, True on the object, of the part of the image that the network sees; None if there is no mask.

    .../images/CLASS/NAME.jpg has its mask in .../masks/CLASS/NAME.png (white on black), as in the demo set.
    .../101_ObjectCategories/CLASS/image_0001.jpg has its contour in .../Annotations/CLASS/annotation_0001.mat.
    """
    if mask := _mask_file(path):
        return _network_view(read_image(mask).convert("L"), preprocessing) > 127
    if annotation := _annotation_file(path):
        image = read_image(path)
        drawn = Image.new("L", image.size)
        ImageDraw.Draw(drawn).polygon([(float(x), float(y)) for x, y in _contour(annotation)], fill=255)
        return _network_view(drawn, preprocessing) > 127
    return None


def _network_view(mask: Image.Image, preprocessing: Preprocessing) -> npt.NDArray[np.uint8]:
    view: View = eval_view(mask.width, mask.height, preprocessing)
    return np.asarray(mask.resize((preprocessing.size, preprocessing.size), Image.Resampling.BOX, box=view.box))


def _mask_file(path: Path) -> Path | None:
    folder = path.parent.parent
    mask = (folder.parent / "masks" / path.parent.name / path.name).with_suffix(".png")
    return mask if folder.name == "images" and mask.is_file() else None


def _annotation_file(path: Path) -> Path | None:
    number = re.fullmatch(r"image_(\d{4})\.jpg", path.name)
    if number is None or path.parent.parent.name != "101_ObjectCategories":
        return None
    folder = CALTECH_FOLDERS.get(path.parent.name, path.parent.name)
    annotation = path.parents[2] / "Annotations" / folder / f"annotation_{number[1]}.mat"
    return annotation if annotation.is_file() else None


def _contour(annotation: Path) -> npt.NDArray[np.float64]:
    """Return the outline (P, 2) as x, y in pixels from 0; Caltech's show_annotation.m counts from 1."""
    from scipy.io import loadmat

    try:
        content = loadmat(annotation)
        top, _, left, _ = content["box_coord"].ravel().astype(np.float64)
        contour: npt.NDArray[np.float64] = content["obj_contour"].astype(np.float64).T + np.array([left - 1, top - 1])
    except (OSError, ValueError, KeyError, TypeError) as error:
        reason = f"its outline cannot be read ({error})"
        raise ImageError(f"{annotation}: {reason}; replace or remove it", bad=((str(annotation), reason),)) from error
    return contour
