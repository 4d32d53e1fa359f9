"""Images of every kind decoded or refused with a reason, folders listed and checked once, Caltech-101 in place and downloaded."""

from __future__ import annotations

import functools
import gc
import hashlib
import io
import os
import struct
import tarfile
import threading
import warnings
import zipfile
import zlib
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
import torchvision
from PIL import Image
from torchvision.datasets import caltech

from seewhy.data import verify
from seewhy.data.decode import decode, read_image
from seewhy.data.image_set import conflicting_duplicates, open_images
from seewhy.data.listing import list_caltech101
from seewhy.data.verify import ImageCheck, check_file, check_files
from seewhy.errors import DataError, ImageError, OutputError

RED, GREEN, BLUE, WHITE = (255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255)


@pytest.fixture(autouse=True)
def no_data_elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """Downloads are tested in empty places, whatever the environment of who runs the tests points to."""
    monkeypatch.delenv("SEEWHY_DATA", raising=False)


def encoded(image: Image.Image, form: str = "PNG", **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, form, **options)
    return buffer.getvalue()


def two_tone(width: int = 32, height: int = 16) -> Image.Image:
    """Left half red, right half blue."""
    image = Image.new("RGB", (width, height), RED)
    image.paste(BLUE, (width // 2, 0, width, height))
    return image


def pixel(data: bytes, x: int, y: int) -> tuple[int, int, int]:
    image = decode(data)
    assert image.mode == "RGB"
    return image.getpixel((x, y))


def near(found: tuple[int, ...], wanted: tuple[int, ...], tolerance: int = 12) -> bool:
    return all(abs(a - b) <= tolerance for a, b in zip(found, wanted, strict=True))


def png_header_only(width: int, height: int) -> bytes:
    """A PNG that announces its size and holds no pixels."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", b"") + chunk(b"IEND", b"")


# ---------------------------------------------------------------- kinds of images


@pytest.mark.parametrize(
    ("orientation", "size", "red_at", "blue_at"),
    [
        (1, (32, 16), (2, 8), (29, 8)),
        (2, (32, 16), (29, 8), (2, 8)),  # mirrored
        (3, (32, 16), (29, 8), (2, 8)),  # upside down
        (6, (16, 32), (8, 2), (8, 29)),  # turned right: what was left is on top
        (8, (16, 32), (8, 29), (8, 2)),  # turned left
    ],
)
def test_exif_rotation_is_applied(orientation: int, size: tuple[int, int], red_at: tuple[int, int], blue_at: tuple[int, int]) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encoded(two_tone(), "JPEG", quality=95, exif=exif)
    assert decode(data).size == size
    assert near(pixel(data, *red_at), (254, 0, 0))
    assert near(pixel(data, *blue_at), (0, 0, 254))


def test_cmyk_jpeg() -> None:
    cmyk = Image.new("CMYK", (16, 16), (0, 255, 255, 0))  # no cyan, all magenta and yellow: red
    assert near(pixel(encoded(cmyk, "JPEG", quality=95), 8, 8), RED)


@pytest.mark.parametrize("form", ["PNG", "TIFF", "PPM"])
def test_16_bit_grey_is_scaled(form: str) -> None:
    levels = np.array([0, 257, 128 * 257, 65535], dtype=np.uint16).repeat(64).reshape(16, 16)
    data = encoded(Image.fromarray(levels), form)
    assert [pixel(data, 8, y) for y in (1, 5, 9, 13)] == [(0,) * 3, (1,) * 3, (128,) * 3, (255,) * 3]


def test_16_bit_grey_of_the_other_byte_order() -> None:
    big = Image.frombytes("I;16B", (8, 8), np.full((8, 8), 100 * 257, dtype=">u2").tobytes())
    assert pixel(encoded(big, "TIFF"), 4, 4) == (100, 100, 100)


def test_palette() -> None:
    data = encoded(two_tone().quantize(2), "PNG")
    assert Image.open(io.BytesIO(data)).mode == "P"
    assert pixel(data, 2, 8) == RED
    assert pixel(data, 29, 8) == BLUE


def test_transparent_palette_is_laid_over_white() -> None:
    paletted = two_tone().quantize(2)
    blue_index = paletted.getpixel((29, 8))
    data = encoded(paletted, "PNG", transparency=blue_index)
    assert pixel(data, 2, 8) == RED
    assert pixel(data, 29, 8) == WHITE


@pytest.mark.parametrize("form", ["PNG", "WEBP", "TIFF"])
def test_transparency_is_laid_over_white(form: str) -> None:
    layer = Image.new("RGBA", (24, 8), (255, 0, 0, 255))
    layer.paste((255, 0, 0, 0), (8, 0, 16, 8))
    layer.paste((255, 0, 0, 128), (16, 0, 24, 8))
    data = encoded(layer, form, **({"lossless": True} if form == "WEBP" else {}))
    assert pixel(data, 2, 4) == RED
    assert pixel(data, 12, 4) == WHITE
    assert near(pixel(data, 20, 4), (255, 127, 127), 1)


def test_grey_with_transparency_is_laid_over_white() -> None:
    layer = Image.new("LA", (16, 8), (40, 255))
    layer.paste((40, 0), (8, 0, 16, 8))
    data = encoded(layer)
    assert (pixel(data, 2, 4), pixel(data, 12, 4)) == ((40, 40, 40), WHITE)


def test_png_with_one_transparent_colour() -> None:
    data = encoded(two_tone(), "PNG", transparency=BLUE)
    assert (pixel(data, 2, 8), pixel(data, 29, 8)) == (RED, WHITE)


def test_animation_gives_its_first_frame() -> None:
    frames = [Image.new("RGB", (16, 16), colour) for colour in (GREEN, RED, BLUE)]
    for form in ("GIF", "WEBP"):
        data = encoded(frames[0], form, save_all=True, append_images=frames[1:], duration=50)
        assert near(pixel(data, 8, 8), GREEN)


@pytest.mark.parametrize(
    ("form", "options", "tolerance"), [("BMP", {}, 0), ("TIFF", {}, 0), ("PPM", {}, 0), ("WEBP", {"lossless": True}, 0), ("JPEG", {}, 12)]
)
def test_common_formats(form: str, options: dict[str, object], tolerance: int) -> None:
    data = encoded(two_tone(), form, **options)
    assert near(pixel(data, 2, 8), RED, tolerance)
    assert near(pixel(data, 29, 8), BLUE, tolerance)


@pytest.mark.parametrize(("mode", "value", "grey"), [("L", 77, 77), ("1", 1, 255)])
def test_grey_and_black_and_white(mode: str, value: int, grey: int) -> None:
    assert pixel(encoded(Image.new(mode, (8, 8), value)), 4, 4) == (grey,) * 3


def test_panorama_of_20000_pixels() -> None:
    image = decode(encoded(two_tone(20_000, 10), "PNG"))
    assert image.size == (20_000, 10)
    assert image.getpixel((19_999, 5)) == BLUE


# ---------------------------------------------------------------- what cannot be used


def test_truncated_jpeg() -> None:
    data = encoded(Image.effect_noise((64, 64), 50).convert("RGB"), "JPEG")
    with pytest.raises(ValueError, match=r"^truncated$"):
        decode(data[: len(data) // 2])


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "^empty file$"),
        (b"this is no image", "^not an image$"),
        (b"<html><body>404</body></html>", "^not an image$"),
        (encoded(Image.new("RGB", (1, 1))), "^1 x 1 pixels, too small"),
        (encoded(Image.new("RGB", (7, 300))), r"^7 x 300 pixels, too small \(at least 8 x 8\)$"),
        (encoded(Image.new("F", (16, 16), 0.5), "TIFF"), "^floating-point pixels"),
    ],
)
def test_refused_with_a_reason(data: bytes, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        decode(data)


def test_damaged_png_is_one_line() -> None:
    data = bytearray(encoded(Image.effect_noise((64, 64), 50)))
    data[60:120] = bytes(60)
    with pytest.raises(ValueError, match=r"^(damaged|truncated)") as caught:
        decode(bytes(data))
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 100


@pytest.mark.parametrize(("width", "height"), [(20_000, 20_000), (2**31 - 1, 1000)])
def test_far_too_many_pixels_are_refused_before_decoding(width: int, height: int) -> None:
    """There are no pixels in this file: only its header can have been looked at."""
    with pytest.raises(ValueError, match=r"^more than 80,000,000 pixels$"):
        decode(png_header_only(width, height))


def test_too_many_pixels_are_refused_before_decoding(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decode, "__defaults__", (None, 1000))
    with pytest.raises(ValueError, match=r"^50 x 21 pixels, more than 1,000$"):
        decode(png_header_only(50, 21))
    assert decode(encoded(Image.new("RGB", (50, 20)))).size == (50, 20)


def test_read_image_names_the_file(tmp_path: Path) -> None:
    (tmp_path / "text.jpg").write_text("hello")
    with pytest.raises(ImageError, match=r"text\.jpg: not an image; replace or remove it$") as caught:
        read_image(tmp_path / "text.jpg")
    assert caught.value.bad == ((str(tmp_path / "text.jpg"), "not an image"),)
    with pytest.raises(ImageError, match=r"absent\.jpg: no such file$"):
        read_image(tmp_path / "absent.jpg")
    with pytest.raises(ImageError, match="Is a directory"):
        read_image(tmp_path)


def test_check_file_gives_hash_size_and_problem(tmp_path: Path) -> None:
    data = encoded(two_tone())
    (tmp_path / "a.png").write_bytes(data)
    (tmp_path / "b.png").write_bytes(b"no")
    checked = check_file(tmp_path / "a.png")
    assert checked == ImageCheck(hashlib.sha256(data).hexdigest(), 32, 16, "", checked.phash, False)
    assert int(checked.phash, 16) < 2**64
    assert len(checked.phash) == 16
    assert check_file(tmp_path / "b.png") == ImageCheck(hashlib.sha256(b"no").hexdigest(), 0, 0, "not an image")
    assert check_file(tmp_path / "c.png") == ImageCheck("", 0, 0, "no such file or directory")


def test_perceptual_hash_sees_through_size_and_compression(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    smooth = Image.fromarray(rng.integers(0, 256, (6, 8, 3), dtype=np.uint8)).resize((320, 240), Image.Resampling.BICUBIC)
    smooth.save(tmp_path / "a.png")
    smooth.resize((200, 150)).save(tmp_path / "b.jpg", quality=60)
    Image.fromarray(rng.integers(0, 256, (6, 8, 3), dtype=np.uint8)).resize((320, 240), Image.Resampling.BICUBIC).save(tmp_path / "c.png")
    a, b, c = (int(check_file(tmp_path / name).phash, 16) for name in ("a.png", "b.jpg", "c.png"))
    assert (a ^ b).bit_count() <= 4
    assert (a ^ c).bit_count() >= 16  # 32 on average


def test_grey_images_are_known_through_jpeg(tmp_path: Path) -> None:
    colours = np.random.default_rng(0).integers(0, 256, (40, 40, 3), dtype=np.uint8)
    Image.fromarray(colours).convert("L").convert("RGB").save(tmp_path / "grey.jpg")
    Image.fromarray(colours).resize((80, 80)).save(tmp_path / "colour.jpg")
    assert check_file(tmp_path / "grey.jpg").grey
    assert not check_file(tmp_path / "colour.jpg").grey


# ---------------------------------------------------------------- checked once


def test_unchanged_files_are_not_read_again(cache: Path, make_folder: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    paths = sorted(make_folder({"a": 3, "b": 2}).rglob("*.png"))
    (paths[0].parent / "bad.png").write_bytes(b"no")
    paths.append(paths[0].parent / "bad.png")
    first = check_files(paths)
    assert [checked.problem for checked in first] == ["", "", "", "", "", "not an image"]

    def fail(path: Path) -> ImageCheck:
        raise AssertionError(f"{path} read again")

    monkeypatch.setattr(verify, "check_file", fail)
    assert check_files(paths) == first
    assert check_files(paths[::-1]) == first[::-1]


def test_changed_files_are_read_again(cache: Path, make_folder: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    paths = sorted(make_folder({"a": 3}).rglob("*.png"))
    first = check_files(paths)
    paths[1].write_bytes(encoded(two_tone()))
    stat = paths[2].stat()
    os.utime(paths[2], ns=(stat.st_atime_ns, stat.st_mtime_ns + 10**9))
    seen = []
    monkeypatch.setattr(verify, "check_file", lambda path: seen.append(path) or check_file(path))
    second = check_files(paths, workers=1)
    assert seen == [paths[1], paths[2]]
    assert (second[0], second[2]) == (first[0], first[2])
    assert second[1].sha256 == hashlib.sha256(encoded(two_tone())).hexdigest()


def test_a_missing_file_is_looked_for_again(cache: Path, tmp_path: Path) -> None:
    path = tmp_path / "late.png"
    assert check_files([path])[0].problem == "no such file or directory"
    path.write_bytes(encoded(two_tone()))
    assert check_files([path])[0].problem == ""


def test_an_unreadable_file_is_looked_at_again(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its permissions may change without its size and time."""
    path = tmp_path / "locked.png"
    path.write_bytes(encoded(two_tone()))
    with monkeypatch.context() as locked:
        locked.setattr(verify, "check_file", lambda path: ImageCheck("", 0, 0, "permission denied"))
        assert check_files([path])[0].problem == "permission denied"
    assert check_files([path])[0].problem == ""


def test_more_files_than_one_query_holds(cache: Path, tmp_path: Path) -> None:
    (tmp_path / "one.png").write_bytes(encoded(two_tone()))
    paths = [tmp_path / f"{n}.png" for n in range(1100)]
    for path in paths:
        os.link(tmp_path / "one.png", path)
    assert len(set(check_files(paths))) == 1
    assert len(check_files(paths)) == 1100


def test_a_damaged_record_is_made_anew(cache: Path, tmp_path: Path) -> None:
    Image.new("RGB", (20, 20)).save(tmp_path / "a.png")
    first = check_files([tmp_path / "a.png"])
    (cache / "checked-4.sqlite").write_bytes(b"this is no database, and long enough to be looked at " * 100)
    assert check_files([tmp_path / "a.png"]) == first
    assert (cache / "checked-4.sqlite").read_bytes().startswith(b"SQLite format 3")


def test_a_record_that_cannot_be_kept_is_one_line(cache: Path, tmp_path: Path) -> None:
    (cache / "checked-4.sqlite").mkdir(parents=True)
    with pytest.raises(OutputError, match=r"checked-4\.sqlite: unable to open database file; free some space, or set SEEWHY_CACHE"):
        check_files([tmp_path / "a.png"])


# ---------------------------------------------------------------- folders


def test_folder_of_class_folders(make_folder: Callable[..., Path]) -> None:
    root = make_folder({"dog": 2, "cat": 3})
    images = open_images(str(root))
    assert images.name == "images"
    assert images.classes == ("cat", "dog")
    assert [path.relative_to(root).as_posix() for path in images.paths] == ["cat/0.png", "cat/1.png", "cat/2.png", "dog/0.png", "dog/1.png"]
    assert images.labels.tolist() == [0, 0, 0, 1, 1]
    assert images.labels.dtype == np.int64
    assert images.hashes[3] == hashlib.sha256((root / "dog/0.png").read_bytes()).hexdigest()
    assert images.parts == ("",) * 5
    assert images.masks == (None,) * 5
    assert images.bad == ()


@pytest.mark.parametrize(("folder", "part"), [("val", "val"), ("valid", "val"), ("validation", "val"), ("test", "test")])
def test_divided_folder(make_folder: Callable[..., Path], folder: str, part: str) -> None:
    make_folder({"cat": 2, "dog": 2}, name="set/train")
    images = open_images(str(make_folder({"cat": 1, "dog": 1}, name=f"set/{folder}").parent))
    assert images.classes == ("cat", "dog")
    found = sorted(zip(images.parts, images.labels.tolist(), strict=True))
    assert found == sorted([("train", 0), ("train", 0), ("train", 1), ("train", 1), (part, 0), (part, 1)])


def test_part_names_beside_other_classes_are_classes(make_folder: Callable[..., Path]) -> None:
    images = open_images(str(make_folder({"train": 2, "bus": 2, "test": 2})))
    assert images.classes == ("bus", "test", "train")
    assert set(images.parts) == {""}


def test_images_in_deeper_folders_belong_to_the_class(make_folder: Callable[..., Path]) -> None:
    root = make_folder({"cat": 1, "dog/young": 2, "dog/old": 1})
    images = open_images(str(root))
    assert images.classes == ("cat", "dog")
    assert images.labels.tolist() == [0, 1, 1, 1]


def test_hidden_and_other_files_are_passed_over(make_folder: Callable[..., Path]) -> None:
    root = make_folder({"cat": 1, "dog": 1, ".thumbnails": 2, "dog/.hidden": 2})
    for name in ("cat/.0.png", "cat/notes.txt", "cat/Thumbs.db", "cat/0.png.bak", "readme.md", "stray.png"):
        (root / name).write_bytes(b"nothing")
    (root / "dog" / "UPPER.PNG").write_bytes(encoded(two_tone()))
    images = open_images(str(root))
    assert [path.relative_to(root).as_posix() for path in images.paths] == ["cat/0.png", "dog/0.png", "dog/UPPER.PNG"]


def test_unknown_dataset_is_named_with_a_suggestion() -> None:
    with pytest.raises(
        DataError, match=r"^caltech10: no such folder or dataset \(did you mean caltech101\?\); known datasets: caltech101, scenes$"
    ):
        open_images("caltech10")
    with pytest.raises(DataError, match=r"^zzz: no such folder or dataset; known"):
        open_images("zzz")


def test_file_instead_of_a_folder(tmp_path: Path) -> None:
    (tmp_path / "a.zip").write_bytes(b"PK")
    with pytest.raises(
        DataError, match=r"a\.zip: a file, not a folder; pass a folder with one folder of images for each class, a \.tar or a \.parquet$"
    ):
        open_images(str(tmp_path / "a.zip"))


def test_empty_folder_and_folder_without_class_folders(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no class folders with images; expected .*/CLASS/image\.jpg$"):
        open_images(str(tmp_path))
    (tmp_path / "a.png").write_bytes(encoded(two_tone()))
    with pytest.raises(DataError, match="no class folders with images"):
        open_images(str(tmp_path))


def test_one_class(make_folder: Callable[..., Path]) -> None:
    with pytest.raises(DataError, match=r"only one class \('cat'\); a classifier needs at least two class folders$"):
        open_images(str(make_folder({"cat": 3})))


def test_class_folder_without_images(make_folder: Callable[..., Path]) -> None:
    root = make_folder({"cat": 1, "dog": 1, "eel": 0})
    (root / "eel" / "notes.txt").write_text("none yet")
    with pytest.raises(DataError, match=r"images/eel: no images in this class folder; add some or remove it$"):
        open_images(str(root))


def test_classes_that_differ_in_case_only(make_folder: Callable[..., Path]) -> None:
    root = make_folder({"Cat": 1, "dog": 1})
    if (root / "cat").exists():
        pytest.skip("this file system does not tell upper case from lower")
    (root / "cat").mkdir()
    (root / "cat" / "0.png").write_bytes(encoded(two_tone()))
    with pytest.raises(DataError, match=r"classes 'Cat' and 'cat' differ in case only; rename or merge them$"):
        open_images(str(root))


def spoil(root: Path, count: int) -> list[Path]:
    paths = [root / "cat" / f"bad{n}.jpg" for n in range(count)]
    for path in paths:
        path.write_bytes(b"no")
    return paths


def test_bad_images_stop_with_count_and_list(make_folder: Callable[..., Path]) -> None:
    root = make_folder({"cat": 2, "dog": 2})
    paths = spoil(root, 2)
    (root / "dog" / "empty.png").write_bytes(b"")
    with pytest.raises(ImageError) as caught:
        open_images(str(root))
    assert str(caught.value) == (
        f"3 of 7 images cannot be used: {paths[0]} (not an image), {paths[1]} (not an image), {root}/dog/empty.png (empty file); "
        "replace or remove them, or pass --skip-bad"
    )
    assert caught.value.bad[2] == (f"{root}/dog/empty.png", "empty file")


def test_of_many_bad_images_five_are_shown_and_all_recorded(make_folder: Callable[..., Path]) -> None:
    root = make_folder({"cat": 2, "dog": 2})
    spoil(root, 8)
    with pytest.raises(ImageError, match=r"^8 of 12 images .*bad4\.jpg \(not an image\), and 3 more; replace") as caught:
        open_images(str(root))
    assert len(caught.value.bad) == 8


def test_skip_bad_leaves_them_out_and_records_them(make_folder: Callable[..., Path]) -> None:
    root = make_folder({"cat": 2, "dog": 2})
    paths = spoil(root, 2)
    images = open_images(str(root), skip_bad=True)
    assert [path.name for path in images.paths] == ["0.png", "1.png", "0.png", "1.png"]
    assert len(images) == len(images.hashes) == len(images.labels) == len(images.parts) == 4
    assert images.bad == tuple((str(path), "not an image") for path in paths)


def test_class_with_bad_images_only(make_folder: Callable[..., Path]) -> None:
    root = make_folder({"cat": 2, "dog": 2, "eel": 0})
    (root / "eel" / "0.jpg").write_bytes(b"no")
    with pytest.raises(DataError, match=r"images: class 'eel' has no usable image; add some or remove its folder$"):
        open_images(str(root), skip_bad=True)


# ---------------------------------------------------------------- content


def test_content_hash_goes_by_content_and_not_by_place(make_folder: Callable[..., Path]) -> None:
    one, two = make_folder({"cat": 2, "dog": 2}, name="one"), make_folder({"cat": 2, "dog": 2}, name="two")
    wanted = open_images(str(one)).content_hash
    (two / "cat" / "0.png").rename(two / "cat" / "renamed.png")
    assert open_images(str(two)).content_hash == wanted
    (two / "cat" / "1.png").rename(two / "dog" / "from-cat.png")
    assert open_images(str(two)).content_hash != wanted
    (two / "dog" / "from-cat.png").rename(two / "cat" / "1.png")
    assert open_images(str(two)).content_hash == wanted
    (two / "cat" / "1.png").write_bytes(encoded(two_tone()))
    assert open_images(str(two)).content_hash != wanted


def test_conflicting_duplicates_are_those_under_two_classes(make_folder: Callable[..., Path]) -> None:
    root = make_folder({"cat": 2, "dog": 2, "eel": 2})
    assert conflicting_duplicates(open_images(str(root))) == []
    data = (root / "cat" / "0.png").read_bytes()
    (root / "cat" / "same.png").write_bytes(data)
    assert conflicting_duplicates(open_images(str(root))) == []
    (root / "eel" / "other.png").write_bytes(data)
    names = tuple(str(root / name) for name in ("cat/0.png", "cat/same.png", "eel/other.png"))
    assert conflicting_duplicates(open_images(str(root))) == [(hashlib.sha256(data).hexdigest(), names)]


# ---------------------------------------------------------------- Caltech-101


def small_caltech(root: Path) -> Path:
    """torchvision's layout with two classes and the background folder."""
    for c, (name, count) in enumerate({"BACKGROUND_Google": 2, "ant": 2, "yin_yang": 3}.items()):
        folder = root / "caltech101" / "101_ObjectCategories" / name
        folder.mkdir(parents=True)
        for n in range(count):
            Image.new("RGB", (20, 10), (c * 50, n * 50, 0)).save(folder / f"image_{n + 1:04d}.jpg")
    return root


@pytest.mark.parametrize("given", ["option", "environment"])
def test_caltech101_in_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, given: str) -> None:
    root = small_caltech(tmp_path)
    monkeypatch.delenv("SEEWHY_DATA", raising=False)
    if given == "environment":
        monkeypatch.setenv("SEEWHY_DATA", str(root))
    images = open_images("caltech101", data_root=str(root) if given == "option" else None)
    assert images.name == "caltech101"
    assert images.classes == ("ant", "yin_yang")
    assert images.labels.tolist() == [0, 0, 1, 1, 1]
    assert images.paths[4] == root / "caltech101" / "101_ObjectCategories" / "yin_yang" / "image_0003.jpg"


def test_caltech101_without_its_background_folder_is_one_line(tmp_path: Path) -> None:
    """torchvision itself insists on the folder that is no class."""
    root = small_caltech(tmp_path)
    for file in (root / "caltech101/101_ObjectCategories/BACKGROUND_Google").iterdir():
        file.unlink()
    (root / "caltech101/101_ObjectCategories/BACKGROUND_Google").rmdir()
    with pytest.raises(DataError, match=r"^.*caltech101.*BACKGROUND_Google"):
        list_caltech101(str(root))


def test_the_real_caltech101(caltech_root: Path) -> None:
    listing = list_caltech101(str(caltech_root))
    assert len(listing.paths) == 8677
    assert len(set(listing.paths)) == 8677
    counts = {name: listing.class_names.count(name) for name in set(listing.class_names)}
    assert len(counts) == 101
    assert (min(counts.values()), max(counts.values())) == (31, 800)
    assert (counts["airplanes"], counts["dalmatian"], counts["inline_skate"]) == (800, 67, 31)
    assert "BACKGROUND_Google" not in counts
    assert all(path.is_file() for path in listing.paths[::500])


class _Files(BaseHTTPRequestHandler):
    """Serves what is in `files`, 404 for the rest."""

    files: dict[str, bytes]

    def do_GET(self) -> None:
        content = self.files.get(self.path)
        self.send_response(200 if content is not None else 404)
        self.send_header("Content-Length", str(len(content or b"")))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(content or b"")

    do_HEAD = do_GET

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[str, dict[str, bytes]]]:
    """A server on this machine: its address and the files it serves."""
    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.setenv(name, "127.0.0.1")
    files: dict[str, bytes] = {}
    httpd = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Files,), {"files": files}))
    threading.Thread(target=httpd.serve_forever, args=(0.01,), daemon=True).start()
    yield f"http://127.0.0.1:{httpd.server_port}", files
    httpd.shutdown()
    httpd.server_close()
    with warnings.catch_warnings():  # urllib leaves the socket of a 404 to the garbage collector
        warnings.simplefilter("ignore", ResourceWarning)
        gc.collect()


