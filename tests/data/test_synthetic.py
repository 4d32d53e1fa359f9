"""The demo set: drawn from seeds alone, each object inside its image and under its mask, written once."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from seewhy.data import synthetic
from seewhy.data.decode import read_image
from seewhy.data.image_set import open_images
from seewhy.data.synthetic import OBJECTS, draw_scene, draw_scenes
from seewhy.errors import OutputError


def test_eight_classes() -> None:
    assert list(OBJECTS) == ["boat", "car", "fish", "house", "mug", "mushroom", "tree", "umbrella"]


def test_same_seed_same_pixels() -> None:
    one, two = draw_scene("mug", 7), draw_scene("mug", 7)
    assert one[0].tobytes() == two[0].tobytes()
    assert one[1].tobytes() == two[1].tobytes()


@pytest.mark.parametrize("other", [("mug", 8, 101), ("fish", 7, 101), ("mug", 7, 102)])
def test_class_number_and_seed_each_change_the_image(other: tuple[str, int, int]) -> None:
    image, _ = draw_scene("mug", 7)
    name, number, seed = other
    assert draw_scene(name, number, seed)[0].tobytes() != image.tobytes()


@pytest.mark.parametrize("name", OBJECTS)
def test_mask_is_of_the_same_size_and_the_object_inside(name: str) -> None:
    for number in range(6):
        image, mask = draw_scene(name, number)
        assert (image.mode, mask.mode) == ("RGB", "L")
        assert image.size == mask.size
        assert all(240 <= side < 300 for side in image.size)
        on = np.asarray(mask)
        assert set(np.unique(on)) == {0, 255}
        share = (on == 255).mean()
        assert 0.01 < share < 0.3
        box = mask.getbbox()
        assert box is not None
        left, top, right, bottom = box
        # The object lies in the centred square of 7/8 of the short side, which is what evaluation in `crop` mode sees.
        side = min(image.size) * 7 / 8
        assert (image.width - side) / 2 - 1 <= left
        assert right <= (image.width + side) / 2 + 1
        assert (image.height - side) / 2 - 1 <= top
        assert bottom <= (image.height + side) / 2 + 1


def test_mask_marks_the_object_and_not_the_background(monkeypatch: pytest.MonkeyPatch) -> None:
    """Drawn again with nothing to draw, the background is the same: the image differs where the mask is on."""
    image, mask = draw_scene("house", 3)
    monkeypatch.setitem(OBJECTS, "house", [])
    empty, no_mask = draw_scene("house", 3)
    assert no_mask.getbbox() is None
    changed = np.any(np.asarray(image) != np.asarray(empty), axis=-1)
    on = np.asarray(mask) == 255
    assert changed[on].mean() > 0.99
    # Objects are painted in four flat colours, which the grainy rest of the image has nowhere.
    colours, counts = np.unique(np.asarray(image)[on], axis=0, return_counts=True)
    flat = np.any(np.all(np.asarray(image)[:, :, None] == colours[np.argsort(counts)[-4:]], axis=-1), axis=-1)
    assert flat[on].mean() > 0.5
    assert flat[~on].sum() < 0.001 * flat.sum()
    rows, columns = np.nonzero(on)
    far = np.ones_like(on)
    far[max(0, rows.min() - 25) : rows.max() + 25, max(0, columns.min() - 25) : columns.max() + 25] = False
    assert far.mean() > 0.2
    assert not changed[far].any()


def test_set_on_disk(tmp_path: Path) -> None:
    root = draw_scenes(tmp_path / "scenes", per_class=1)
    assert root == tmp_path / "scenes"
    images = sorted(path.relative_to(root).as_posix() for path in root.rglob("*.*") if path.is_file())
    expected = [*(f"masks/{n}/000.png" for n in OBJECTS), *(f"images/{n}/000.jpg" for n in OBJECTS)]
    assert images == sorted([*expected, "complete.txt"])
    drawn, mask = draw_scene("car", 0)
    assert np.array_equal(np.asarray(Image.open(root / "masks/car/000.png")), np.asarray(mask))
    saved = np.asarray(Image.open(root / "images/car/000.jpg")).astype(int)
    assert np.abs(saved - np.asarray(drawn)).mean() < 6
    assert [path.name for path in tmp_path.iterdir()] == ["scenes"]


def test_drawn_once_and_again_after_the_marker_is_missing_or_of_another_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(synthetic, "OBJECTS", {"boat": OBJECTS["boat"]})
    root = draw_scenes(tmp_path / "scenes", per_class=2)
    (root / "images/boat/000.jpg").write_bytes(b"touched")
    draw_scenes(root, per_class=2)
    assert (root / "images/boat/000.jpg").read_bytes() == b"touched"
    (root / "complete.txt").unlink()
    draw_scenes(root, per_class=2)
    assert (root / "images/boat/000.jpg").read_bytes() != b"touched"
    draw_scenes(root, per_class=1)
    assert [path.name for path in (root / "images/boat").iterdir()] == ["000.jpg"]
    assert [path.name for path in tmp_path.iterdir()] == ["scenes"]


def test_folder_that_cannot_be_written_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(OutputError, match=r"scenes: cannot be written \(.+\); set SEEWHY_CACHE to a writable folder$") as caught:
        draw_scenes(tmp_path / "file" / "below" / "scenes", per_class=1)
    assert "\n" not in str(caught.value)


def test_a_disk_that_fills_up_leaves_nothing_half_drawn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Image.Image, "save", full)
    with pytest.raises(OutputError, match="No space left on device"):
        draw_scenes(tmp_path / "scenes", per_class=1)
    assert list(tmp_path.iterdir()) == []


def test_scenes_are_a_dataset_with_masks(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(synthetic, "draw_scenes", partial(draw_scenes, per_class=2))
    images = open_images("scenes")
    assert images.name == "scenes"
    assert images.classes == tuple(OBJECTS)
    assert len(images) == 16
    assert np.bincount(images.labels).tolist() == [2] * 8
    for path, mask in zip(images.paths, images.masks, strict=True):
        assert mask is not None
        assert mask.relative_to(cache / "scenes" / "masks").with_suffix("") == path.relative_to(images.root).with_suffix("")
        assert read_image(mask).size == read_image(path).size


def test_two_at_once_draw_it_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn = []

    def counted(name: str, number: int) -> tuple[Image.Image, Image.Image]:
        drawn.append((name, number))
        return draw_scene(name, number)

    monkeypatch.setattr(synthetic, "draw_scene", counted)
    with ThreadPoolExecutor(2) as pool:
        assert list(pool.map(lambda _: draw_scenes(tmp_path / "set", per_class=2), range(2))) == [tmp_path / "set"] * 2
    assert sorted(drawn) == [(name, number) for name in OBJECTS for number in range(2)]
    assert len(list((tmp_path / "set").rglob("*.jpg"))) == 2 * len(OBJECTS)
