"""Bytes of an image file -> an upright RGB image, or the reason why not; under 1 GB whatever comes."""

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

from seewhy.data.shard_index import MAX_BYTES
from seewhy.data.shards import read_member, shard_of
from seewhy.errors import ImageError, reason_of

MAX_PIXELS = 80_000_000  # refused before decoding; more would take over 1 GB of memory on the way to RGB (benchmarks/torture.py)
FORMAT_PIXELS = {"JPEG": 110_000_000, "WEBP": 50_000_000}  # JPEGs are decoded at a smaller scale, WebP's decoder keeps three copies
LARGE = 16_000_000  # pixels from which images are decoded one at a time, and JPEGs at the scale that LARGE_SIDE needs
LARGE_SIDE = 2048
MAX_SIDE = 65_535  # of a JPEG; longer ones would need much memory to resize, however thin they are
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "PPM")  # Pillow knows more: some start other programs, some grow when loaded
MIN_SIDE = 8  # smaller than this there is nothing to see
STRIP = 1_000_000  # pixels that are brought to RGB at a time

_ONE_LARGE = threading.Lock()


def decode(data: bytes, min_decode_side: int | None = None, most: int | None = None) -> Image.Image:
    """Bytes of an image file -> upright RGB image; ValueError with the reason if that cannot be.

    The first frame of an animation; EXIF rotation applied; transparency over white;
    16-bit grey scaled by 1/257; CMYK and palettes converted.
    min_decode_side: pixels a side that suffice. A larger JPEG is then decoded at 1/2, 1/4 or 1/8 of its size (libjpeg's scaled
    transform), to at least that many pixels a side: a camera's photo in a fraction of the time. Images of over LARGE pixels are made
    smaller whatever their format, by whole factors, to at least `min_decode_side` or LARGE_SIDE.
    most: pixels that an image may have, below the limits above.
    """
    if not data:
        raise ValueError("empty file")
    try:
        image = Image.open(io.BytesIO(data), formats=FORMATS)
    except UnidentifiedImageError:
        raise ValueError("not an image") from None
    except Image.DecompressionBombError:  # Pillow's own limit lies above ours
        raise ValueError(f"more than {most or MAX_PIXELS:,} pixels") from None
    except Exception as error:  # decoders of hostile files raise nearly anything
        raise ValueError(_reason(error)) from None
    width, height = image.size
    limit = FORMAT_PIXELS.get(image.format or "", MAX_PIXELS)
    most = min(most or limit, limit)
    if width * height > most:
        raise ValueError(f"{width} x {height} pixels, more than {most:,}")
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
                upright = upright.reduce(factor)  # what comes next would take several times the memory of this
            return upright
    except Exception as error:  # as above
        raise ValueError(_reason(error)) from None


def _reason(error: Exception) -> str:
    text = reason_of(error, 1000)
    return "truncated" if "truncated" in text or "Truncated" in text else f"damaged ({text[:80]})"


def _to_rgb(image: Image.Image) -> Image.Image:
    """Strip by strip, so that a large image is not held in several modes at once."""
    if image.mode == "RGB" and "transparency" not in image.info:
        return image
    rows = max(1, STRIP // image.width)
    if rows >= image.height:
        return _strip_to_rgb(image)
    whole = Image.new("RGB", image.size)
    for top in range(0, image.height, rows):
        whole.paste(_strip_to_rgb(image.crop((0, top, image.width, min(top + rows, image.height)))), (0, top))
    return whole


def _strip_to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I"):  # 16-bit grey: I;16 and its byte orders, and I from older PNG readers
        grey = np.clip(np.asarray(image, dtype=np.int64), 0, 65535) / 257
        return Image.fromarray(grey.round().astype(np.uint8)).convert("RGB")
    if image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info:
        layer = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", layer.size, "white"), layer).convert("RGB")
    return image.convert("RGB")


def read_bytes(path: Path | str) -> bytes:
    """The content of an image file, or of an image in a shard; OSError where it cannot be read, or is too large for one."""
    if inside := shard_of(Path(path)):
        return read_member(*inside)
    found = os.stat(path)
    if not (stat.S_ISREG(found.st_mode) or stat.S_ISDIR(found.st_mode)):  # pipes and devices may have no end
        raise OSError(errno.EINVAL, "not a regular file")
    if found.st_size > MAX_BYTES:
        raise OSError(errno.EFBIG, f"{found.st_size / 1e6:,.0f} MB, more than {MAX_BYTES / 1e6:.0f}")
    return Path(path).read_bytes()


def read_or_reason(path: Path | str) -> bytes | str:
    """`read_bytes`, or in words why the file cannot be read."""
    try:
        return read_bytes(path)
    except FileNotFoundError:
        return "no such file"
    except OSError as error:
        return error.strerror or "cannot be read"


def read_image(path: Path | str, min_decode_side: int | None = None) -> Image.Image:
    """File -> upright RGB image; ImageError with path and reason if that cannot be. min_decode_side: see `decode`."""
    data = read_or_reason(path)
    if isinstance(data, str):
        raise ImageError(f"{path}: {data}", bad=((str(path), data),))
    try:
        return decode(data, min_decode_side)
    except ValueError as error:
        raise ImageError(f"{path}: {error}; replace or remove it", bad=((str(path), str(error)),)) from error


def upright_size(data: bytes) -> tuple[int, int]:
    """Width and height of a file that `decode` takes, before any scaling."""
    image = Image.open(io.BytesIO(data), formats=FORMATS)
    turned = image.getexif().get(ExifTags.Base.Orientation, 1) in (5, 6, 7, 8)
    return (image.height, image.width) if turned else image.size