def caltech_archive(tmp_path: Path) -> bytes:
    """caltech-101.zip as published: two tars inside."""
    source = small_caltech(tmp_path / "source") / "caltech101" / "101_ObjectCategories"
    images, annotations, archive = io.BytesIO(), io.BytesIO(), io.BytesIO()
    with tarfile.open(fileobj=images, mode="w:gz") as tar:
        tar.add(source, "101_ObjectCategories")
    with tarfile.open(fileobj=annotations, mode="w") as tar:
        tar.addfile(tarfile.TarInfo("Annotations/ant/annotation_0001.mat"))
    with zipfile.ZipFile(archive, "w") as content:
        content.writestr("caltech-101/101_ObjectCategories.tar.gz", images.getvalue())
        content.writestr("caltech-101/Annotations.tar", annotations.getvalue())
        content.writestr("__MACOSX/caltech-101/._Annotations.tar", b"")
    return archive.getvalue()


def point_torchvision_at(monkeypatch: pytest.MonkeyPatch, url: str, md5: str) -> list[str]:
    """torchvision's own download, from another address and for another checksum; the addresses it asked for."""
    asked = []
    real = torchvision.datasets.utils.download_and_extract_archive

    @functools.wraps(real)
    def elsewhere(given_url: str, *args: object, **kwargs: object) -> None:
        asked.append(given_url)
        real(url, *args, **{**kwargs, "md5": md5})

    monkeypatch.setattr(caltech, "download_and_extract_archive", elsewhere)
    return asked


