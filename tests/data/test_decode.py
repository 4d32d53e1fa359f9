"""What an image may cost: limits before decoding, strips, smaller scales; what is no image (tests/test_images.py has the formats)."""

from __future__ import annotations

import io
import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from seewhy.data import decode as decoding
from seewhy.data import shard_index
from seewhy.data.decode import decode
from seewhy.data.listing import list_images
from seewhy.data.verify import check_file
from seewhy.errors import DataError


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P", "CMYK", "I;16", "L", "1"])
def test_strips_are_the_same_as_the_whole(mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    if mode == "I;16":
        image = Image.fromarray(rng.integers(0, 65536, (37, 50), dtype=np.uint16))
    else:
        image = Image.fromarray(rng.integers(0, 256, (37, 50, 4), dtype=np.uint8), "RGBA").convert("RGB" if mode == "CMYK" else "RGBA")
        image = image.convert(mode)
    options = {"transparency": 3} if mode == "P" else {}
    file = io.BytesIO()
    image.save(file, "TIFF" if mode == "CMYK" else "PNG", **options)
    whole = np.asarray(decode(file.getvalue()))
    monkeypatch.setattr(decoding, "STRIP", 50 * 8)
    np.testing.assert_array_equal(np.asarray(decode(file.getvalue())), whole)
    assert whole.shape == (37, 50, 3)


def test_a_large_jpeg_is_decoded_smaller_and_measured_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    image = Image.new("RGB", (640, 400), "red")
    exif = image.getexif()
    exif[0x112] = 6  # to be turned by 90 degrees
    image.save(tmp_path / "a.jpg", exif=exif)
    monkeypatch.setattr(decoding, "LARGE", 1000)
    monkeypatch.setattr(decoding, "LARGE_SIDE", 100)
    assert decode((tmp_path / "a.jpg").read_bytes()).size == (100, 160)  # a quarter of its size, upright
    checked = check_file(tmp_path / "a.jpg")
    assert (checked.width, checked.height, checked.problem) == (400, 640, "")


def test_limits_by_format_and_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    image = Image.new("RGB", (40, 30))
    monkeypatch.setattr(decoding, "MAX_PIXELS", 1000)
    monkeypatch.setattr(decoding, "FORMAT_PIXELS", {"JPEG": 1300, "WEBP": 1100})
    for suffix, words in [("jpg", ""), ("png", "40 x 30 pixels, more than 1,000"), ("webp", "40 x 30 pixels, more than 1,100")]:
        image.save(tmp_path / f"a.{suffix}")
        assert check_file(tmp_path / f"a.{suffix}").problem == words
    monkeypatch.setattr(shard_index, "MAX_BYTES", 500)
    (tmp_path / "b.jpg").write_bytes(bytes(501))
    assert "more than" in check_file(tmp_path / "b.jpg").problem


def test_pipes_and_links_to_nowhere_are_no_images(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.jpg")
    (tmp_path / "nowhere.jpg").symlink_to(tmp_path / "missing")
    (tmp_path / "zero.jpg").symlink_to("/dev/zero")
    found = [check_file(tmp_path / name).problem for name in ("pipe.jpg", "nowhere.jpg", "zero.jpg")]
    assert found == ["not a regular file", "no such file or directory", "not a regular file"]


def test_names_that_are_not_utf8_are_told(tmp_path: Path) -> None:
    Image.new("RGB", (20, 20)).save(tmp_path / "a.png")
    os.rename(tmp_path / "a.png", os.fsencode(str(tmp_path)) + b"/caf\xe9.png")
    with pytest.raises(DataError, match=r"caf.\.png: the name is not UTF-8; rename it"):
        list_images(tmp_path)


def test_large_images_become_smaller_by_whole_factors(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decoding, "LARGE", 1000)
    file = io.BytesIO()
    Image.new("RGB", (640, 400), "red").save(file, "PNG")
    assert decode(file.getvalue(), min_decode_side=64).size == (107, 67)  # 400 // 64 = 6 times smaller
    assert decode(file.getvalue()).size == (640, 400)  # LARGE_SIDE is 2,048
