"""Draw heatmaps: one colour map, overlays on the image and transparent PNGs, without matplotlib."""

from __future__ import annotations

import io

import numpy as np
import numpy.typing as npt
from PIL import Image

# Value -> red, green, blue, alpha: what has no weight stays clear.
STOPS = np.array([0.0, 0.25, 0.5, 0.75, 1.0])


COLOURS = np.array([[70, 20, 90, 0], [150, 35, 90, 90], [225, 80, 45, 160], [250, 165, 20, 200], [252, 245, 120, 225]])


LARGEST = 1024  # pixels a side


def colour_map(values: npt.NDArray[np.floating]) -> npt.NDArray[np.float64]:
    """(...) values from 0 to 1 -> (..., 4) red, green, blue, alpha from 0 to 255."""
    return np.stack([np.interp(values, STOPS, COLOURS[:, channel]) for channel in range(4)], axis=-1)


def overlay_heatmap(image: npt.NDArray[np.uint8], heatmap: npt.NDArray[np.float32]) -> npt.NDArray[np.uint8]:
    """(H, W, 3) uint8 RGB and (h, w) 0..1 -> (H, W, 3): greyed where cold, glowing where hot.

    The map is enlarged bicubically and clipped to 0..1.
    """
    height, width = image.shape[:2]
    large = np.asarray(Image.fromarray(heatmap.astype(np.float32)).resize((width, height), Image.Resampling.BICUBIC)).clip(0, 1)
    glow, opacity = np.split(colour_map(large), [3], axis=-1)
    opacity = opacity / 255
    grey = image.mean(axis=2, keepdims=True)
    base = 0.55 * image + 0.25 * grey + 0.2 * image * large[..., None]
    mixed: npt.NDArray[np.uint8] = np.clip(base * (1 - opacity) + glow * opacity, 0, 255).round().astype(np.uint8)
    return mixed


def heat_png(heatmap: npt.NDArray[np.floating], size: tuple[int, ...], crop_fraction: float | None = None) -> bytes:
    """(h, w) values from 0 to 1 -> a PNG with transparency of the proportions of `size` (width, height), at most LARGEST a side.

    crop_fraction: where the map covers the centred square alone, the square's side over the short side.
    """
    share = min(1.0, LARGEST / max(size))
    width, height = (max(1, round(side * share)) for side in size)
    inner = (width, height) if crop_fraction is None else (max(1, round(crop_fraction * min(width, height))),) * 2
    large = np.zeros((height, width), dtype=np.float32)
    left, top = (width - inner[0]) // 2, (height - inner[1]) // 2
    enlarged = Image.fromarray(heatmap.astype(np.float32)).resize(inner, Image.Resampling.BILINEAR)
    large[top : top + inner[1], left : left + inner[0]] = np.asarray(enlarged).clip(0, 1)
    data = io.BytesIO()
    Image.fromarray(colour_map(large).round().astype(np.uint8), "RGBA").save(data, "PNG")
    return data.getvalue()