def test_caltech101_is_downloaded_and_unpacked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, server: tuple[str, dict[str, bytes]]
) -> None:
    url, files = server
    files["/caltech-101.zip"] = archive = caltech_archive(tmp_path)
    asked = point_torchvision_at(monkeypatch, f"{url}/caltech-101.zip", hashlib.md5(archive).hexdigest())
    root = tmp_path / "new" / "data"
    images = open_images("caltech101", data_root=str(root))
    assert len(asked) == 1
    assert asked[0].startswith("https://data.caltech.edu/")
    assert images.classes == ("ant", "yin_yang")
    assert len(images) == 5
    assert (root / "caltech101/101_ObjectCategories/ant/image_0001.jpg").is_file()
    assert sorted(path.name for path in (root / "caltech101").iterdir() if path.name[0] != "_") == ["101_ObjectCategories"]
    assert len(open_images("caltech101", data_root=str(root))) == 5
    assert len(asked) == 1  # the second time it is there


def one_line(error: pytest.ExceptionInfo[DataError], root: Path) -> str:
    message = str(error.value)
    assert message.startswith(f"caltech101 is not in {root} and cannot be downloaded (")
    assert message.endswith("; pass --data-root or set SEEWHY_DATA to the folder of caltech101/101_ObjectCategories")
    assert "\n" not in message
    return message


