"""Engines: ONNX Runtime and PyTorch say the same, exports are kept and found again."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from torchvision.transforms import v2

from seewhy.core.parallel import map_ordered
from seewhy.explain.attribution import FeatureMaps
from seewhy.models import executors
from seewhy.models.backbones import create_backbone
from seewhy.models.executors import NormalizeInput, get_executor, make_executor
from seewhy.models.transforms import Preprocessing
from seewhy.models.trunk_tail import split_backbone
from tests.cheap_run import normalised

TINY = Preprocessing(16, (0.5, 0.25, 0.5), (0.5, 0.5, 0.25), "bilinear", 1.0)


def pixels(n: int, size: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, size=(n, size, size, 3), dtype=np.uint8)


def small_network(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU())


@pytest.mark.parametrize("name", ["resnet18", "efficientnet_lite0"])
@pytest.mark.parametrize("unfreeze", [0, 1])
def test_onnx_agrees_with_eager_torch(name: str, unfreeze: int) -> None:
    backbone = create_backbone(name, 5, weights="none")
    cut = split_backbone(backbone, unfreeze)
    preprocessing = replace(backbone.preprocessing, size=64)
    images = pixels(3, 64)
    with torch.no_grad():
        expected = cut.trunk(torch.from_numpy(normalised(images, preprocessing))).numpy()
    found = make_executor(cut.trunk, preprocessing, 3, "onnx")
    scale = np.abs(expected).max()
    assert scale > 0.01
    for n in (3, 1):  # any number of images
        assert np.abs(found(images[:n]) - expected[:n]).max() < 1e-4 * scale
    assert np.abs(make_executor(cut.trunk, preprocessing, 3, "torch")(images) - expected).max() < 1e-4 * scale


def normalisation(pixels: np.ndarray, preprocessing: Preprocessing = TINY) -> np.ndarray:
    return NormalizeInput(nn.Identity(), preprocessing)(torch.from_numpy(pixels)).numpy()


def all_grey_levels() -> np.ndarray:
    """(2, 16, 16, 3): every value in every channel."""
    levels = np.arange(256, dtype=np.uint8).reshape(16, 16)
    return np.stack([np.stack([levels] * 3, axis=-1), np.stack([levels[::-1], levels.T, levels], axis=-1)])


def test_normalisation_is_the_float64_formula() -> None:
    found = normalisation(all_grey_levels())
    assert found.shape == (2, 3, 16, 16)
    assert found.dtype == np.float32
    assert np.abs(found - normalised(all_grey_levels(), TINY)).max() < 1e-6


def test_normalisation_is_torchvisions() -> None:
    pipeline = v2.Compose([v2.ToImage(), v2.ToDtype(torch.float32, scale=True), v2.Normalize(TINY.mean, TINY.std)])
    theirs = torch.stack([pipeline(Image.fromarray(square)) for square in all_grey_levels()])
    assert np.abs(normalisation(all_grey_levels()) - theirs.numpy()).max() < 1e-6


def test_normalisation_of_black_and_white() -> None:
    pixels = np.array([0, 255], dtype=np.uint8).reshape(1, 1, 2, 1).repeat(3, axis=3)
    half = replace(TINY, mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))
    assert normalisation(pixels, half).tolist() == [[[[-1.0, 1.0]]] * 3]


@pytest.mark.parametrize(("images", "cuda", "expected"), [(399, False, "torch"), (400, False, "onnx"), (10_000, True, "torch")])
def test_auto_takes_onnx_for_many_images_on_a_cpu(
    monkeypatch: pytest.MonkeyPatch, cache: Path, images: int, cuda: bool, expected: str
) -> None:
    monkeypatch.setattr(
        executors, "EXECUTORS", {name: lambda network, size, max_parallel_batches, name=name: name for name in ("onnx", "torch")}
    )
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    assert make_executor(nn.Identity(), TINY, images) == expected


def test_an_export_is_kept_and_taken_by_auto(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = make_executor(small_network(), TINY, 1, "onnx")(pixels(2, 16))
    assert len(list((cache / "executors").iterdir())) == 1

    def refuse(*arguments: object, **options: object) -> None:
        raise AssertionError("exported again")

    monkeypatch.setattr(torch.onnx, "export", refuse)
    np.testing.assert_array_equal(make_executor(small_network(), TINY, 1, "auto")(pixels(2, 16)), first)


class Hidden(nn.Module):
    """An activation that `repr` does not show."""

    def __init__(self, activation: Callable[[torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        self.activation = activation

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return self.activation(inputs)


def test_other_weights_structure_or_preprocessing_are_other_exports(cache: Path) -> None:
    cut_pooled, cut_map = (split_backbone(create_backbone("resnet18", 5, "none"), n).trunk for n in (0, 1))
    networks = [small_network(), small_network(1), nn.Sequential(small_network(), nn.Flatten()), cut_pooled, cut_map]
    networks += [Hidden(torch.relu), Hidden(torch.tanh)]  # the same tensors and repr
    networks += [create_backbone("resnet18", 5, "none").model, FeatureMaps(create_backbone("resnet18", 5, "none").model)]
    places = {executors._export_file(NormalizeInput(network, TINY), 16) for network in networks}
    places |= {executors._export_file(NormalizeInput(small_network(), replace(TINY, mean=(0.1, 0.2, 0.3))), 16)}
    places |= {executors._export_file(NormalizeInput(small_network(), TINY), 32)}
    assert len(places) == len(networks) + 2


def test_an_export_that_cannot_be_kept_is_used_all_the_same(cache: Path) -> None:
    cache.mkdir()
    (cache / "executors").write_text("a file where the folder should be")
    found = make_executor(small_network(), TINY, 1, "onnx")(pixels(2, 16))
    np.testing.assert_allclose(found, make_executor(small_network(), TINY, 1, "torch")(pixels(2, 16)), atol=1e-5)


def test_many_images_run_side_by_side_to_the_bit_as_alone(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: 6)
    cached: dict[tuple[str, int], executors.Executor] = {}
    few, many = (get_executor(cached, small_network(), TINY, n, "onnx") for n in (63, 64))
    assert (few.max_parallel_batches, many.max_parallel_batches) == (1, 4)
    assert get_executor(cached, small_network(), TINY, 1000) is many
    assert get_executor(cached, small_network(), TINY, 1) is few
    batches = np.split(pixels(96, 16), 12)
    found = list(map_ordered(many, batches, many.max_parallel_batches, ahead=many.max_parallel_batches))
    np.testing.assert_array_equal(np.concatenate(found), np.concatenate([many(batch) for batch in batches]))
    np.testing.assert_allclose(np.concatenate(found), few(np.concatenate(batches)), atol=1e-5)
