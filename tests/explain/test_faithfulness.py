"""Test heatmap metrics by hand, against torch-cam and pytorch-grad-cam, and on baseline maps."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pytorch_grad_cam.metrics.road import ROADCombined
from pytorch_grad_cam.utils.model_targets import ClassifierOutputSoftmaxTarget
from scipy.stats import spearmanr
from torch import Tensor, nn
from torchcam.metrics import ClassificationMetric, DeletionInsertionMetric

from seewhy.explain import faithfulness

pytestmark = pytest.mark.usefixtures("one_thread")


def top_row_probs(images: Tensor) -> Tensor:
    """Two classes; the first is as probable as the top row of 4 x 4 images is bright."""
    share = images[:, 0, 0].mean(dim=1).clamp(0, 1)
    return torch.stack([share, 1 - share], dim=1)


WHITE = torch.ones(1, 3, 4, 4)
FIRST = torch.tensor([0])
TOP = torch.zeros(1, 4, 4)
TOP[0, 0] = 1
BOTTOM = TOP.flip(1)


# ---------------------------------------------------------------- by hand


def test_drop_and_increase_by_hand() -> None:
    probs, masked = torch.tensor([0.8, 0.8, 0.5, 0.2]), torch.tensor([0.6, 0.8, 0.0, 0.9])
    np.testing.assert_allclose(faithfulness.average_drop(probs, masked).numpy(), [0.25, 0, 1, 0], atol=1e-7)
    assert faithfulness.confidence_increase(probs, masked).tolist() == [0, 0, 0, 1]  # not where it is just as probable
    assert faithfulness.class_probabilities(top_row_probs, 0.8 * WHITE * TOP, torch.tensor([1])).item() == pytest.approx(0.2)


def test_deletion_by_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(faithfulness, "STEPS", 4)  # a row a step
    # The row that counts goes first: 1, 0, 0, 0, 0; last: 1, 1, 1, 1, 0. Trapezoids of a quarter.
    assert faithfulness.deletion(top_row_probs, WHITE, FIRST, TOP).item() == pytest.approx(0.125)
    assert faithfulness.deletion(top_row_probs, WHITE, FIRST, BOTTOM + 0.5 * (1 - TOP)).item() == pytest.approx(0.875)


def test_insertion_by_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(faithfulness, "STEPS", 4)
    monkeypatch.setattr(faithfulness, "gaussian_blur", lambda images, *sizes: torch.zeros_like(images))
    assert faithfulness.insertion(top_row_probs, WHITE, FIRST, TOP).item() == pytest.approx(0.875)
    assert faithfulness.insertion(top_row_probs, WHITE, FIRST, BOTTOM + 0.5 * (1 - TOP)).item() == pytest.approx(0.125)


def test_pointing_and_energy_by_hand() -> None:
    maps = torch.tensor([[[0.0, 1.0], [0.5, 0.5]], [[1.0, 1.0], [0.0, 0.0]], [[0.0, 0.0], [0.0, 0.0]]])
    masks = torch.tensor([[[False, True], [False, True]], [[True, False], [True, False]], [[True, True], [True, True]]])
    assert faithfulness.strict_pointing_game(maps, masks).tolist() == [1.0, 0.5, 0.0]
    assert faithfulness.energy_pointing_game(maps, masks).tolist() == [0.75, 0.5, 0.0]


def test_the_pointing_game_has_its_margin() -> None:
    """3% of 100 pixels: three pixels off, straight or (2, 2) aslant, is a hit; (3, 1) is 3.2 pixels off."""
    mask = torch.zeros(100, 100, dtype=torch.bool)
    mask[40:60, 40:60] = True
    peaks = [(50, 50), (37, 50), (36, 50), (38, 38), (37, 39)]
    maps = torch.zeros(len(peaks), 100, 100)
    for n, (y, x) in enumerate(peaks):
        maps[n, y, x] = 1
    assert faithfulness.pointing_game(maps, mask.expand(len(peaks), -1, -1)).tolist() == [1, 1, 0, 1, 0]
    assert faithfulness.strict_pointing_game(maps, mask.expand(len(peaks), -1, -1)).tolist() == [1, 0, 0, 0, 0]
    assert faithfulness.pointing_game(maps[:1], torch.zeros(1, 100, 100, dtype=torch.bool)).tolist() == [0]  # no object, no hit


def test_imputing_by_hand() -> None:
    image = torch.zeros(3, 3, 3)
    image[:, 0] = 6.0  # the three neighbours above: 6 (1/12 + 1/6 + 1/12) = 2
    removed = torch.zeros(3, 3, dtype=torch.bool)
    removed[1, 1] = True
    found = faithfulness.impute(image, removed, torch.zeros_like(image))
    np.testing.assert_allclose(found[:, 1, 1].numpy(), 2.0, rtol=1e-6)
    kept = ~removed
    assert torch.equal(found[:, kept], image[:, kept])
    corner = torch.zeros(3, 3, dtype=torch.bool)
    corner[0, 0] = True  # two neighbours of 1/6 and one of 1/12: (6 / 6) / (5 / 12)
    assert faithfulness.impute(image, corner, torch.zeros_like(image))[0, 0, 0].item() == pytest.approx(2.4)


@settings(max_examples=30, deadline=None)
@given(share=st.floats(0.0, 1.0), seed=st.integers(0, 1000), value=st.floats(-3, 3))
def test_a_flat_image_is_imputed_flat(share: float, seed: int, value: float) -> None:
    removed = torch.rand(8, 8, generator=torch.Generator().manual_seed(seed)) < share
    found = faithfulness.impute(torch.full((3, 8, 8), value), removed, torch.zeros(3, 8, 8))
    if not bool(removed.all()):
        np.testing.assert_allclose(found.numpy(), value, atol=1e-5)


# ---------------------------------------------------------------- peers


class Peer:
    """A CAM extractor as torch-cam's metrics expect one, with given maps."""

    def __init__(self, model: nn.Module, maps: Tensor) -> None:
        self.model, self.maps = model, maps

    def __call__(self, *arguments: Any, **options: Any) -> list[Tensor]:
        return [self.maps]

    def fuse_cams(self, cams: list[Tensor]) -> Tensor:
        return cams[0]

    def _hooks_off(self) -> Any:
        return torch.no_grad()