def test_download_of_something_else_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, server: tuple[str, dict[str, bytes]]
) -> None:
    url, files = server
    files["/caltech-101.zip"] = caltech_archive(tmp_path)
    point_torchvision_at(monkeypatch, f"{url}/caltech-101.zip", "0" * 32)
    root = tmp_path / "data"
    with pytest.raises(DataError) as caught:
        list_caltech101(str(root))
    assert "corrupted" in one_line(caught, root)
    assert not (root / "caltech101" / "101_ObjectCategories").exists()


def test_failed_download_leaves_no_empty_folders(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, server: tuple[str, dict[str, bytes]]
) -> None:
    point_torchvision_at(monkeypatch, f"{server[0]}/absent.zip", "0" * 32)
    root = tmp_path / "data"
    with pytest.raises(DataError) as caught:
        list_caltech101(str(root))
    assert "404" in one_line(caught, root)
    assert list(tmp_path.iterdir()) == []


def test_failed_download_keeps_what_else_lies_in_the_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    point_torchvision_at(monkeypatch, "http://127.0.0.1:9/caltech-101.zip", "0" * 32)  # nobody listens there
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(DataError) as caught:
        list_caltech101(str(tmp_path))
    one_line(caught, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


@pytest.mark.parametrize(
    ("failure", "raised"), [(OSError(28, "No space left on device"), DataError), (KeyboardInterrupt(), KeyboardInterrupt)]
)
def test_interrupted_unpacking_does_not_pass_for_the_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failure: BaseException, raised: type[BaseException]
) -> None:
    root = tmp_path / "data"

    def half(*_: object, **__: object) -> None:
        (root / "caltech101" / "101_ObjectCategories" / "ant").mkdir(parents=True)
        raise failure

    monkeypatch.setattr(caltech, "download_and_extract_archive", half)
    with pytest.raises(raised):
        list_caltech101(str(root))
    assert not (root / "caltech101" / "101_ObjectCategories").exists()


