"""Class activation maps against hand-worked numbers, the papers' formulas in float64, and pytorch-grad-cam."""

from __future__ import annotations

import copy
import math
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from pytorch_grad_cam import GradCAM, GradCAMPlusPlus
from pytorch_grad_cam.utils.model_targets import ClassifierOutputTarget
from torch import Tensor, nn

from seewhy import cam
from seewhy.backbones import create_backbone
from seewhy.errors import BackboneError

TARGET_LAYERS = {"resnet18": "layer4", "efficientnet_lite0": "bn2"}
SMALL = {"resnet18": 96, "efficientnet_lite0": 96, "test_convnext": 160, "test_mambaout": 160, "test_vit": 160, "test_vit2": 160}
PEERS = {"gradcam": GradCAM, "gradcam++": GradCAMPlusPlus}


pytestmark = pytest.mark.usefixtures("one_thread")


@cache
def fresh(name: str) -> nn.Module:
    return create_backbone(name, 7, weights="none").model


def network(name: str, gain: float = 100.0) -> nn.Module:
    """A random network of 7 classes; `gain` makes the classifier's small start as large as that of a trained one."""
    model = copy.deepcopy(fresh(name))
    with torch.no_grad():
        model.get_classifier().weight.mul_(gain)
        model.get_classifier().bias.normal_(generator=torch.Generator().manual_seed(1))
    return model


@pytest.fixture(scope="module")
def resnet() -> nn.Module:
    return network("resnet18")


def noise(n: int, size: int) -> Tensor:
    return torch.randn(n, 3, size, size, generator=torch.Generator().manual_seed(n))


def autograd_gradients(model: nn.Module, features: Tensor, targets: list[int]) -> Tensor:
    """The plain way: backward from each picture's logit to the features."""
    features = features.detach().clone().requires_grad_(True)
    logits = model.forward_head(features)
    return torch.autograd.grad(sum(logits[n, c] for n, c in enumerate(targets)), features)[0]


# ---------------------------------------------------------------- by hand

ACTIVATIONS = torch.tensor([[[[1.0, 2.0], [3.0, 4.0]], [[0.0, 1.0], [1.0, 0.0]]]], dtype=torch.float64)
GRADIENTS = torch.tensor([[[[0.5, -1.0], [0.0, 1.0]], [[2.0, -2.0], [1.0, 0.0]]]], dtype=torch.float64)


def test_gradcam_by_hand() -> None:
    weights = cam.gradcam_weights(ACTIVATIONS, GRADIENTS)
    # (0.5 - 1 + 0 + 1) / 4 and (2 - 2 + 1 + 0) / 4
    np.testing.assert_allclose(weights.numpy(), [[[[0.125]], [[0.25]]]], rtol=1e-15)
    np.testing.assert_allclose(cam.combine(ACTIVATIONS, weights).numpy(), [[[0.125, 0.5], [0.625, 0.5]]], rtol=1e-15)


def test_gradcam_plus_plus_by_hand() -> None:
    weights = cam.gradcam_plus_plus_weights(ACTIVATIONS, GRADIENTS)
    # first channel, sum(A) = 10: g = 0.5 gives 0.5 / (2 + 5), g = 1 gives 1 / (2 + 10), g = -1 and 0 give nothing
    # second channel, sum(A) = 2: g = 2 gives 2 / (2 + 4), g = 1 gives 1 / (2 + 2)
    first, second = 1 / 14 + 1 / 12, 1 / 3 + 1 / 4
    np.testing.assert_allclose(weights.numpy(), [[[[first]], [[second]]]], rtol=1e-15)
    expected = [[[13 / 84, 75 / 84], [88 / 84, 52 / 84]]]
    np.testing.assert_allclose(cam.combine(ACTIVATIONS, weights).numpy(), expected, rtol=1e-14)


def test_negative_weights_take_away_and_the_map_stops_at_zero() -> None:
    weights = torch.tensor([1.0, -2.0], dtype=torch.float64).reshape(1, 2, 1, 1)
    np.testing.assert_allclose(cam.combine(ACTIVATIONS, weights).numpy(), [[[1.0, 0.0], [1.0, 4.0]]])
    assert cam.combine(ACTIVATIONS, -weights.abs()).abs().max() == 0


