"""The feature store row by row, extraction that never computes twice, executors that agree."""

from __future__ import annotations

import errno
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, ImageOps
from torch import nn

from seewhy.data.decode import read_image
from seewhy.data.image_set import ImageSet, open_images
from seewhy.errors import OutputError
from seewhy.models import features
from seewhy.models.backbones import create_backbone
from seewhy.models.executors import Executor
from seewhy.models.feature_store import as_keys
from seewhy.models.features import FeatureSpec, FeatureStore, extract_features, render_view, row_key
from seewhy.models.transforms import Preprocessing, view_of
from seewhy.models.trunk_tail import TrunkTail, split_backbone
from tests.cheap_run import normalised

TINY = Preprocessing(16, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5), "bilinear", 1.0)
ALL = np.arange(8)

MakeFolder = Callable[..., Path]


pytestmark = pytest.mark.usefixtures("one_thread")


def tiny_cut(seed: int = 0, scale: float = 1.0) -> TrunkTail:
    """A trunk of one convolution, (N, 3, 16, 16) -> (N, 4, 2, 2): quick, and its answer easy to repeat."""
    convolution = nn.Conv2d(3, 4, kernel_size=8, stride=8)
    nn.init.normal_(convolution.weight, std=0.1 * scale, generator=torch.Generator().manual_seed(seed))
    nn.init.zeros_(convolution.bias)
    return TrunkTail(nn.Sequential(convolution), nn.Identity(), "tiny")


def expected_features(images: ImageSet, cut: TrunkTail, views: int) -> np.ndarray:
    """(N, V, 4, 2, 2) straight from the images."""
    pixels = [render_view(read_image(p), v, h, TINY) for p, h in zip(images.paths, images.hashes, strict=True) for v in range(views)]
    with torch.no_grad():
        found = cut.trunk(torch.from_numpy(normalised(np.stack(pixels), TINY))).numpy()
    return found.astype(np.float16).astype(np.float32).reshape(len(images), views, *found.shape[1:])


@pytest.fixture
def images(cache: Path, make_folder: MakeFolder) -> ImageSet:
    return open_images(str(make_folder({"cat": 5, "dog": 3})))


def batch(*numbers: int) -> tuple[list[bytes], np.ndarray]:
    """Keys and rows (2 values each) of the given numbers."""
    return [row_key(str(n), 0) for n in numbers], np.array([[n, n + 0.5] for n in numbers])


def test_rounding_of_uncached_features_is_that_of_the_store() -> None:
    maps = torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    np.testing.assert_array_equal(features.round_like_stored(maps).numpy(), maps.numpy().astype(np.float16).astype(np.float32))
    vectors = maps.flatten(1)
    assert torch.equal(features.round_like_stored(vectors), vectors)


# ---------------------------------------------------------------- extraction


def test_features_are_those_of_the_trunk(images: ImageSet) -> None:
    cut = tiny_cut()
    found = extract_features(images, ALL, 3, cut, TINY)
    expected = expected_features(images, cut, 3)
    assert found.computed == 24
    assert found.rows.shape == (8, 3)
    for view in range(3):
        np.testing.assert_allclose(found.get(ALL, view), expected[:, view], rtol=2e-3, atol=1e-4)
    one_view_each = found.get(np.array([5, 0]), np.array([2, 1]))
    np.testing.assert_allclose(one_view_each, [expected[5, 2], expected[0, 1]], rtol=2e-3, atol=1e-4)
    assert one_view_each.dtype == np.float32


def test_nothing_is_computed_twice(images: ImageSet, monkeypatch: pytest.MonkeyPatch) -> None:
    first = extract_features(images, ALL, 2, tiny_cut(), TINY)
    assert first.computed == 16
    assert extract_features(images, ALL, 3, tiny_cut(), TINY).computed == 8  # the third view alone

    def never(*arguments: Any) -> None:
        raise AssertionError("an image was read again")

    monkeypatch.setattr(features, "read_image", never)
    again = extract_features(images, ALL[::-1], 2, tiny_cut(), TINY)
    assert again.computed == 0
    np.testing.assert_array_equal(again.get(ALL[::-1], 1), first.get(ALL, 1))


def test_a_new_image_alone_is_computed(images: ImageSet, make_folder: MakeFolder) -> None:
    extract_features(images, ALL, 2, tiny_cut(), TINY)
    Image.new("RGB", (40, 30), "orange").save(images.root / "cat" / "new.png")
    more = open_images(str(images.root))
    found = extract_features(more, np.arange(9), 2, tiny_cut(), TINY)
    assert found.computed == 2
    np.testing.assert_allclose(found.get(np.arange(9), 0), expected_features(more, tiny_cut(), 2)[:, 0], rtol=2e-3, atol=1e-4)