def test_data_root_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(DataError) as caught:
        list_caltech101(str(tmp_path / "file" / "data"))
    one_line(caught, tmp_path / "file" / "data")


# ---------------------------------------------------------------- scaled decoding


def photo(path: Path, size: tuple[int, int], **options: object) -> Path:
    """A smooth image with a few edges, as cameras give."""
    x, y = np.meshgrid(np.linspace(0, 6, size[0]), np.linspace(0, 4, size[1]))
    waves = np.stack([np.sin(x) + np.cos(y), np.sin(x * y / 3), np.cos(x - y)], axis=-1)
    pixels = (110 + 45 * waves).clip(0, 255).astype(np.uint8)
    pixels[size[1] // 3 : size[1] // 2, size[0] // 4 : size[0] // 2] = (250, 40, 10)
    Image.fromarray(pixels).save(path, quality=95, **options)
    return path


@pytest.mark.parametrize(("size", "expected"), [((1800, 900), (900, 450)), ((1600, 1201), (800, 601)), ((899, 600), (899, 600))])
def test_large_jpeg_is_decoded_to_no_less_than_enough(tmp_path: Path, size: tuple[int, int], expected: tuple[int, int]) -> None:
    file = photo(tmp_path / "photo.jpg", size)
    assert read_image(file, 448).size == expected
    assert read_image(file).size == size


def test_scaled_decoding_shows_the_same_image(tmp_path: Path) -> None:
    file = photo(tmp_path / "photo.jpg", (2000, 1500))
    whole, scaled = (np.asarray(read_image(file, enough).resize((224, 224), Image.Resampling.BICUBIC), float) for enough in (None, 448))
    assert np.abs(whole - scaled).mean() < 0.5  # of 255
    assert np.abs(whole - scaled).max() < 40  # at the edges of the block


def test_scaled_decoding_turns_upright_too_and_leaves_other_formats_alone(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees
    assert read_image(photo(tmp_path / "turned.jpg", (1800, 900), exif=exif), 448).size == (450, 900)
    Image.open(photo(tmp_path / "photo.jpg", (1800, 900))).save(tmp_path / "photo.png")
    assert read_image(tmp_path / "photo.png", 448).size == (1800, 900)