def term_by_term(activations: np.ndarray, gradients: np.ndarray, epsilon: float = 0.0) -> np.ndarray:
    """Eq. 19 of arXiv:1710.11063 with the derivatives of exp(logit), and Eq. 5; epsilon as pytorch-grad-cam adds it."""
    weights = np.zeros(activations.shape[:2])
    for n, k in np.ndindex(*weights.shape):
        total = sum(float(a) for a in activations[n, k].flat)
        for g in (float(g) for g in gradients[n, k].flat):
            second, third = g**2, g**3
            denominator = 2 * second + total * third + epsilon
            alpha = second / denominator if denominator != 0 and g != 0 else 0.0
            weights[n, k] += alpha * max(g, 0.0)
    return weights


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


@pytest.mark.parametrize("method", cam.METHODS)
def test_gradients_of_zero_give_zeros_and_no_nan(method: str) -> None:
    activations = torch.rand(2, 3, 4, 4)
    maps = cam.combine(activations, cam.METHODS[method](activations, torch.zeros_like(activations)))
    assert maps.shape == (2, 4, 4)
    assert (maps == 0).all()


def test_scale_to_one_divides_by_each_maximum_and_leaves_zeros() -> None:
    maps = torch.tensor([[[0.0, 2.0], [1.0, 4.0]], [[0.0, 0.0], [0.0, 0.0]], [[1e-30, 0.0], [0.0, 5e-31]]])
    expected = [[[0, 0.5], [0.25, 1]], [[0, 0], [0, 0]], [[1, 0], [0, 0.5]]]
    np.testing.assert_allclose(cam.scale_to_one(maps).numpy(), expected, rtol=1e-6)


# ---------------------------------------------------------------- gradients of the head


@pytest.mark.parametrize("name", TARGET_LAYERS)
def test_closed_form_equals_autograd(name: str) -> None:
    model = network(name)
    features = cam.feature_maps(model, noise(3, SMALL[name])).detach().double()  # a double trunk would take 20 s
    model.double()
    targets = [6, 0, 3]
    logits, chosen, gradients = cam.head_gradients(model, features, torch.tensor(targets))
    assert cam.linear_head(model, features, logits) is not None  # the closed form is what ran
    assert chosen.tolist() == targets
    expected = autograd_gradients(model, features, targets)
    assert expected.abs().max() > 1e-3
    np.testing.assert_allclose(gradients.numpy(), expected.numpy(), rtol=1e-9, atol=1e-15)
    np.testing.assert_allclose(logits.numpy(), model.forward_head(features).detach().numpy(), rtol=1e-12)