@pytest.fixture(scope="module")
def scene() -> tuple[nn.Module, faithfulness.PredictProbs, Tensor, Tensor, Tensor]:
    """A network that looks at 4 x 4 places, smooth images, predicted classes and maps."""
    model = nn.Sequential(nn.AvgPool2d(16), nn.Flatten(), nn.Linear(48, 5)).eval()
    nn.init.normal_(model[2].weight, std=0.7, generator=torch.Generator().manual_seed(2))
    coarse = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    images = nn.functional.interpolate(coarse, (64, 64), mode="bicubic")

    def predict_probs(found: Tensor) -> Tensor:
        with torch.no_grad():
            probs: Tensor = model(found).softmax(dim=1)
        return probs

    return model, predict_probs, images, predict_probs(images).argmax(dim=1), faithfulness.random_maps(4, 64, seed=1)


def test_drop_and_increase_are_torch_cams(scene: Any) -> None:
    model, predict_probs, images, targets, maps = scene
    metric = ClassificationMetric(Peer(model, maps), lambda logits: logits.softmax(dim=1))
    metric.update(images)
    reference = metric.summary()
    probs, masked = (faithfulness.class_probabilities(predict_probs, seen, targets) for seen in (images, images * maps[:, None]))
    assert faithfulness.average_drop(probs, masked).mean().item() == pytest.approx(reference["avg_drop"], rel=1e-4)
    assert faithfulness.confidence_increase(probs, masked).mean().item() == pytest.approx(reference["conf_increase"], rel=1e-4)


