"""Corrupt images at five strengths: blur, noise, JPEG, brightness, darkness, rotation."""

from __future__ import annotations

import io
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from torch import Tensor


@dataclass(frozen=True)
class Corruption:
    """apply: (3, S, S) uint8, value -> (3, S, S) uint8. values: of the five strengths, the mildest first. unit: of the values."""

    apply: Callable[[Tensor, float], Tensor]
    values: tuple[float, float, float, float, float]
    unit: str


def _blur(image: Tensor, sigma: float) -> Tensor:
    from torchvision.transforms.v2 import functional as V  # slow to import

    side = 2 * int(3 * sigma + 0.5) + 1
    blurred: Tensor = V.gaussian_blur(image, [side, side], [sigma, sigma])
    return blurred


def _noise(image: Tensor, sigma: float) -> Tensor:
    noise = torch.randn(image.shape, generator=torch.Generator().manual_seed(0))
    return (image.float() + 255 * sigma * noise).round().clamp(0, 255).to(torch.uint8)


def _jpeg(image: Tensor, quality: float) -> Tensor:
    buffer = io.BytesIO()
    Image.fromarray(image.permute(1, 2, 0).numpy()).save(buffer, "JPEG", quality=int(quality))
    return torch.from_numpy(np.array(Image.open(buffer))).permute(2, 0, 1)


def _brightness(image: Tensor, added: float) -> Tensor:
    """Add to V of HSV, the largest channel, and keep hue and saturation."""
    scaled = image.float() / 255
    value = scaled.amax(dim=0, keepdim=True)
    brighter = (value + added).clamp(0, 1)
    ratio = torch.where(value > 0, brighter / value.clamp(min=1e-6), 0.0)
    lit = torch.where(value > 0, scaled * ratio, brighter)
    return (255 * lit).round().clamp(0, 255).to(torch.uint8)


def _rotation(image: Tensor, degrees: float) -> Tensor:
    from torchvision.transforms.v2 import InterpolationMode
    from torchvision.transforms.v2 import functional as V

    turned: Tensor = V.rotate(image, degrees, InterpolationMode.BILINEAR, fill=[127.0])
    return turned


# Values of blur, noise, JPEG and brightness are those of ImageNet-C (Hendrycks 2019, arXiv:1903.12261), for images 224 pixels wide.
# Darkness is brightness with the opposite sign; ImageNet-C has no rotation.
CORRUPTIONS: dict[str, Corruption] = {
    "blur": Corruption(_blur, (1, 2, 3, 4, 6), "sigma in pixels of the network's input"),
    "noise": Corruption(_noise, (0.08, 0.12, 0.18, 0.26, 0.38), "standard deviation, as a share of the value range"),
    "jpeg": Corruption(_jpeg, (25, 18, 15, 10, 7), "quality"),
    "brightness": Corruption(_brightness, (0.1, 0.2, 0.3, 0.4, 0.5), "added to the value of HSV"),
    "darkness": Corruption(_brightness, (-0.1, -0.2, -0.3, -0.4, -0.5), "added to the value of HSV"),
    "rotation": Corruption(_rotation, (5, 10, 20, 30, 45), "degrees"),
}


def corrupt(pixels: npt.NDArray[np.uint8], name: str, strength: int) -> npt.NDArray[np.uint8]:
    """(S, S, 3) uint8 RGB -> the same shape, deterministic; strength 1 (mild) to 5 (severe)."""
    corruption = CORRUPTIONS[name]
    image = torch.from_numpy(pixels.copy()).permute(2, 0, 1)
    changed = corruption.apply(image, corruption.values[strength - 1])
    return np.ascontiguousarray(changed.permute(1, 2, 0).numpy())