@pytest.mark.parametrize("frozen", [False, True])
def test_a_head_with_a_norm_takes_autograd(frozen: bool) -> None:
    model = network("test_convnext", gain=30).requires_grad_(not frozen)
    features = cam.feature_maps(model, noise(2, 160)).detach().double()
    model.double()
    logits, _, gradients = cam.head_gradients(model, features, torch.tensor([4, 1]))
    assert cam.linear_head(model, features, logits) is None
    np.testing.assert_allclose(gradients.numpy(), autograd_gradients(model, features, [4, 1]).numpy(), rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("gain", [1e-7, 1e-3])
def test_a_head_with_a_norm_is_not_taken_for_linear_because_its_logits_are_small(gain: float) -> None:
    model = network("test_convnext", gain)
    features = cam.feature_maps(model, noise(2, 160)).detach()
    assert cam.linear_head(model, features, model.forward_head(features)) is None


def test_a_linear_head_with_small_or_no_weights_is_linear() -> None:
    for gain in (0.0, 1e-3):
        model = network("resnet18", gain)
        model.get_classifier().bias.data.zero_()
        features = cam.feature_maps(model, noise(2, 64)).detach()
        assert cam.linear_head(model, features, model.forward_head(features)) is not None


def test_max_pooling_takes_autograd() -> None:
    model = network("resnet18")
    model.global_pool.pool = nn.AdaptiveMaxPool2d(1)
    features = cam.feature_maps(model, noise(2, 96)).detach()
    _, _, gradients = cam.head_gradients(model, features, torch.tensor([1, 2]))
    np.testing.assert_allclose(gradients.numpy(), autograd_gradients(model, features, [1, 2]).numpy(), rtol=1e-6)
    assert ((gradients != 0).sum(dim=(2, 3)) == 1).all()  # one place a channel, not all of them


# ---------------------------------------------------------------- pytorch-grad-cam


def peer_maps(method: str, model: nn.Module, layer: nn.Module, pictures: Tensor, targets: list[int]) -> np.ndarray:
    """What pytorch-grad-cam computes before it resizes, (N, h, w) at least 0."""
    found: list[np.ndarray] = []
    with PEERS[method](model=model, target_layers=[layer]) as peer:
        whole = peer.get_cam_image

        def get_cam_image(*arguments: Any) -> np.ndarray:
            found.append(whole(*arguments))
            return found[-1]

        peer.get_cam_image = get_cam_image
        peer(input_tensor=pictures, targets=[ClassifierOutputTarget(c) for c in targets])
    return found[0].clip(min=0)


def assert_same_maps(found: np.ndarray, expected: np.ndarray, tolerance: float) -> None:
    """Equal up to `tolerance` of each map's maximum."""
    peaks = expected.max(axis=(1, 2), keepdims=True)
    assert (peaks > 0).all()
    np.testing.assert_allclose(found / peaks, expected / peaks, rtol=0, atol=tolerance)


@pytest.mark.parametrize("name", TARGET_LAYERS)
@pytest.mark.parametrize("method", PEERS)
def test_maps_equal_those_of_pytorch_grad_cam(name: str, method: str) -> None:
    # Gradients of size 1, since only there the peer's epsilon does not show (see below).
    model = network(name, gain=2e4 if method == "gradcam++" else 100)
    pictures = noise(2, 96)
    maps, _, chosen = cam.class_activation_maps(model, pictures, method)
    peer = peer_maps(method, model, model.get_submodule(TARGET_LAYERS[name]), pictures, chosen.tolist())
    assert maps.shape == peer.shape == (2, 3, 3)
    assert_same_maps(maps.numpy(), peer, 1e-4)


def test_epsilon_of_pytorch_grad_cam_is_what_makes_its_gradcam_plus_plus_differ() -> None:
    model, targets = network("resnet18", gain=10), [3, 0]  # weights of 0.1, as trained ones: squared gradients of 4e-6
    pictures = noise(2, 224)
    features = cam.feature_maps(model, pictures).detach()
    gradients = autograd_gradients(model, features, targets).double().numpy()
    assert 1e-7 < (gradients**2).mean() < 1e-5
    ours, _, _ = cam.class_activation_maps(model, pictures, "gradcam++", torch.tensor(targets))
    theirs = peer_maps("gradcam++", model, model.layer4, pictures, targets)
    activations = features.double().numpy()

    def reference(epsilon: float) -> np.ndarray:
        weights = term_by_term(activations, gradients, epsilon)
        return np.einsum("nk,nkhw->nhw", weights, activations).clip(min=0)

    assert_same_maps(ours.numpy(), reference(0.0), 1e-5)
    assert_same_maps(theirs, reference(1e-6), 1e-5)
    shrunk = theirs.max(axis=(1, 2)) / ours.numpy().max(axis=(1, 2))
    assert (shrunk < 0.95).all()  # the epsilon takes more than a twentieth of the map


# ---------------------------------------------------------------- whole maps


def test_map_is_the_weighted_sum_of_the_features(resnet: nn.Module) -> None:
    pictures = noise(2, 96)
    features = cam.feature_maps(resnet, pictures).detach().double().numpy()
    maps, logits, chosen = cam.class_activation_maps(resnet, pictures, "gradcam")
    weight = resnet.get_classifier().weight.detach().double().numpy()[chosen.numpy()] / 9
    expected = np.einsum("nk,nkhw->nhw", weight, features).clip(min=0)
    assert_same_maps(maps.numpy(), expected, 1e-5)
    assert chosen.tolist() == logits.argmax(dim=1).tolist()
    np.testing.assert_allclose(logits.numpy(), resnet(pictures).detach().numpy(), rtol=1e-4, atol=1e-5)


def test_sum_of_the_signed_map_is_the_logit_without_its_bias(resnet: nn.Module) -> None:
    features = cam.feature_maps(resnet, noise(2, 96)).detach()
    logits, chosen, gradients = cam.head_gradients(resnet, features, torch.tensor([2, 5]))
    signed = (cam.gradcam_weights(features, gradients) * features).sum(dim=(1, 2, 3))
    bias = resnet.get_classifier().bias.detach()[chosen]
    np.testing.assert_allclose((signed + bias).numpy(), logits.gather(1, chosen[:, None])[:, 0].numpy(), rtol=1e-4)


@pytest.mark.parametrize("method", cam.METHODS)
def test_each_picture_has_its_own_target(resnet: nn.Module, method: str) -> None:
    picture = noise(1, 96)
    together, _, chosen = cam.class_activation_maps(resnet, picture.expand(3, -1, -1, -1), method, torch.tensor([5, 2, 5]))
    assert chosen.tolist() == [5, 2, 5]
    alone, _, _ = cam.class_activation_maps(resnet, picture, method, torch.tensor([2]))
    assert_same_maps(together[1:2].numpy(), alone.numpy(), 1e-5)
    assert_same_maps(together[2:].numpy(), together[:1].numpy(), 1e-5)
    assert (cam.scale_to_one(together)[0] - cam.scale_to_one(together)[1]).abs().max() > 0.01


@pytest.mark.parametrize("name", ["resnet18", "test_convnext"])
def test_batch_of_one_equals_the_picture_in_a_batch(name: str) -> None:
    model, pictures, targets = network(name), noise(3, SMALL[name]), torch.tensor([1, 4, 2])
    together, logits, _ = cam.class_activation_maps(model, pictures, "gradcam++", targets)
    for n in range(3):
        alone, own_logits, _ = cam.class_activation_maps(model, pictures[n : n + 1], "gradcam++", targets[n : n + 1])
        assert_same_maps(alone.numpy(), together[n : n + 1].numpy(), 1e-4)
        np.testing.assert_allclose(own_logits[0].numpy(), logits[n].numpy(), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("name", ["resnet18", "test_convnext"])
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_works_inside_the_callers_no_grad_and_inference_mode(name: str, mode: Any) -> None:
    model, pictures = network(name), noise(2, SMALL[name])
    expected = cam.class_activation_maps(model, pictures, "gradcam++", torch.tensor([1, 4]))
    predicted = cam.class_activation_maps(model, pictures, "gradcam")
    with mode():
        found = cam.class_activation_maps(model, noise(2, SMALL[name]), "gradcam++", torch.tensor([1, 4]))
        unaimed = cam.class_activation_maps(model, noise(2, SMALL[name]), "gradcam")
        assert not torch.is_grad_enabled()
    for ours, theirs in zip((*found, *unaimed), (*expected, *predicted), strict=True):
        np.testing.assert_allclose(ours.numpy(), theirs.numpy(), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("name", ["resnet18", "test_convnext"])
def test_leaves_the_network_as_it_was(name: str) -> None:
    model = network(name)
    first = next(model.parameters())
    first.requires_grad_(False)
    list(model.modules())[-1].train()
    modes = [module.training for module in model.modules()]
    state = {key: value.clone() for key, value in model.state_dict().items()}
    cam.class_activation_maps(model, noise(2, SMALL[name]), "gradcam++")
    assert [module.training for module in model.modules()] == modes
    assert [p.requires_grad for p in model.parameters()] == [False] + [True] * (len(list(model.parameters())) - 1)
    assert all(p.grad is None for p in model.parameters())
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    assert not any(module._forward_hooks for module in model.modules())


# ---------------------------------------------------------------- layouts


def test_channels_last_network_gives_the_map_of_the_right_place() -> None:
    model = network("test_mambaout", gain=30)
    assert model.output_fmt == "NHWC"
    marked = torch.zeros(1, 5, 5, 64)
    marked[0, 1, 3] = 1
    assert cam.as_channels_first(model, marked)[0, :, 1, 3].sum() == 64
    pictures = noise(2, 160)
    features = cam.feature_maps(model, pictures).detach()
    gradients = autograd_gradients(model, features, [2, 6]).numpy()
    expected = np.einsum("nk,nhwk->nhw", gradients.mean(axis=(1, 2)), features.numpy()).clip(min=0)
    maps, _, _ = cam.class_activation_maps(model, pictures, "gradcam", torch.tensor([2, 6]))
    assert_same_maps(maps.numpy(), expected, 1e-5)


def test_averaged_patch_tokens_give_a_square_map_row_by_row() -> None:
    model = network("test_vit2", gain=30)
    prefix = model.num_prefix_tokens
    assert prefix == 1
    tokens = torch.zeros(1, prefix + 100, 64)
    tokens[0, prefix + 3 * 10 + 7] = 1  # third row, seventh column of 10 x 10
    assert cam.as_channels_first(model, tokens)[0, :, 3, 7].sum() == 64
    maps, _, _ = cam.class_activation_maps(model, noise(1, 160), "gradcam")
    assert maps.shape == (1, 10, 10)
    assert math.isfinite(maps.sum().item())
    assert maps.max() > 0


def test_class_token_has_no_map() -> None:
    with pytest.raises(BackboneError, match=r"no heatmaps for VisionTransformer.*use a convolutional backbone"):
        cam.class_activation_maps(network("test_vit"), noise(1, 160), "gradcam")


# ---------------------------------------------------------------- all classes at once


@pytest.mark.parametrize("name", ["resnet18", "efficientnet_lite0", "test_convnext"])
@pytest.mark.parametrize("method", cam.METHODS)
def test_all_class_maps_are_the_single_ones(name: str, method: str) -> None:
    model = network(name, gain=10)
    features = cam.feature_maps(model, noise(2, SMALL.get(name, 96))).detach()
    together, logits = cam.all_class_maps(model, features, method)
    classes = logits.shape[1]
    assert together.shape[:2] == (2, classes)
    assert together.max() > 0
    for target in range(classes):
        alone, own, _ = cam.maps_of_features(model, features, method, torch.tensor([target, target]))
        # Not each by its own maximum: among all classes some have no positive evidence, and a map of zeros.
        np.testing.assert_allclose(together[:, target].numpy(), alone.numpy(), rtol=1e-4, atol=1e-5 * together.max().item())
        np.testing.assert_allclose(own.numpy(), logits.numpy(), rtol=1e-5, atol=1e-6)


def test_all_class_weights_of_gradcam_plus_plus_by_hand() -> None:
    # One picture, two channels with sum(A) = 4 and 0 over 4 places; W = 2, -1 for class 0 and 0, 4 for class 1.
    weight, sums = torch.tensor([[2.0, -1.0], [0.0, 4.0]]), torch.tensor([[4.0, 0.0]])
    # relu(W) / (2 + sum(A) W / 4): 2 / (2 + 2) = 0.5, 0; 0, 4 / 2 = 2.
    assert cam.gradcam_plus_plus_all_weights(weight, sums, 4).tolist() == [[[0.5, 0.0], [0.0, 2.0]]]


def test_all_class_weights_survive_a_vanishing_denominator() -> None:
    # sum(A) = -4 over 4 places and W = 2: 2 - 2 = 0, where alpha is 0 by definition.
    found = cam.gradcam_plus_plus_all_weights(torch.tensor([[2.0], [1.0]]), torch.tensor([[-4.0]]), 4)
    assert found.tolist() == [[[0.0], [1.0]]]
