"""Decode image files to upright RGB images within 1 GB of memory, or give the reason why that fails."""

from __future__ import annotations

import errno
import io
import os
import stat
import threading
from contextlib import nullcontext
from pathlib import Path

import numpy as np
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError

from seewhy.data.shard_index import refuse_large
from seewhy.data.shards import read_member, shard_of
from seewhy.errors import ImageError, reason_of

MAX_PIXELS = 80_000_000  # limit before decoding; more would need over 1 GB of memory (benchmarks/torture.py)
FORMAT_PIXELS = {"JPEG": 110_000_000, "WEBP": 50_000_000}  # JPEGs are decoded at a reduced scale, WebP needs three copies
LARGE = 16_000_000  # pixels; larger images are decoded one at a time and reduced to about LARGE_SIDE
LARGE_SIDE = 2048
MAX_SIDE = 65_535  # longer images would need much memory to resize, however thin
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "PPM")  # not all of Pillow's: some run other programs, some grow when loaded
MIN_SIDE = 8
STRIP = 1_000_000  # pixels converted to RGB at a time

_ONE_LARGE = threading.Lock()


def decode(data: bytes, min_decode_side: int | None = None, max_pixels: int | None = None) -> Image.Image:
    """Decode an image file to an upright RGB image. Raises ValueError with the reason.

    First frame of an animation; EXIF rotation applied; transparency over white; 16-bit grey scaled by 1/257; CMYK and palettes converted.
    min_decode_side: pixels per side that suffice. Larger JPEGs are decoded at 1/2, 1/4 or 1/8 of their size (libjpeg's scaled DCT), to at
    least that side; images of over LARGE pixels are reduced by whole factors to at least `min_decode_side` or LARGE_SIDE.
    max_pixels: a limit below those above.
    """
    if not data:
        raise ValueError("empty file")
    try:
        image = Image.open(io.BytesIO(data), formats=FORMATS)
    except UnidentifiedImageError:
        raise ValueError("not an image") from None
    except Image.DecompressionBombError:  # Pillow's limit is above ours
        raise ValueError(f"more than {max_pixels or MAX_PIXELS:,} pixels") from None
    except Exception as error:  # decoders of hostile files raise nearly anything
        raise ValueError(_reason(error)) from None
    width, height = image.size
    limit = FORMAT_PIXELS.get(image.format or "", MAX_PIXELS)
    max_pixels = min(max_pixels or limit, limit)
    if width * height > max_pixels:
        raise ValueError(f"{width} x {height} pixels, more than {max_pixels:,}")
    if max(width, height) > MAX_SIDE:
        raise ValueError(f"{width} x {height} pixels, longer than {MAX_SIDE:,}")
    if min(width, height) < MIN_SIDE:
        raise ValueError(f"{width} x {height} pixels, too small (at least {MIN_SIDE} x {MIN_SIDE})")
    if image.mode == "F":
        raise ValueError("floating-point pixels without a known range; convert it to 8 or 16 bit")
    large = width * height > LARGE
    if large:
        min_decode_side = min(min_decode_side or LARGE_SIDE, LARGE_SIDE)
    try:
        with _ONE_LARGE if large else nullcontext():
            if min_decode_side is not None and image.format == "JPEG":
                image.draft(image.mode, (min_decode_side, min_decode_side))
            image.load()
            ImageOps.exif_transpose(image, in_place=True)
            upright = _to_rgb(image)
            if large and min_decode_side is not None and (factor := min(upright.size) // min_decode_side) > 1:
                upright = upright.reduce(factor)  # resizing would need several times its memory
            return upright
    except Exception as error:
        raise ValueError(_reason(error)) from None


def _reason(error: Exception) -> str:
    text = reason_of(error, 1000)
    return "truncated" if "truncated" in text or "Truncated" in text else f"damaged ({text[:80]})"


def _to_rgb(image: Image.Image) -> Image.Image:
    """Convert strip by strip, so that a large image is not in memory in several modes."""
    if image.mode == "RGB" and "transparency" not in image.info:
        return image
    rows = max(1, STRIP // image.width)
    if rows >= image.height:
        return _strip_to_rgb(image)
    converted = Image.new("RGB", image.size)
    for top in range(0, image.height, rows):
        converted.paste(_strip_to_rgb(image.crop((0, top, image.width, min(top + rows, image.height)))), (0, top))
    return converted


def _strip_to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I"):  # 16-bit grey: I;16 and its byte orders, and I from older PNG readers
        grey = np.clip(np.asarray(image, dtype=np.int64), 0, 65535) / 257
        return Image.fromarray(grey.round().astype(np.uint8)).convert("RGB")
    if image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info:
        layer = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", layer.size, "white"), layer).convert("RGB")
    return image.convert("RGB")


def read_bytes(path: Path | str) -> bytes:
    """Read an image file, or an image in a shard. Raises OSError if it is unreadable or too large."""
    if member := shard_of(Path(path)):
        return read_member(*member)
    status = os.stat(path)
    if not (stat.S_ISREG(status.st_mode) or stat.S_ISDIR(status.st_mode)):  # pipes and devices may be endless
        raise OSError(errno.EINVAL, "not a regular file")
    refuse_large(status.st_size)
    return Path(path).read_bytes()


def read_or_reason(path: Path | str) -> bytes | str:
    """Return `read_bytes`, or the reason why the file cannot be read."""
    try:
        return read_bytes(path)
    except FileNotFoundError:
        return "no such file"
    except OSError as error:
        return error.strerror or "cannot be read"


def read_image(path: Path | str, min_decode_side: int | None = None) -> Image.Image:
    """Read and `decode` an image file. Raises ImageError with path and reason."""
    data = read_or_reason(path)
    if isinstance(data, str):
        raise ImageError(f"{path}: {data}", bad=((str(path), data),))
    try:
        return decode(data, min_decode_side)
    except ValueError as error:
        raise ImageError(f"{path}: {error}; replace or remove it", bad=((str(path), str(error)),)) from error


def upright_size(data: bytes) -> tuple[int, int]:
    """Width and height of a decodable file, upright, before any scaling."""
    image = Image.open(io.BytesIO(data), formats=FORMATS)
    rotated = image.getexif().get(ExifTags.Base.Orientation, 1) in (5, 6, 7, 8)
    return (image.height, image.width) if rotated else image.size