def test_deletion_and_insertion_are_torch_cams(scene: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model, predict_probs, images, targets, maps = scene
    monkeypatch.setattr(faithfulness, "STEPS", 16)  # 4,096 pixels by 16: their steps are ours
    monkeypatch.setattr(faithfulness, "gaussian_blur", lambda found, *sizes: torch.zeros_like(found))  # their default start
    metric = DeletionInsertionMetric(Peer(model, maps), lambda logits: logits.softmax(dim=1), steps=16)
    metric.update(images)
    reference = metric.summary()
    assert faithfulness.deletion(predict_probs, images, targets, maps).mean().item() == pytest.approx(reference["deletion_auc"], rel=1e-4)
    assert faithfulness.insertion(predict_probs, images, targets, maps).mean().item() == pytest.approx(reference["insertion_auc"], rel=1e-4)


def test_road_is_pytorch_grad_cams(scene: Any) -> None:
    model, predict_probs, images, targets, maps = scene
    metric = ROADCombined(percentiles=[100 - round(100 * share) for share in faithfulness.ROAD_SHARES])
    torch.manual_seed(0)
    reference = metric(images, maps.numpy(), [ClassifierOutputSoftmaxTarget(int(c)) for c in targets], model)
    computed = faithfulness.road(predict_probs, images, targets, maps)
    assert np.abs(reference).max() > 0.05
    np.testing.assert_allclose(computed.numpy(), reference, atol=0.01)


# ---------------------------------------------------------------- maps that know nothing


def test_centre_and_random_maps() -> None:
    centre = faithfulness.centre_maps(2, 5)
    assert centre.shape == (2, 5, 5)
    assert centre[0, 2, 2] == 1
    assert centre[0, 2, 0].item() == pytest.approx(np.exp(-0.5 * (2 / 1.25) ** 2), rel=1e-6)
    assert torch.equal(centre[0], centre[0].T)
    noise = faithfulness.random_maps(3, 28)
    assert noise.shape == (3, 28, 28)
    assert torch.equal(noise, faithfulness.random_maps(3, 28))
    assert not torch.equal(noise[0], noise[1])
    assert noise.amax(dim=(1, 2)).tolist() == [1, 1, 1]
    assert noise.min() >= 0


def test_a_map_of_zeros_is_scored_too() -> None:
    images, maps = torch.ones(1, 3, 16, 16), torch.zeros(1, 16, 16)
    probs, masked = (faithfulness.class_probabilities(top_row_probs, seen, FIRST) for seen in (images, images * maps[:, None]))
    for name, score in faithfulness.FAITHFULNESS_METRICS.items():
        values = score.of(probs, masked) if name in faithfulness.MASKING_METRICS else score.of(top_row_probs, images, FIRST, maps)
        assert values.shape == (1,), name
        assert values.isfinite().all(), name


# ---------------------------------------------------------------- likeness of two maps


def test_rank_correlation_is_scipys() -> None:
    maps, others = (torch.randint(0, 4, (5, 6, 6), generator=torch.Generator().manual_seed(s)).float() for s in (0, 1))  # with ties
    found = faithfulness.rank_correlation(maps, others)
    expected = [spearmanr(a.ravel(), b.ravel()).statistic for a, b in zip(maps.numpy(), others.numpy(), strict=True)]
    np.testing.assert_allclose(found.numpy(), expected, atol=1e-12)
    assert faithfulness.rank_correlation(maps, maps).tolist() == pytest.approx([1] * 5)
    assert faithfulness.rank_correlation(maps, torch.zeros_like(maps)).tolist() == [0] * 5


def test_structural_similarity_of_equal_and_opposite_maps() -> None:
    maps = faithfulness.random_maps(3, 32)
    np.testing.assert_allclose(faithfulness.structural_similarity(maps, maps).numpy(), 1, atol=1e-5)
    assert (faithfulness.structural_similarity(maps, 1 - maps) < 0.2).all()


def test_randomise_starts_parts_anew_and_leaves_the_rest() -> None:
    torch.manual_seed(3)
    norm = nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3))
    model = nn.ModuleDict({"kept": nn.Linear(3, 3), "norm": norm, "scale": nn.ParameterList([nn.Parameter(torch.arange(50.0))])})
    norm[1].running_mean.fill_(7)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    state = torch.get_rng_state()
    faithfulness.randomise(model, ["norm", "scale"])
    assert torch.equal(torch.get_rng_state(), state)  # the caller's
    after = model.state_dict()
    changed = {key for key in before if not torch.equal(before[key], after[key])}
    assert changed == {"norm.0.weight", "norm.0.bias", "norm.1.running_mean", "scale.0"}
    assert sorted(after["scale.0"].tolist()) == list(range(50))
