"""Crop, resize, augment and normalise images for a network."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image, ImageEnhance
from pydantic import TypeAdapter
from torch import Tensor, nn
from torch.nn import functional as F

RESAMPLING = {name: Image.Resampling[name.upper()] for name in ("bilinear", "bicubic", "lanczos", "nearest")}

# Numbers of views; those from FIRST_RANDOM_VIEW on are random.
EVAL_VIEW = 0
MIRRORED_VIEW = 1
FIRST_RANDOM_VIEW = 2


@dataclass(frozen=True)
class Preprocessing:
    """Input of a network: (size, size, 3) RGB pixels, scaled to 0..1, minus mean, over std.

    interpolation: a key of RESAMPLING.
    resize: 'squash' scales the whole image to a square; 'crop' takes the centred square of `crop` times the short side (timm's `crop_pct`).
    """

    size: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    interpolation: str
    crop: float
    resize: str = "squash"

    @property
    def min_decode_side(self) -> int:
        """Short side in pixels to which a JPEG may be decoded without loss in any view: twice `size`.

        A random view keeps at least 35% of the area, 0.6 of a side, so that it is still downsampled.
        """
        return 2 * self.size

    def as_dict(self) -> dict[str, Any]:
        """The fields, as `run.json` holds them."""
        return asdict(self)

    @staticmethod
    def from_dict(values: dict[str, Any]) -> Preprocessing:
        """Inverse of `as_dict`, lists for tuples accepted. Raises pydantic's ValidationError, a ValueError."""
        return TypeAdapter(Preprocessing).validate_python(values)


@dataclass(frozen=True)
class View:
    """A crop box in pixels (left, top, right, bottom), a horizontal flip, and colour factors (1 changes nothing)."""

    box: tuple[float, float, float, float]
    flip: bool = False
    brightness: float = 1.0
    contrast: float = 1.0
    saturation: float = 1.0


def eval_view(width: int, height: int, preprocessing: Preprocessing, flip: bool = False) -> View:
    """The whole image, or the centre crop: resize and centre crop in a single resampling step."""
    if preprocessing.resize == "squash":
        return View(box=(0.0, 0.0, float(width), float(height)), flip=flip)
    side = preprocessing.crop * min(width, height)
    left, top = (width - side) / 2, (height - side) / 2
    return View(box=(left, top, left + side, top + side), flip=flip)


def random_view(width: int, height: int, rng: np.random.Generator) -> View:
    """A random resized crop (35-100% of the area, aspect 3:4 to 4:3), flip and colour jitter (0.7 to 1.3).

    The lower bound of the area is fastai's; the 8% of ImageNet training from scratch loses small objects.
    """
    box = (0.0, 0.0, float(width), float(height))
    for _ in range(10):
        area = rng.uniform(0.35, 1.0) * width * height
        ratio = np.exp(rng.uniform(np.log(3 / 4), np.log(4 / 3)))
        w, h = float(np.sqrt(area * ratio)), float(np.sqrt(area / ratio))
        if w <= width and h <= height:
            left, top = rng.uniform(0, width - w), rng.uniform(0, height - h)
            box = (left, top, left + w, top + h)
            break
    brightness, contrast, saturation = rng.uniform(0.7, 1.3, size=3)
    flip = bool(rng.random() < 0.5)
    return View(box, flip, float(brightness), float(contrast), float(saturation))


def view_of(number: int, image_hash: str, width: int, height: int, preprocessing: Preprocessing) -> View:
    """View `number`: EVAL_VIEW, MIRRORED_VIEW, or a random view, seeded by the image's content and the number.

    image_hash: sha256 of the image's content, hexadecimal.
    """
    if number < FIRST_RANDOM_VIEW:
        return eval_view(width, height, preprocessing, flip=number == MIRRORED_VIEW)
    seed = np.random.SeedSequence([int(image_hash[:16], 16), number])
    return random_view(width, height, np.random.default_rng(seed))


def render(image: Image.Image, view: View, size: tuple[int, int], interpolation: str) -> npt.NDArray[np.uint8]:
    """Crop, resize (antialiased) to `size` (width, height), flip and recolour an RGB image. Return (height, width, 3) uint8 RGB."""
    pixels = _crop_and_resize(image, view.box, size, interpolation)
    if view.flip:
        pixels = np.ascontiguousarray(pixels[:, ::-1])
    for enhance, factor in (
        (ImageEnhance.Brightness, view.brightness),
        (ImageEnhance.Contrast, view.contrast),
        (ImageEnhance.Color, view.saturation),
    ):
        if factor != 1.0:
            pixels = np.asarray(enhance(Image.fromarray(pixels)).enhance(factor))
    return pixels


def _crop_and_resize(
    image: Image.Image, box: tuple[float, float, float, float], size: tuple[int, int], interpolation: str
) -> npt.NDArray[np.uint8]:
    """Resize by PyTorch (bilinear, bicubic), three times as fast as Pillow, else by Pillow. PyTorch crops at whole pixels.

    Both round between the two passes, PyTorch after the columns and Pillow after the rows, so that they differ by about a grey level.
    """
    if interpolation not in ("bilinear", "bicubic"):
        return np.asarray(image.resize(size, RESAMPLING[interpolation], box=box))
    left, top = (min(round(low), side - 1) for low, side in zip(box[:2], image.size, strict=True))
    right, bottom = (max(round(high), low + 1) for high, low in zip(box[2:], (left, top), strict=True))
    crop = torch.from_numpy(np.array(image)[top:bottom, left:right])
    resized = F.interpolate(crop.permute(2, 0, 1)[None], (size[1], size[0]), mode=interpolation, antialias=True)
    pixels: npt.NDArray[np.uint8] = resized[0].permute(1, 2, 0).contiguous().numpy()
    return pixels


def flip_views(pixels: npt.NDArray[np.uint8], flip: bool | None) -> list[npt.NDArray[np.uint8]]:
    """(N, H, W, 3) pixels, and with `flip` their mirror images too, for test-time augmentation."""
    return [pixels, np.ascontiguousarray(pixels[:, :, ::-1])] if flip else [pixels]


class Normalize(nn.Module):
    """Map (N, 3, H, W) values 0..255 to (x / 255 - mean) / std, float32."""

    scale: Tensor
    shift: Tensor

    def __init__(self, preprocessing: Preprocessing) -> None:
        super().__init__()
        mean, std = torch.tensor(preprocessing.mean), torch.tensor(preprocessing.std)
        self.register_buffer("scale", (1 / (255 * std)).view(1, 3, 1, 1))
        self.register_buffer("shift", (-mean / std).view(1, 3, 1, 1))

    def forward(self, pixels: Tensor) -> Tensor:
        return pixels.float() * self.scale + self.shift
