"""What --group-by takes: near-duplicates, a table, a pattern; and what it says of a wrong one."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from seewhy.curation import grouping
from seewhy.curation.grouping import group_images
from seewhy.data.image_set import ImageSet, open_images
from seewhy.errors import ConfigError


@pytest.fixture
def images(make_folder: Callable[..., Path], cache: Path) -> ImageSet:
    return open_images(str(make_folder({"cat": 3, "dog": 3})))


def same(groups: np.ndarray | None) -> list[int]:
    """Groups by their first member."""
    assert groups is not None
    return [int(np.flatnonzero(groups == g)[0]) for g in groups]


def test_pattern(images: ImageSet) -> None:
    assert same(group_images(images, r"(\d)\.png$")) == [0, 1, 2, 0, 1, 2]
    assert same(group_images(images, r"^\w+")) == [0, 0, 0, 3, 3, 3]
    assert group_images(images, "exact") is None


def test_table_goes_by_the_path_below_the_folder(images: ImageSet, tmp_path: Path) -> None:
    names = [path.relative_to(images.root).as_posix() for path in images.paths]
    rows = [f"{name},{'one' if '0' in name else n}" for n, name in reversed(list(enumerate(names)))]
    (tmp_path / "g.csv").write_text("path,group\n" + "\n".join(rows))
    assert same(group_images(images, str(tmp_path / "g.csv"))) == [0, 1, 2, 0, 4, 5]


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (None, "cannot be read"),
        ("", "cannot be read"),
        ("file,group\na,1\n", "has the columns file, group"),
        ("path,group\ncat/0.png,1\n", "5 of 6 images are not in it, for example 'cat/1.png'"),
        (
            "path,group\n" + "".join(f"{c}/{n}.png,{'' if n else 'NA'}\n" for c in ("cat", "dog") for n in range(3)),
            "4 images have no group",
        ),
    ],
)
def test_a_table_that_does_not_fit(images: ImageSet, tmp_path: Path, content: str | None, words: str) -> None:
    if content is not None:
        (tmp_path / "g.csv").write_text(content)
    with pytest.raises(ConfigError, match=words):
        group_images(images, str(tmp_path / "g.csv"))


@pytest.mark.parametrize(
    ("pattern", "words"), [("(", "not a regular expression"), (r"cat/\d", "does not match 3 of 6 paths, for example 'dog/0.png'")]
)
def test_a_pattern_that_does_not_fit(images: ImageSet, pattern: str, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        group_images(images, pattern)


def test_many_images_are_compared_by_hash_alone(images: ImageSet, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_features(*arguments: object, **options: object) -> None:
        raise AssertionError("features computed")

    monkeypatch.setattr(grouping, "MANY", 5)
    monkeypatch.setattr(grouping, "embed", no_features)
    assert same(group_images(images)) == list(range(6))  # noise is like no other noise


def test_near_duplicates_of_photographs_are_found(caltech_root: Path, cache: Path, tmp_path: Path) -> None:
    """Photographs, and some of them smaller, cropped by 4% and brighter: each with its copy, no two others."""
    source = sorted((caltech_root / "caltech101/101_ObjectCategories/butterfly").glob("*.jpg"))[:12]
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
    for n, path in enumerate(source):
        image = Image.open(path).convert("RGB")
        image.save(tmp_path / "a" / f"{n:02}.png")
        if n < 6:
            w, h = image.size
            copy = image.crop((w // 50, h // 50, w - w // 50, h - h // 50)).resize((w * 2 // 3, h * 2 // 3))
            copy.point(lambda v: min(255, int(v * 1.15))).save(tmp_path / "b" / f"{n:02}.jpg", quality=70)
    found = same(group_images(open_images(str(tmp_path)), "duplicates"))
    assert found == [*range(12), *range(6)]
