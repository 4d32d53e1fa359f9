"""Image -> the square a network sees: the only home of size, mean, std, crop and augmentation."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image, ImageEnhance
from torch import Tensor, nn
from torch.nn import functional as F

RESAMPLING = {
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
    "lanczos": Image.Resampling.LANCZOS,
    "nearest": Image.Resampling.NEAREST,
}


# Numbers of views: how the network answers, the same mirrored, and from FIRST_RANDOM_VIEW on random ones.
EVAL_VIEW = 0
MIRRORED_VIEW = 1
FIRST_RANDOM_VIEW = 2


@dataclass(frozen=True)
class Preprocessing:
    """What a network expects: a (size, size, 3) RGB square, scaled to 0..1, minus mean, over std.

    resize: 'squash' shows the network the whole image, its sides scaled apart; 'crop' the centred
    square of `crop` times the short side (timm's `crop_pct`), in its own proportions.
    """

    size: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    interpolation: str
    crop: float
    resize: str = "squash"

    @property
    def min_decode_side(self) -> int:
        """Pixels a side of an image beyond which decoding more of them shows in no view: twice the network's own.

        A random view keeps at least 35% of the area, 0.6 of a side, and is still sampled down then.
        """
        return 2 * self.size

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)

    @staticmethod
    def from_dict(values: dict[str, Any]) -> Preprocessing:
        return Preprocessing(
            size=int(values["size"]),
            mean=tuple(values["mean"]),
            std=tuple(values["std"]),
            interpolation=str(values["interpolation"]),
            crop=float(values["crop"]),
            resize=str(values["resize"]),
        )


@dataclass(frozen=True)
class View:
    """One way of looking at an image: a crop box in pixels (left, top, right, bottom), a flip, colour factors."""

    box: tuple[float, float, float, float]
    flip: bool = False
    brightness: float = 1.0
    contrast: float = 1.0
    saturation: float = 1.0


def eval_view(width: int, height: int, preprocessing: Preprocessing, flip: bool = False) -> View:
    """The whole image, or the centred square that `crop` keeps.

    The latter is the usual resize-then-centre-crop in a single resampling step, so that a
    panorama of 20,000 pixels costs no more than its middle.
    """
    if preprocessing.resize == "squash":
        return View(box=(0.0, 0.0, float(width), float(height)), flip=flip)
    side = preprocessing.crop * min(width, height)
    left, top = (width - side) / 2, (height - side) / 2
    return View(box=(left, top, left + side, top + side), flip=flip)


def random_view(width: int, height: int, rng: np.random.Generator) -> View:
    """A random resized crop (35-100% of the area, aspect 3:4 to 4:3), flip and colour jitter.

    The lower bound of the area is fastai's; 8% (ImageNet training from scratch) cuts small
    objects away, which a short fine-tuning does not recover from.
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
    """The view of this number: EVAL_VIEW, MIRRORED_VIEW, or a random one.

    A random view depends on the image's content and its number alone, so that it is the
    same in every run, cached or not, in one process or many.
    """
    if number < FIRST_RANDOM_VIEW:
        return eval_view(width, height, preprocessing, flip=number == MIRRORED_VIEW)
    seed = np.random.SeedSequence([int(image_hash[:16], 16), number])
    return random_view(width, height, np.random.default_rng(seed))


def render(image: Image.Image, view: View, size: tuple[int, int], interpolation: str) -> npt.NDArray[np.uint8]:
    """Cut, resize (antialiased) to (width, height), flip and recolour: RGB image -> (height, width, 3) uint8 RGB."""
    square = _cut_and_resize(image, view.box, size, interpolation)
    if view.flip:
        square = np.ascontiguousarray(square[:, ::-1])
    for enhance, factor in (
        (ImageEnhance.Brightness, view.brightness),
        (ImageEnhance.Contrast, view.contrast),
        (ImageEnhance.Color, view.saturation),
    ):
        if factor != 1.0:
            square = np.asarray(enhance(Image.fromarray(square)).enhance(factor))
    return square


def _cut_and_resize(
    image: Image.Image, box: tuple[float, float, float, float], size: tuple[int, int], interpolation: str
) -> npt.NDArray[np.uint8]:
    """Bilinear and bicubic by PyTorch, which does the work of Pillow's resize in a third of the time; others by Pillow.

    Both round between the two passes. PyTorch goes down the columns first and Pillow along the rows, so they differ by a
    grey level here and there, and by more where bicubic overshoots at a black line on white. PyTorch cuts at whole pixels.
    """
    if interpolation not in ("bilinear", "bicubic"):
        return np.asarray(image.resize(size, RESAMPLING[interpolation], box=box))
    left, top = (min(round(low), side - 1) for low, side in zip(box[:2], image.size, strict=True))
    right, bottom = (max(round(high), low + 1) for high, low in zip(box[2:], (left, top), strict=True))
    pixels = torch.from_numpy(np.array(image)[top:bottom, left:right])
    resized = F.interpolate(pixels.permute(2, 0, 1)[None], (size[1], size[0]), mode=interpolation, antialias=True)
    square: npt.NDArray[np.uint8] = resized[0].permute(1, 2, 0).contiguous().numpy()
    return square


def directions(squares: npt.NDArray[np.uint8], flip: bool | None) -> list[npt.NDArray[np.uint8]]:
    """(N, H, W, 3) images, and with `flip` their mirror images too: what is averaged over at test time."""
    return [squares, np.ascontiguousarray(squares[:, :, ::-1])] if flip else [squares]


class Normalize(nn.Module):
    """(N, 3, H, W) of 0..255 -> (x / 255 - mean) / std, float32."""

    scale: Tensor
    shift: Tensor

    def __init__(self, preprocessing: Preprocessing) -> None:
        super().__init__()
        mean, std = torch.tensor(preprocessing.mean), torch.tensor(preprocessing.std)
        self.register_buffer("scale", (1 / (255 * std)).view(1, 3, 1, 1))
        self.register_buffer("shift", (-mean / std).view(1, 3, 1, 1))

    def forward(self, squares: Tensor) -> Tensor:
        return squares.float() * self.scale + self.shift