def test_a_changed_image_under_an_old_name_is_computed_again(images: ImageSet) -> None:
    extract_features(images, ALL, 1, tiny_cut(), TINY)
    Image.new("RGB", (40, 30), "orange").save(images.paths[0])
    assert extract_features(open_images(str(images.root)), ALL, 1, tiny_cut(), TINY).computed == 1


def test_another_dataset_with_the_same_images_reuses_them(images: ImageSet, tmp_path: Path) -> None:
    first = extract_features(images, ALL, 1, tiny_cut(), TINY)
    other = tmp_path / "other"
    for n, path in enumerate(reversed(images.paths)):  # other names, another order, other classes
        (other / f"class{n % 2}").mkdir(parents=True, exist_ok=True)
        shutil.copy(path, other / f"class{n % 2}" / f"{n}.png")
    others = open_images(str(other))
    found = extract_features(others, ALL, 1, tiny_cut(), TINY)
    assert found.computed == 0
    same = [images.hashes.index(sha256) for sha256 in others.hashes]
    assert same != ALL.tolist()
    np.testing.assert_array_equal(found.get(ALL), first.get(np.array(same)))


def test_equal_images_of_one_dataset_are_computed_once(images: ImageSet) -> None:
    shutil.copy(images.paths[0], images.root / "dog" / "copy.png")
    twice = open_images(str(images.root))
    for keep in (True, False):
        found = extract_features(twice, np.arange(9), 2, tiny_cut(), TINY, FeatureSpec(cache=keep))
        assert found.computed == 16
        copy = [str(path.name) for path in twice.paths].index("copy.png")
        np.testing.assert_array_equal(found.rows[copy], found.rows[0])


def test_other_weights_place_or_preprocessing_take_another_store(images: ImageSet, cache: Path) -> None:
    extract_features(images, ALL, 1, tiny_cut(), TINY)
    for cut, preprocessing in (
        (tiny_cut(seed=1), TINY),
        (replace(tiny_cut(), cut_point="elsewhere"), TINY),
        (tiny_cut(), replace(TINY, mean=(0.4, 0.5, 0.5))),
        (tiny_cut(), replace(TINY, resize="crop")),
    ):
        assert extract_features(images, ALL, 1, cut, preprocessing).computed == 8
    assert len(list((cache / "features").iterdir())) == 5


