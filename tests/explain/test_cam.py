"""Test class activation map formulas against hand-worked numbers and the papers, in float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from seewhy.explain import cam
from tests.plain_cam import term_by_term

pytestmark = pytest.mark.usefixtures("one_thread")

# ---------------------------------------------------------------- by hand

ACTIVATIONS = torch.tensor([[[[1.0, 2.0], [3.0, 4.0]], [[0.0, 1.0], [1.0, 0.0]]]], dtype=torch.float64)
GRADIENTS = torch.tensor([[[[0.5, -1.0], [0.0, 1.0]], [[2.0, -2.0], [1.0, 0.0]]]], dtype=torch.float64)


def test_gradcam_by_hand() -> None:
    weights = cam.gradcam_weights(ACTIVATIONS, GRADIENTS)
    # (0.5 - 1 + 0 + 1) / 4 and (2 - 2 + 1 + 0) / 4
    np.testing.assert_allclose(weights.numpy(), [[[[0.125]], [[0.25]]]], rtol=1e-15)
    np.testing.assert_allclose(cam.weighted_map(ACTIVATIONS, weights).numpy(), [[[0.125, 0.5], [0.625, 0.5]]], rtol=1e-15)


def test_gradcam_plus_plus_by_hand() -> None:
    weights = cam.gradcam_plus_plus_weights(ACTIVATIONS, GRADIENTS)
    # first channel, sum(A) = 10: g = 0.5 gives 0.5 / (2 + 5), g = 1 gives 1 / (2 + 10), g = -1 and 0 give nothing
    # second channel, sum(A) = 2: g = 2 gives 2 / (2 + 4), g = 1 gives 1 / (2 + 2)
    first, second = 1 / 14 + 1 / 12, 1 / 3 + 1 / 4
    np.testing.assert_allclose(weights.numpy(), [[[[first]], [[second]]]], rtol=1e-15)
    expected = [[[13 / 84, 75 / 84], [88 / 84, 52 / 84]]]
    np.testing.assert_allclose(cam.weighted_map(ACTIVATIONS, weights).numpy(), expected, rtol=1e-14)


def test_hirescam_and_layercam_by_hand() -> None:
    # elementwise: 1 * 0.5 + 0 * 2, 2 * -1 + 1 * -2, 3 * 0 + 1 * 1, 4 * 1 + 0 * 0; LayerCAM without the negative gradients
    hires = cam.weighted_map(ACTIVATIONS, cam.hirescam_weights(ACTIVATIONS, GRADIENTS))
    np.testing.assert_allclose(hires.numpy(), [[[0.5, 0.0], [1.0, 4.0]]], rtol=1e-15)
    layer = cam.weighted_map(ACTIVATIONS, cam.layercam_weights(ACTIVATIONS, GRADIENTS))
    np.testing.assert_allclose(layer.numpy(), [[[0.5, 0.0], [1.0, 4.0]]], rtol=1e-15)
    mixed = torch.tensor([[[[1.0]], [[1.0]]]]), torch.tensor([[[[2.0]], [[-1.5]]]])
    assert cam.weighted_map(mixed[0], cam.hirescam_weights(*mixed)).item() == 0.5
    assert cam.weighted_map(mixed[0], cam.layercam_weights(*mixed)).item() == 2.0


def test_xgradcam_by_hand() -> None:
    weights = cam.xgradcam_weights(ACTIVATIONS, GRADIENTS)
    # (0.5 - 2 + 0 + 4) / 10 and (0 - 2 + 1 + 0) / 2
    np.testing.assert_allclose(weights.numpy(), [[[[0.25]], [[-0.5]]]], rtol=1e-15)
    empty = torch.tensor([[[[1.0, -1.0]]]])
    assert cam.xgradcam_weights(empty, torch.ones_like(empty)).item() == 0  # a channel that sums to 0


def test_eigencam_by_hand() -> None:
    # The rows of the two channels, (3, 0) and (0, 1): the first axis holds more, so the map is the first channel.
    activations = torch.tensor([[[[3.0, 0.0]], [[0.0, 1.0]]]], dtype=torch.float64)
    for sign in (1, -1):
        weights = cam.eigencam_weights(sign * activations, activations)
        np.testing.assert_allclose(weights.numpy(), [[[[sign]], [[0]]]], atol=1e-15)
        np.testing.assert_allclose(cam.weighted_map(sign * activations, weights).numpy(), [[[3, 0]]], atol=1e-15)
    # Both channels alike: the paper's direction is their sum, (1, 1) / sqrt 2; centred, as pytorch-grad-cam does, it would
    # be the same direction with the mean taken away, and half the map negative.
    alike = torch.tensor([[[[1.0, 3.0]], [[1.0, 3.0]]]], dtype=torch.float64)
    weights = cam.eigencam_weights(alike, alike)
    np.testing.assert_allclose(weights.numpy().ravel(), [0.5**0.5] * 2, rtol=1e-12)
    np.testing.assert_allclose(cam.weighted_map(alike, weights).numpy(), [[[2**0.5, 3 * 2**0.5]]], rtol=1e-12)


def test_ablationcam_by_hand() -> None:
    # A score of 3 mean(A_1) - mean(A_2): 7.5 - 0.5 = 7. Without the first channel -0.5, without the second 7.5.
    def score(activations: Tensor) -> Tensor:
        return 3 * activations[:, 0].mean(dim=(1, 2)) - activations[:, 1].mean(dim=(1, 2))

    weights = cam.ablationcam_weights(ACTIVATIONS, score)
    np.testing.assert_allclose(weights.numpy(), [[[[7.5 / 7]], [[-0.5 / 7]]]], rtol=1e-14)
    last = cam.ablationcam_weights(ACTIVATIONS.permute(0, 2, 3, 1), lambda a: score(a.permute(0, 3, 1, 2)), channels=3)
    assert torch.equal(last, weights)
    assert (cam.ablationcam_weights(ACTIVATIONS, lambda a: 0 * score(a)) == 0).all()


def test_scorecam_by_hand() -> None:
    seen: list[Tensor] = []

    def score(masks: Tensor) -> Tensor:
        seen.append(masks)
        return masks.sum(dim=(1, 2))

    weights = cam.scorecam_weights(torch.cat([ACTIVATIONS, torch.full((1, 1, 2, 2), 5.0)], dim=1), score, 2)
    # scaled to 0..1: 0, 1/3, 2/3, 1; the second channel as it is; a channel without contrast shows nothing
    np.testing.assert_allclose(torch.cat(seen).numpy(), [[[0, 1 / 3], [2 / 3, 1]], [[0, 1], [1, 0]], [[0, 0], [0, 0]]], atol=1e-12)
    np.testing.assert_allclose(weights.numpy().ravel(), np.exp([2, 2, 0]) / np.exp([2, 2, 0]).sum(), rtol=1e-12)
    assert cam.scorecam_weights(ACTIVATIONS, score, 6).shape == (1, 2, 1, 1)
    assert seen[-1].shape == (1, 6, 6)


def test_negative_weights_take_away_and_the_map_stops_at_zero() -> None:
    weights = torch.tensor([1.0, -2.0], dtype=torch.float64).reshape(1, 2, 1, 1)
    np.testing.assert_allclose(cam.weighted_map(ACTIVATIONS, weights).numpy(), [[[1.0, 0.0], [1.0, 4.0]]])
    assert cam.weighted_map(ACTIVATIONS, -weights.abs()).abs().max() == 0


@pytest.mark.parametrize("scale", [1e-4, 1.0, 30.0])
def test_gradcam_plus_plus_is_equation_19_term_by_term(scale: float) -> None:
    rng = np.random.default_rng(0)
    activations = rng.normal(size=(3, 5, 4, 3)).clip(min=0)
    gradients = scale * rng.normal(size=(3, 5, 4, 3))  # half of them negative
    gradients[0, 0] = 0
    gradients[1, 1, 2] = 0
    activations[2, 2] = 0
    found = cam.gradcam_plus_plus_weights(torch.from_numpy(activations), torch.from_numpy(gradients))
    np.testing.assert_allclose(found[:, :, 0, 0].numpy(), term_by_term(activations, gradients), rtol=1e-12, atol=0)


def test_gradcam_plus_plus_alpha_is_the_ratio_of_real_second_and_third_derivatives() -> None:
    """exp(logit) of a pooled linear head, differentiated three times by autograd instead of by powers."""
    activations = torch.tensor([[0.2, 1.1], [0.7, 0.0]], dtype=torch.float64, requires_grad=True)
    score = torch.exp(1.3 * activations.mean() + 0.4)

    def derivative(of: Tensor, place: tuple[int, int]) -> Tensor:
        return torch.autograd.grad(of, activations, create_graph=True)[0][place]

    first = derivative(score, (0, 1))
    second = derivative(first, (0, 1))
    third = derivative(second, (0, 1))
    alpha = (second / (2 * second + activations.sum() * third)).item()
    gradients = torch.full((1, 1, 2, 2), 1.3 / 4, dtype=torch.float64)
    found = cam.gradcam_plus_plus_weights(activations.detach()[None, None], gradients).item()
    assert found == pytest.approx(4 * alpha * 1.3 / 4, rel=1e-12)


def test_gradcam_plus_plus_where_squares_of_gradients_underflow() -> None:
    activations, gradients = torch.ones(1, 1, 2, 2), torch.full((1, 1, 2, 2), 1e-25)
    assert cam.gradcam_plus_plus_weights(activations, gradients).item() == pytest.approx(4 * 1e-25 / 2, rel=1e-6)


def test_gradcam_plus_plus_where_the_denominator_vanishes() -> None:
    activations = torch.full((1, 1, 2, 2), -0.5)  # sum -2, as behind an activation that can be negative
    assert cam.gradcam_plus_plus_weights(activations, torch.ones(1, 1, 2, 2)).item() == 0


@pytest.mark.parametrize("method", sorted(set(cam.METHODS) - {"eigencam"}))  # which has no use for gradients
def test_gradients_of_zero_give_zeros_and_no_nan(method: str) -> None:
    activations = torch.rand(2, 3, 4, 4)
    maps = cam.weighted_map(activations, cam.METHODS[method](activations, torch.zeros_like(activations)))
    assert maps.shape == (2, 4, 4)
    assert (maps == 0).all()


def test_scale_to_one_divides_by_each_maximum_and_leaves_zeros() -> None:
    maps = torch.tensor([[[0.0, 2.0], [1.0, 4.0]], [[0.0, 0.0], [0.0, 0.0]], [[1e-30, 0.0], [0.0, 5e-31]]])
    expected = [[[0, 0.5], [0.25, 1]], [[0, 0], [0, 0]], [[1, 0], [0, 0.5]]]
    np.testing.assert_allclose(cam.scale_to_one(maps).numpy(), expected, rtol=1e-6)


# ---------------------------------------------------------------- all classes


def test_gradcam_of_all_classes_by_hand() -> None:
    weight = torch.tensor([[2.0, -1.0], [0.0, 4.0]])
    features = torch.tensor([[[[1.0, 3.0]], [[2.0, 0.0]]]])  # one image, two channels, two places
    # relu(W A / 2): class 0: (2 1 - 2) / 2, (2 3 - 0) / 2; class 1: 4 2 / 2, 0.
    assert cam.gradcam_all_classes(weight, features).tolist() == [[[[0.0, 3.0]], [[4.0, 0.0]]]]
    assert cam.gradcam_all_classes(-weight, features).tolist() == [[[[0.0, 0.0]], [[0.0, 0.0]]]]


# ---------------------------------------------------------------- several layers, broken numbers


def test_fused_maps_by_hand() -> None:
    small, large = torch.tensor([[[2.0]]]), torch.tensor([[[0.0, 1.0], [3.0, 4.0]]])
    np.testing.assert_allclose(cam.fuse([small, large]).numpy(), [[[0.5, 0.625], [0.875, 1.0]]], rtol=1e-6)
    np.testing.assert_allclose(cam.fuse([large]).numpy(), [[[0, 0.25], [0.75, 1]]], rtol=1e-6)


def test_a_map_with_a_nan_or_an_infinity_becomes_zeros() -> None:
    maps = torch.tensor([[[1.0, 2.0]], [[float("nan"), 1.0]], [[float("inf"), 1.0]]])
    assert cam.zero_nonfinite(maps).tolist() == [[[1.0, 2.0]], [[0.0, 0.0]], [[0.0, 0.0]]]
