"""Draw heatmaps as overlays on images and as transparent PNGs, without matplotlib."""

from __future__ import annotations

import io

import numpy as np
import numpy.typing as npt
from PIL import Image

STOPS = np.array([0.0, 0.25, 0.5, 0.75, 1.0])
COLOURS = np.array([[70, 20, 90, 0], [150, 35, 90, 90], [225, 80, 45, 160], [250, 165, 20, 200], [252, 245, 120, 225]])  # RGBA; 0 is clear
MAX_SIDE = 1024  # pixels, of a PNG


def colour_map(values: npt.NDArray[np.floating]) -> npt.NDArray[np.float64]:
    """Map values (...) in 0..1 to RGBA (..., 4) in 0..255."""
    return np.stack([np.interp(values, STOPS, COLOURS[:, channel]) for channel in range(4)], axis=-1)


def overlay_heatmap(image: npt.NDArray[np.uint8], heatmap: npt.NDArray[np.float32]) -> npt.NDArray[np.uint8]:
    """Draw a heatmap (h, w) in 0..1, enlarged bicubically, over an image (H, W, 3) uint8 RGB, greyed where the map is low."""
    height, width = image.shape[:2]
    large = np.asarray(Image.fromarray(heatmap.astype(np.float32)).resize((width, height), Image.Resampling.BICUBIC)).clip(0, 1)
    glow, opacity = np.split(colour_map(large), [3], axis=-1)
    opacity = opacity / 255
    grey = image.mean(axis=2, keepdims=True)
    base = 0.55 * image + 0.25 * grey + 0.2 * image * large[..., None]
    mixed: npt.NDArray[np.uint8] = np.clip(base * (1 - opacity) + glow * opacity, 0, 255).round().astype(np.uint8)
    return mixed


def heatmap_png(heatmap: npt.NDArray[np.floating], size: tuple[int, ...], crop_fraction: float | None = None) -> bytes:
    """Encode (h, w) values in 0..1 as a transparent PNG with the aspect ratio of `size` (width, height), at most MAX_SIDE a side.

    crop_fraction: side of the centred square that the map covers, over the short side; None if it covers the whole image.
    """
    scale = min(1.0, MAX_SIDE / max(size))
    width, height = (max(1, round(side * scale)) for side in size)
    inner = (width, height) if crop_fraction is None else (max(1, round(crop_fraction * min(width, height))),) * 2
    large = np.zeros((height, width), dtype=np.float32)
    left, top = (width - inner[0]) // 2, (height - inner[1]) // 2
    enlarged = Image.fromarray(heatmap.astype(np.float32)).resize(inner, Image.Resampling.BILINEAR)
    large[top : top + inner[1], left : left + inner[0]] = np.asarray(enlarged).clip(0, 1)
    data = io.BytesIO()
    Image.fromarray(colour_map(large).round().astype(np.uint8), "RGBA").save(data, "PNG")
    return data.getvalue()