class Activated(nn.Module):
    """A convolution and an activation held as a plain function, which neither `state_dict` nor `repr` shows."""

    def __init__(self, activation: Callable[[torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        self.convolution = tiny_cut().trunk[0]
        self.activation = activation

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return self.activation(self.convolution(inputs))


def scaled(factor: float) -> Callable[[torch.Tensor], torch.Tensor]:
    return lambda values: values * factor


@pytest.mark.parametrize(
    ("one", "two"),
    [
        (nn.Sequential(tiny_cut().trunk[0], nn.GELU()), nn.Sequential(tiny_cut().trunk[0], nn.ReLU())),
        (nn.Sequential(tiny_cut().trunk[0], nn.LeakyReLU(0.1)), nn.Sequential(tiny_cut().trunk[0], nn.LeakyReLU(0.5))),
        (Activated(torch.relu), Activated(torch.tanh)),
        (Activated(nn.functional.relu), Activated(nn.functional.gelu)),
        (Activated(scaled(2.0)), Activated(scaled(3.0))),
        (Activated(partial(torch.clamp, min=0.1)), Activated(partial(torch.clamp, min=0.2))),
    ],
)
def test_equal_weights_in_another_structure_take_another_store(images: ImageSet, cache: Path, one: nn.Module, two: nn.Module) -> None:
    assert all(torch.equal(a, b) for a, b in zip(one.state_dict().values(), two.state_dict().values(), strict=True))
    found = []
    for trunk in (one, two):
        features = extract_features(images, ALL, 1, TrunkTail(trunk, nn.Identity(), "tiny"), TINY)
        assert features.computed == 8
        found.append(features.get(ALL))
        expected = expected_features(images, TrunkTail(trunk, nn.Identity(), "tiny"), 1)
        np.testing.assert_allclose(found[-1], expected[:, 0], rtol=2e-3, atol=1e-3)
    assert np.abs(found[0] - found[1]).max() > 1e-3
    assert len(list((cache / "features").iterdir())) == 2
    assert extract_features(images, ALL, 1, TrunkTail(deepcopy(one), nn.Identity(), "tiny"), TINY).computed == 0


@pytest.mark.parametrize("name", ["test_resnet.r160_in1k", "efficientvit_b0.r224_in1k", "repvit_m0_9.dist_300e_in1k"])
def test_seeds_and_classes_share_a_store(name: str) -> None:
    one, two = (create_backbone(name, classes, "none", seed=5) for classes in (3, 4))
    own = two.model.state_dict()
    two.model.load_state_dict({key: t if t.shape == own[key].shape else own[key] for key, t in one.model.state_dict().items()})
    names = [features.store_name(split_backbone(backbone, 0), backbone.preprocessing, "torch") for backbone in (one, two)]
    assert names[0] == names[1]
    cut = split_backbone(one, 0)
    with torch.no_grad():
        for parameter in cut.tail.parameters():  # a fit moves the classifier
            parameter += 1
    assert features.store_name(cut, one.preprocessing, "torch") == names[0]


def test_interruption_keeps_the_finished_batches(images: ImageSet, monkeypatch: pytest.MonkeyPatch) -> None:
    original = features.make_executor

    def two_batches(*arguments: Any) -> Executor:
        run, done = original(*arguments), []

        def executor(pixels: np.ndarray) -> np.ndarray:
            done.append(len(pixels))
            if len(done) == 3:
                raise KeyboardInterrupt
            return run(pixels)

        return Executor(executor)

    monkeypatch.setattr(features, "BATCH", 3)
    with monkeypatch.context() as patch:
        patch.setattr(features, "make_executor", two_batches)
        with pytest.raises(KeyboardInterrupt):
            extract_features(images, ALL, 1, tiny_cut(), TINY)
    resumed = extract_features(images, ALL, 1, tiny_cut(), TINY)
    assert resumed.computed == 2  # 8 images less two batches of 3
    np.testing.assert_allclose(resumed.get(ALL), expected_features(images, tiny_cut(), 1)[:, 0], rtol=2e-3, atol=1e-4)


def test_what_another_process_writes_while_one_waits_is_not_computed(images: ImageSet, monkeypatch: pytest.MonkeyPatch) -> None:
    other: list[int] = []
    lock = FeatureStore.lock

    @contextmanager
    def held_by_another(store: FeatureStore) -> Iterator[None]:
        monkeypatch.setattr(FeatureStore, "lock", lock)
        other.append(extract_features(images, ALL[:6], 1, tiny_cut(), TINY).computed)
        with store.lock():
            yield

    monkeypatch.setattr(FeatureStore, "lock", held_by_another)
    found = extract_features(images, ALL, 1, tiny_cut(), TINY)
    assert (other, found.computed) == ([6], 2)
    assert sorted(found.rows[:, 0]) == list(range(8))


@pytest.mark.parametrize("looks", [1, 3, None], ids=["at once", "late", "never"])
def test_features_that_a_shared_disk_shows_late_are_waited_for(
    looks: int | None, images: ImageSet, monkeypatch: pytest.MonkeyPatch
) -> None:
    """looks: until all rows are seen after they were computed; None: the other machine has a cache of its own."""
    two_processes = {"world_size": lambda: 2, "barrier": lambda: None, "all_reduce_scalar": float, "shard": list}
    for name, value in two_processes.items():
        monkeypatch.setattr(features.distributed, name, value)
    real, found, slept = FeatureStore.find, list[int](), list[float]()

    def find(store: FeatureStore, wanted: Any) -> Any:
        rows = real(store, wanted)
        found.append(int((rows < 0).sum()))
        if not found[-1] and (looks is None or found.count(0) < looks):
            rows[0] = -1
        return rows

    monkeypatch.setattr(FeatureStore, "find", find)
    monkeypatch.setattr("time.sleep", slept.append)
    if looks is None:
        with pytest.raises(OutputError, match="features of another machine are missing"):
            extract_features(images, ALL, 1, tiny_cut(), TINY, FeatureSpec(distributed=True))
    else:
        assert extract_features(images, ALL, 1, tiny_cut(), TINY, FeatureSpec(distributed=True)).rows.min() == 0
    assert len(slept) == (features.SHARED_DISK_DELAY if looks is None else looks - 1)


def test_without_keeping_the_disk_stays_empty(images: ImageSet, cache: Path) -> None:
    found = extract_features(images, ALL, 2, tiny_cut(), TINY, FeatureSpec(cache=False))
    assert found.computed == 16
    assert not (cache / "features").exists()
    kept = extract_features(images, ALL, 2, tiny_cut(), TINY)
    np.testing.assert_array_equal(found.get(ALL, 1), kept.get(ALL, 1))
    assert found.store.dtype == kept.store.dtype == np.float16


def test_trunk_is_left_as_it_was(images: ImageSet) -> None:
    cut = tiny_cut()
    weight = cut.trunk[0].weight
    strides = weight.stride()
    extract_features(images, ALL, 1, cut, TINY, FeatureSpec("torch"))
    assert cut.trunk[0].weight is weight
    assert weight.stride() == strides  # the executor's layout and device are its own


# ---------------------------------------------------------------- errors


def test_maps_beyond_half_precision_are_refused(images: ImageSet) -> None:
    with pytest.raises(OutputError, match=r"exceed half precision.*--set feature_dtype=float32"):
        extract_features(images, ALL, 1, tiny_cut(scale=1e6), TINY)
    flat = tiny_cut(scale=1e6)
    vectors = TrunkTail(nn.Sequential(flat.trunk[0], nn.Flatten()), nn.Identity(), "pooled")
    assert np.abs(extract_features(images, ALL, 1, vectors, TINY).get(ALL)).max() > 65_504


def test_full_disk_is_one_line_that_names_the_cache(images: ImageSet, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(store: FeatureStore, batches: object, *writer: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(FeatureStore, "append", full)
    with pytest.raises(OutputError, match=r"No space left on device\); free some space or set SEEWHY_CACHE") as caught:
        extract_features(images, ALL, 1, tiny_cut(), TINY)
    assert "\n" not in str(caught.value)


def test_unwritable_cache_is_one_line_that_names_the_cache(images: ImageSet, cache: Path) -> None:
    (cache / "features").write_text("a file where the folder should be")
    with pytest.raises(OutputError, match="set SEEWHY_CACHE to another folder") as caught:
        extract_features(images, ALL, 1, tiny_cut(), TINY)
    assert "\n" not in str(caught.value)


# ---------------------------------------------------------------- views


@pytest.fixture
def photo() -> Image.Image:
    noise = np.random.default_rng(0).integers(0, 256, size=(30, 40, 3), dtype=np.uint8)
    return Image.fromarray(noise).resize((160, 120), Image.Resampling.BICUBIC)


@pytest.mark.parametrize("resize", ["squash", "crop"])
def test_view_1_is_view_0_of_the_mirrored_image(photo: Image.Image, resize: str) -> None:
    preprocessing = replace(TINY, size=64, crop=0.875, resize=resize)
    plain = render_view(photo, 0, "ab" * 32, preprocessing)
    mirrored = render_view(photo, 1, "ab" * 32, preprocessing)
    np.testing.assert_array_equal(mirrored, plain[:, ::-1])
    of_mirror = render_view(ImageOps.mirror(photo), 0, "ab" * 32, preprocessing)
    assert np.abs(mirrored.astype(int) - of_mirror).max() <= 1
    assert np.abs(mirrored.astype(int) - plain).mean() > 10


def test_random_views_depend_on_image_and_number_alone(photo: Image.Image) -> None:
    one = render_view(photo, 2, "ab" * 32, TINY)
    np.testing.assert_array_equal(one, render_view(photo, 2, "ab" * 32, TINY))
    for number, sha256 in ((3, "ab" * 32), (2, "cd" * 32), (0, "ab" * 32)):
        assert np.abs(render_view(photo, number, sha256, TINY).astype(int) - one).max() > 10
    left, top, right, bottom = view_of(2, "ab" * 32, 160, 120, TINY).box
    assert 0 <= left < right <= 160
    assert 0 <= top < bottom <= 120
    assert 0.35 <= (right - left) * (bottom - top) / (160 * 120) <= 1


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="resident memory is read from Linux's /proc")
def test_reading_a_mapped_store_does_not_fill_memory(tmp_path: Path) -> None:
    def resident_mb() -> float:
        line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmRSS"))
        return int(line.split()[1]) / 1024

    rows, width = 400, 250_000  # 200 MB of float16
    store = np.memmap(tmp_path / "rows.bin", dtype=np.float16, mode="w+", shape=(rows, width))
    store[:] = np.arange(rows, dtype=np.float16)[:, None]
    store.flush()
    store = np.memmap(tmp_path / "rows.bin", dtype=np.float16, mode="r", shape=(rows, width))
    before = resident_mb()
    for start in range(0, rows, 8):
        taken = features.take_rows(store, np.arange(start, start + 8))
        assert taken[:, 0].tolist() == list(range(start, start + 8))
    assert resident_mb() - before < 60


@given(st.lists(st.integers(0, 6), max_size=12), st.integers(1, 3), st.sets(st.integers(0, 6)))
def test_jobs_name_each_missing_view_of_each_content_once(contents: list[int], views: int, known: set[int]) -> None:
    """Images at odd places, of which some have the same content; the contents in `known` have all their views but the last."""
    keys = [row_key(str(content), view) for content in contents for view in range(views)]
    missing = np.array([content not in known or view == views - 1 for content in contents for view in range(views)], dtype=bool)
    todo = features._first_missing(as_keys(keys), missing)
    jobs = list(features._jobs(100 + np.arange(len(contents)), todo, views))
    expected = [
        (100 + n, [view for view in range(views) if missing[n * views + view]])
        for n, content in enumerate(contents)
        if contents.index(content) == n and missing[n * views : (n + 1) * views].any()
    ]
    assert jobs == expected
    assert len(todo) == sum(len(each) for _, each in expected)
