"""Views by hand: boxes, mirror images, colours, and pixels that agree with Pillow, torchvision and float64."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torchvision.transforms import v2

from seewhy.models.transforms import Preprocessing, View, eval_view, random_view, render, view_of

SQUASH = Preprocessing(224, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225), "bicubic", 0.875)
CROP = Preprocessing(224, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5), "bilinear", 0.875, "crop")
HASH = "0123456789abcdef" * 4
OTHER_HASH = "fedcba9876543210" * 4
SIDES = st.integers(8, 20_000)


def noise(width: int, height: int, seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def smooth(width: int, height: int) -> Image.Image:
    y, x = np.mgrid[0:height, 0:width]
    channels = (x / width, y / height, 0.5 + 0.5 * np.sin(2 * np.pi * (x / width + y / height)))
    return Image.fromarray((255 * np.stack(channels, axis=-1)).round().astype(np.uint8))


# ---------------------------------------------------------------- boxes


def test_squash_takes_the_whole_image() -> None:
    assert eval_view(640, 480, SQUASH) == View((0, 0, 640, 480))
    assert eval_view(7, 20_000, SQUASH, flip=True) == View((0, 0, 7, 20_000), flip=True)


@pytest.mark.parametrize(
    ("width", "height", "box"),
    [
        (640, 480, (110, 30, 530, 450)),  # 0.875 * 480 = 420; (640 - 420) / 2 = 110; (480 - 420) / 2 = 30
        (480, 640, (30, 110, 450, 530)),
        (256, 256, (16, 16, 240, 240)),
        (20_000, 100, (9956.25, 6.25, 10043.75, 93.75)),
        (9, 9, (0.5625, 0.5625, 8.4375, 8.4375)),
    ],
)
def test_crop_takes_the_centred_square(width: int, height: int, box: tuple[float, float, float, float]) -> None:
    assert eval_view(width, height, CROP).box == pytest.approx(box, abs=1e-9)


def test_view_0_is_plain_view_1_mirrored_and_others_are_random() -> None:
    assert view_of(0, HASH, 640, 480, SQUASH) == View((0, 0, 640, 480))
    assert view_of(1, HASH, 640, 480, SQUASH) == View((0, 0, 640, 480), flip=True)
    assert view_of(0, HASH, 640, 480, CROP) == eval_view(640, 480, CROP)
    assert view_of(2, HASH, 640, 480, SQUASH).box != (0, 0, 640, 480)


def test_random_views_depend_on_content_and_number_alone() -> None:
    first = view_of(2, HASH, 640, 480, SQUASH)
    np.random.seed(5)  # noqa: NPY002  # the global generator must not matter
    torch.manual_seed(5)
    assert view_of(2, HASH, 640, 480, SQUASH) == first
    assert view_of(2, HASH, 640, 480, CROP) == first
    assert view_of(3, HASH, 640, 480, SQUASH) != first
    assert view_of(2, OTHER_HASH, 640, 480, SQUASH) != first


def test_random_views_differ_from_number_to_number() -> None:
    views = [view_of(n, HASH, 300, 200, SQUASH) for n in range(2, 42)]
    assert len(set(views)) == 40
    assert 8 <= sum(view.flip for view in views) <= 32
    assert all(0.7 <= f <= 1.3 for v in views for f in (v.brightness, v.contrast, v.saturation))


@settings(max_examples=300, deadline=None)
@given(width=SIDES, height=SIDES, seed=st.integers(0, 2**32 - 1))
def test_random_boxes_lie_inside_and_keep_their_bounds(width: int, height: int, seed: int) -> None:
    left, top, right, bottom = random_view(width, height, np.random.default_rng(seed)).box
    assert 0 <= left < right <= width
    assert 0 <= top < bottom <= height
    if (left, top, right, bottom) != (0, 0, width, height):
        assert 0.35 - 1e-9 <= (right - left) * (bottom - top) / (width * height) <= 1 + 1e-9
        assert 3 / 4 - 1e-9 <= (right - left) / (bottom - top) <= 4 / 3 + 1e-9


@settings(max_examples=60, deadline=None)
@given(width=st.integers(8, 400), height=st.integers(8, 400), seed=st.integers(0, 2**32 - 1), resize=st.sampled_from(["squash", "crop"]))
def test_every_box_can_be_rendered(width: int, height: int, seed: int, resize: str) -> None:
    image = Image.new("RGB", (width, height), (10, 20, 30))
    preprocessing = Preprocessing(8, (0, 0, 0), (1, 1, 1), "bilinear", 0.95, resize)
    for view in (random_view(width, height, np.random.default_rng(seed)), eval_view(width, height, preprocessing)):
        plain = View(view.box)
        assert np.all(render(image, plain, (8, 8), "bilinear") == [10, 20, 30])


def test_a_panorama_is_seen_whole_where_no_box_fits() -> None:
    assert random_view(20_000, 8, np.random.default_rng(0)).box == (0, 0, 20_000, 8)


# ---------------------------------------------------------------- pixels


def test_render_gives_height_by_width() -> None:
    square = render(noise(50, 40), View((0, 0, 50, 40)), (30, 20), "bicubic")
    assert square.shape == (20, 30, 3)
    assert square.dtype == np.uint8


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic", "lanczos", "nearest"])
def test_render_of_the_same_size_changes_no_pixel(interpolation: str) -> None:
    image = noise(32, 24)
    assert np.array_equal(render(image, View((0, 0, 32, 24)), (32, 24), interpolation), np.asarray(image))


def test_flip_is_the_exact_mirror_image() -> None:
    image = noise(91, 57)
    box = (3.5, 2.25, 80.0, 50.75)
    plain, mirrored = (render(image, View(box, flip), (33, 32), "bicubic") for flip in (False, True))
    assert np.array_equal(mirrored, plain[:, ::-1])
    assert not np.array_equal(mirrored, plain)


def test_whole_pixel_box_of_the_same_size_is_a_cut() -> None:
    image = noise(40, 30)
    assert np.array_equal(render(image, View((5, 7, 25, 27)), (20, 20), "bilinear"), np.asarray(image)[7:27, 5:25])


def test_shrinking_is_antialiased() -> None:
    board = (255 * (np.indices((64, 64)).sum(axis=0) % 2)).astype(np.uint8)
    image = Image.fromarray(np.stack([board] * 3, axis=-1))
    square = render(image, View((0, 0, 64, 64)), (8, 8), "bilinear")
    assert np.abs(square.astype(int) - 127).max() <= 5


def test_colour_factors_by_hand() -> None:
    image = Image.new("RGB", (8, 8), (100, 50, 200))
    whole = (0.0, 0.0, 8.0, 8.0)

    def pixel(view: View) -> list[int]:
        return [int(v) for v in render(image, view, (8, 8), "bilinear")[4, 4]]

    assert pixel(View(whole, brightness=1.2)) == [120, 60, 240]
    # The grey of this colour is (299 * 100 + 587 * 50 + 114 * 200) / 1000 = 82.05; contrast and saturation pull there.
    assert pixel(View(whole, contrast=0.5)) == pytest.approx([91, 66, 141], abs=1)
    assert pixel(View(whole, saturation=0.5)) == pytest.approx([91, 66, 141], abs=1)
    assert pixel(View(whole, brightness=1.3)) == [130, 65, 255]


@pytest.mark.parametrize(("width", "height"), [(300, 200), (200, 300), (256, 256), (640, 512)])
def test_crop_agrees_with_torchvision(width: int, height: int) -> None:
    """Resize(256) + CenterCrop(224) of torchvision, within 4 grey levels at most and one on average.

    They are not the same to the bit: both round their cuts to whole pixels, one before and one after the resize.
    """
    image = smooth(width, height)
    theirs = v2.Compose([v2.Resize(256, v2.InterpolationMode.BILINEAR, antialias=True), v2.CenterCrop(224)])(image)
    ours = render(image, eval_view(width, height, CROP), (224, 224), "bilinear")
    difference = np.abs(ours.astype(int) - np.asarray(theirs).astype(int))
    assert difference.max() <= 4
    assert difference.mean() <= 1


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
def test_squash_is_the_resize_of_torchvision_and_pillow(interpolation: str) -> None:
    """To the bit as torchvision resizes a tensor; to a grey level here and there as it resizes a Pillow image."""
    image, smoothed = noise(301, 199), smooth(301, 199)
    resize = v2.Resize((224, 224), v2.InterpolationMode(interpolation), antialias=True)
    theirs = resize(torch.from_numpy(np.array(image)).permute(2, 0, 1)).permute(1, 2, 0).numpy()
    assert np.array_equal(render(image, eval_view(301, 199, SQUASH), (224, 224), interpolation), theirs)
    difference = np.abs(render(smoothed, eval_view(301, 199, SQUASH), (224, 224), interpolation).astype(int) - np.asarray(resize(smoothed)))
    assert difference.max() <= 2
    assert difference.mean() < 0.05


def test_a_box_is_cut_at_whole_pixels_and_holds_at_least_one() -> None:
    image = noise(40, 30)
    pixels = np.asarray(image)
    assert np.array_equal(render(image, View((4.6, 7.4, 25.4, 26.6)), (20, 20), "bicubic"), pixels[7:27, 5:25])
    assert np.array_equal(render(image, View((39.6, 29.7, 40.0, 30.0)), (1, 1), "bicubic"), pixels[29:, 39:])


# ---------------------------------------------------------------- record


def test_preprocessing_round_trip_through_json() -> None:
    assert Preprocessing.from_dict(json.loads(json.dumps(SQUASH.as_dict()))) == SQUASH
    assert Preprocessing.from_dict(json.loads(json.dumps(CROP.as_dict()))) == CROP
