"""Test heatmaps against autograd, closed forms and pytorch-grad-cam."""

from __future__ import annotations

import copy
import gc
import math
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
import torchcam.methods
from captum.attr import LayerGradCam
from pytorch_grad_cam import AblationCAM, EigenCAM, GradCAM, GradCAMPlusPlus, HiResCAM, LayerCAM, ScoreCAM, XGradCAM
from pytorch_grad_cam.utils.model_targets import ClassifierOutputTarget
from torch import Tensor, nn

from seewhy.errors import BackboneError, ConfigError
from seewhy.explain import attribution, cam
from seewhy.models.backbones import create_backbone
from tests.plain_cam import term_by_term

TARGET_LAYERS = {"resnet18": "layer4", "efficientnet_lite0": "bn2"}
SMALL = {"resnet18": 96, "efficientnet_lite0": 96, "test_convnext": 160, "test_mambaout": 160, "test_vit": 160, "test_vit2": 160}
PEERS = {
    "gradcam": GradCAM,
    "gradcam++": GradCAMPlusPlus,
    "hirescam": HiResCAM,
    "xgradcam": XGradCAM,
    "layercam": LayerCAM,
}
OF_A_CLASS = sorted(set(cam.METHODS) - {"eigencam"})


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
    """Reference: backward from each image's logit to the features."""
    features = features.detach().clone().requires_grad_(True)
    logits = model.forward_head(features)
    return torch.autograd.grad(sum(logits[n, c] for n, c in enumerate(targets)), features)[0]


# ---------------------------------------------------------------- gradients of the head


@pytest.mark.parametrize("name", TARGET_LAYERS)
def test_closed_form_equals_autograd(name: str) -> None:
    model = network(name)
    features = attribution.feature_maps(model, noise(3, SMALL[name])).detach().double()  # a double trunk would take 20 s
    model.double()
    targets = [6, 0, 3]
    logits, chosen, gradients = attribution.head_gradients(model, features, torch.tensor(targets))
    assert attribution.linear_head(model, features, logits) is not None  # the closed form is what ran
    assert chosen.tolist() == targets
    expected = autograd_gradients(model, features, targets)
    assert expected.abs().max() > 1e-3
    np.testing.assert_allclose(gradients.numpy(), expected.numpy(), rtol=1e-9, atol=1e-15)
    np.testing.assert_allclose(logits.numpy(), model.forward_head(features).detach().numpy(), rtol=1e-12)


@pytest.mark.parametrize("frozen", [False, True])
def test_a_head_with_a_norm_takes_autograd(frozen: bool) -> None:
    model = network("test_convnext", gain=30).requires_grad_(not frozen)
    features = attribution.feature_maps(model, noise(2, 160)).detach().double()
    model.double()
    logits, _, gradients = attribution.head_gradients(model, features, torch.tensor([4, 1]))
    assert attribution.linear_head(model, features, logits) is None
    np.testing.assert_allclose(gradients.numpy(), autograd_gradients(model, features, [4, 1]).numpy(), rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("gain", [1e-7, 1e-3])
def test_a_head_with_a_norm_is_not_taken_for_linear_because_its_logits_are_small(gain: float) -> None:
    model = network("test_convnext", gain)
    features = attribution.feature_maps(model, noise(2, 160)).detach()
    assert attribution.linear_head(model, features, model.forward_head(features)) is None


def test_a_linear_head_with_small_or_no_weights_is_linear() -> None:
    for gain in (0.0, 1e-3):
        model = network("resnet18", gain)
        model.get_classifier().bias.data.zero_()
        features = attribution.feature_maps(model, noise(2, 64)).detach()
        assert attribution.linear_head(model, features, model.forward_head(features)) is not None


def test_max_pooling_takes_autograd() -> None:
    model = network("resnet18")
    model.global_pool.pool = nn.AdaptiveMaxPool2d(1)
    features = attribution.feature_maps(model, noise(2, 96)).detach()
    _, _, gradients = attribution.head_gradients(model, features, torch.tensor([1, 2]))
    np.testing.assert_allclose(gradients.numpy(), autograd_gradients(model, features, [1, 2]).numpy(), rtol=1e-6)
    assert ((gradients != 0).sum(dim=(2, 3)) == 1).all()  # one place a channel, not all of them


# ---------------------------------------------------------------- pytorch-grad-cam


def peer_maps(method: str, model: nn.Module, layer: nn.Module, images: Tensor, targets: list[int], transform: Any = None) -> np.ndarray:
    """What pytorch-grad-cam computes before it resizes, (N, h, w) at least 0."""
    found: list[np.ndarray] = []
    with PEERS[method](model=model, target_layers=[layer], reshape_transform=transform) as peer:
        whole = peer.get_cam_image

        def get_cam_image(*arguments: Any) -> np.ndarray:
            found.append(whole(*arguments))
            return found[-1]

        peer.get_cam_image = get_cam_image
        peer(input_tensor=images, targets=[ClassifierOutputTarget(c) for c in targets])
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
    images = noise(2, 96)
    maps, _, chosen = attribution.class_activation_maps(model, images, method)
    peer = peer_maps(method, model, model.get_submodule(TARGET_LAYERS[name]), images, chosen.tolist())
    assert maps.shape == peer.shape == (2, 3, 3)
    assert_same_maps(maps.numpy(), peer, 1e-4)


def test_epsilon_of_pytorch_grad_cam_is_what_makes_its_gradcam_plus_plus_differ() -> None:
    model, targets = network("resnet18", gain=10), [3, 0]  # weights of 0.1, as trained ones: squared gradients of 4e-6
    images = noise(2, 224)
    features = attribution.feature_maps(model, images).detach()
    gradients = autograd_gradients(model, features, targets).double().numpy()
    assert 1e-7 < (gradients**2).mean() < 1e-5
    computed, _, _ = attribution.class_activation_maps(model, images, "gradcam++", torch.tensor(targets))
    reference = peer_maps("gradcam++", model, model.layer4, images, targets)
    activations = features.double().numpy()

    def with_epsilon(epsilon: float) -> np.ndarray:
        weights = term_by_term(activations, gradients, epsilon)
        return np.einsum("nk,nkhw->nhw", weights, activations).clip(min=0)

    assert_same_maps(computed.numpy(), with_epsilon(0.0), 1e-5)
    assert_same_maps(reference, with_epsilon(1e-6), 1e-5)
    shrunk = reference.max(axis=(1, 2)) / computed.numpy().max(axis=(1, 2))
    assert (shrunk < 0.95).all()  # the epsilon takes more than a twentieth of the map


# ---------------------------------------------------------------- torch-cam and captum

PLACES = [("resnet18", "layer4"), ("resnet18", "layer3"), ("efficientnet_lite0", "bn2"), ("test_convnext", "stages.2")]
TORCHCAM = {"gradcam": "GradCAM", "xgradcam": "XGradCAM", "layercam": "LayerCAM"}


def torchcam_maps(name: str, model: nn.Module, layer: str, images: Tensor, targets: list[int]) -> Tensor:
    with getattr(torchcam.methods, name)(model, target_layer=layer) as extractor:
        maps: Tensor = extractor(targets, model(images), normalized=False)[0]
    return maps.detach().clamp(min=0)


@pytest.mark.parametrize(("name", "layer"), PLACES)
@pytest.mark.parametrize("method", [*TORCHCAM, "captum"])
def test_maps_equal_those_of_torch_cam_and_captum(name: str, layer: str, method: str) -> None:
    model, images, targets = network(name), noise(2, SMALL[name]), [3, 5]
    computed, _, _ = attribution.class_activation_maps(
        model, images, "gradcam" if method == "captum" else method, torch.tensor(targets), layers=[layer]
    )
    if method == "captum":
        peer = LayerGradCam(model, model.get_submodule(layer))
        reference = peer.attribute(images, target=torch.tensor(targets), relu_attributions=True)[:, 0].detach()
    else:
        reference = torchcam_maps(TORCHCAM[method], model, layer, images, targets)
    assert reference.max() > 0
    torch.testing.assert_close(computed, reference, rtol=1e-4, atol=1e-5 * reference.max().item())
    # And enlarged to the image.
    large = [nn.functional.interpolate(maps[:, None], SMALL[name], mode="bilinear", align_corners=False) for maps in (computed, reference)]
    torch.testing.assert_close(*large, rtol=1e-4, atol=1e-5 * reference.max().item())


def test_gradcam_plus_plus_of_torch_cam_never_divides() -> None:
    """Its alpha is g^2 instead of Eq. 19: it divides a copy (`alpha[idx][mask].div_`), as version 0.5.0 still does."""
    model, images, targets = network("resnet18", gain=2e4), noise(2, 96), [3, 5]
    _, _, pairs = attribution.layer_gradients(model, images, ["layer4"], torch.tensor(targets))
    activations, gradients = pairs[0]
    undivided = cam.weighted_map(activations, (gradients**2 * gradients.clamp(min=0)).sum(dim=(2, 3), keepdim=True))
    reference = torchcam_maps("GradCAMpp", model, "layer4", images, targets)
    torch.testing.assert_close(reference, undivided, rtol=1e-3, atol=1e-4 * undivided.max().item())
    computed, _, _ = attribution.class_activation_maps(model, images, "gradcam++", torch.tensor(targets))
    assert (cam.scale_to_one(computed) - cam.scale_to_one(reference)).abs().max() > 0.1


# ---------------------------------------------------------------- whole maps


def test_map_is_the_weighted_sum_of_the_features(resnet: nn.Module) -> None:
    images = noise(2, 96)
    features = attribution.feature_maps(resnet, images).detach().double().numpy()
    maps, logits, chosen = attribution.class_activation_maps(resnet, images, "gradcam")
    weight = resnet.get_classifier().weight.detach().double().numpy()[chosen.numpy()] / 9
    expected = np.einsum("nk,nkhw->nhw", weight, features).clip(min=0)
    assert_same_maps(maps.numpy(), expected, 1e-5)
    assert chosen.tolist() == logits.argmax(dim=1).tolist()
    np.testing.assert_allclose(logits.numpy(), resnet(images).detach().numpy(), rtol=1e-4, atol=1e-5)


def test_sum_of_the_signed_map_is_the_logit_without_its_bias(resnet: nn.Module) -> None:
    features = attribution.feature_maps(resnet, noise(2, 96)).detach()
    logits, chosen, gradients = attribution.head_gradients(resnet, features, torch.tensor([2, 5]))
    signed = (cam.gradcam_weights(features, gradients) * features).sum(dim=(1, 2, 3))
    bias = resnet.get_classifier().bias.detach()[chosen]
    np.testing.assert_allclose((signed + bias).numpy(), logits.gather(1, chosen[:, None])[:, 0].numpy(), rtol=1e-4)


@pytest.mark.parametrize("method", OF_A_CLASS)
def test_each_image_has_its_own_target(resnet: nn.Module, method: str) -> None:
    image = noise(1, 96)
    together, _, chosen = attribution.class_activation_maps(resnet, image.expand(3, -1, -1, -1), method, torch.tensor([5, 2, 5]))
    assert chosen.tolist() == [5, 2, 5]
    alone, _, _ = attribution.class_activation_maps(resnet, image, method, torch.tensor([2]))
    assert_same_maps(together[1:2].numpy(), alone.numpy(), 1e-5)
    assert_same_maps(together[2:].numpy(), together[:1].numpy(), 1e-5)
    assert (cam.scale_to_one(together)[0] - cam.scale_to_one(together)[1]).abs().max() > 0.01


@pytest.mark.parametrize("name", ["resnet18", "test_convnext"])
def test_batch_of_one_equals_the_image_in_a_batch(name: str) -> None:
    model, images, targets = network(name), noise(3, SMALL[name]), torch.tensor([1, 4, 2])
    together, logits, _ = attribution.class_activation_maps(model, images, "gradcam++", targets)
    for n in range(3):
        alone, own_logits, _ = attribution.class_activation_maps(model, images[n : n + 1], "gradcam++", targets[n : n + 1])
        assert_same_maps(alone.numpy(), together[n : n + 1].numpy(), 1e-4)
        np.testing.assert_allclose(own_logits[0].numpy(), logits[n].numpy(), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("name", ["resnet18", "test_convnext"])
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_works_inside_the_callers_no_grad_and_inference_mode(name: str, mode: Any) -> None:
    model, images = network(name), noise(2, SMALL[name])
    expected = attribution.class_activation_maps(model, images, "gradcam++", torch.tensor([1, 4]))
    predicted = attribution.class_activation_maps(model, images, "gradcam")
    with mode():
        found = attribution.class_activation_maps(model, noise(2, SMALL[name]), "gradcam++", torch.tensor([1, 4]))
        unaimed = attribution.class_activation_maps(model, noise(2, SMALL[name]), "gradcam")
        assert not torch.is_grad_enabled()
    for computed, reference in zip((*found, *unaimed), (*expected, *predicted), strict=True):
        np.testing.assert_allclose(computed.numpy(), reference.numpy(), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("name", ["resnet18", "test_convnext"])
def test_leaves_the_network_as_it_was(name: str) -> None:
    model = network(name)
    first = next(model.parameters())
    first.requires_grad_(False)
    list(model.modules())[-1].train()
    modes = [module.training for module in model.modules()]
    state = {key: value.clone() for key, value in model.state_dict().items()}
    attribution.class_activation_maps(model, noise(2, SMALL[name]), "gradcam++")
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
    assert attribution.as_channels_first(model, marked)[0, :, 1, 3].sum() == 64
    images = noise(2, 160)
    features = attribution.feature_maps(model, images).detach()
    gradients = autograd_gradients(model, features, [2, 6]).numpy()
    expected = np.einsum("nk,nhwk->nhw", gradients.mean(axis=(1, 2)), features.numpy()).clip(min=0)
    maps, _, _ = attribution.class_activation_maps(model, images, "gradcam", torch.tensor([2, 6]))
    assert_same_maps(maps.numpy(), expected, 1e-5)


def test_averaged_patch_tokens_give_a_square_map_row_by_row() -> None:
    model = network("test_vit2", gain=30)
    prefix = model.num_prefix_tokens
    assert prefix == 1
    tokens = torch.zeros(1, prefix + 100, 64)
    tokens[0, prefix + 3 * 10 + 7] = 1  # third row, seventh column of 10 x 10
    assert attribution.as_channels_first(model, tokens)[0, :, 3, 7].sum() == 64
    maps, _, _ = attribution.class_activation_maps(model, noise(1, 160), "gradcam")
    assert maps.shape == (1, 10, 10)
    assert math.isfinite(maps.sum().item())
    assert maps.max() > 0


def test_class_token_is_explained_at_the_last_blocks_first_norm() -> None:
    model, images = network("test_vit", gain=30), noise(2, 160)
    maps, logits, chosen = attribution.class_activation_maps(model, images, "gradcam")
    again, _, _ = attribution.class_activation_maps(model, images, "gradcam", layers=["blocks.5.norm1"])
    assert torch.equal(maps, again)
    assert maps.shape == (2, 10, 10)
    assert maps.max() > 0
    peer = peer_maps("gradcam", model, model.blocks[-1].norm1, images, chosen.tolist(), transform=lambda x: square_tokens(x, 1))
    assert_same_maps(maps.numpy(), peer, 1e-4)
    np.testing.assert_allclose(logits.numpy(), model(images).detach().numpy(), rtol=1e-4, atol=1e-5)


def square_tokens(tokens: Tensor, prefix: int) -> Tensor:
    side = math.isqrt(tokens.shape[1] - prefix)
    return tokens[:, prefix:].reshape(len(tokens), side, side, -1).permute(0, 3, 1, 2)


def test_vectors_are_no_map() -> None:
    with pytest.raises(BackboneError, match=r"no heatmaps for ResNet: \(7,\) is no map"):
        attribution.as_channels_first(network("resnet18"), torch.zeros(1, 7))


# ---------------------------------------------------------------- all classes at once


@pytest.mark.parametrize("name", ["resnet18", "efficientnet_lite0"])
def test_gradcam_of_all_classes_is_the_single_ones(name: str) -> None:
    model = network(name, gain=10)
    with torch.no_grad():
        features = attribution.feature_maps(model, noise(2, SMALL.get(name, 96)))
        weight = attribution.linear_head(model, features, model.forward_head(features))
    together = cam.gradcam_all_classes(weight.detach(), features)
    assert together.shape[:2] == (2, 7)
    assert together.max() > 0
    for target in range(7):
        alone, _, _ = attribution.maps_from_features(model, features, "gradcam", torch.tensor([target, target]))
        # Not each by its own maximum: among all classes some have no positive evidence, and a map of zeros.
        np.testing.assert_allclose(together[:, target].numpy(), alone.numpy(), rtol=1e-4, atol=1e-5 * together.max().item())


# ---------------------------------------------------------------- any layer

LAYERS = {
    "resnet18": ("layer3", "layer2.0"),
    "efficientnet_lite0": ("blocks.4", "blocks.6.0.conv_pwl"),
    "test_convnext": ("stages.2", "stages.3.blocks.0"),
}


@pytest.mark.parametrize(("name", "layer"), [(name, layer) for name, layers in LAYERS.items() for layer in layers])
@pytest.mark.parametrize("method", PEERS)
def test_maps_of_named_layers_equal_those_of_pytorch_grad_cam(name: str, layer: str, method: str) -> None:
    model = network(name, gain=2e4 if method == "gradcam++" else 100)
    images = noise(2, SMALL[name])
    maps, logits, chosen = attribution.class_activation_maps(model, images, method, torch.tensor([3, 5]), layers=[layer])
    assert chosen.tolist() == [3, 5]
    peer = peer_maps(method, model, model.get_submodule(layer), images, [3, 5])
    assert peer.max() > 0  # one of the two may have no positive evidence
    np.testing.assert_allclose(maps.numpy(), peer, rtol=0, atol=1e-3 * peer.max())
    np.testing.assert_allclose(logits.numpy(), model(images).detach().numpy(), rtol=1e-3, atol=1e-4 * logits.abs().max().item())


def test_a_layer_whose_output_the_network_overwrites() -> None:
    """ResNet adds the shortcut to bn2's output in place; a plain hook (as pytorch-grad-cam's) then holds the sum and not the layer."""
    model, images, kept = network("resnet18"), noise(2, 96), []
    nn.init.normal_(model.layer4[1].bn2.weight)  # timm starts it at 0
    handle = model.layer4[1].bn2.register_forward_hook(lambda module, inputs, output: kept.append(output.detach().clone()))
    model(images)
    handle.remove()
    _, chosen, pairs = attribution.layer_gradients(model, images, ["layer4.1.bn2"], torch.tensor([3, 5]))
    activations, gradients = pairs[0]
    torch.testing.assert_close(activations, kept[0], rtol=1e-4, atol=1e-4)
    assert (activations < 0).any()  # not what stands behind the ReLU
    relu_open = attribution.feature_maps(model, images) > 0
    weight = model.get_classifier().weight.detach()[chosen] / 9
    torch.testing.assert_close(gradients, weight[:, :, None, None] * relu_open, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("method", cam.METHODS)
def test_the_last_layer_by_name_is_the_default(method: str) -> None:
    model, images = network("resnet18"), noise(2, 96)
    computed, _, _ = attribution.class_activation_maps(model, images, method, torch.tensor([1, 2]))
    named, _, _ = attribution.class_activation_maps(model, images, method, torch.tensor([1, 2]), layers=["layer4"])
    assert_same_maps(named.numpy(), computed.numpy(), 1e-4)


def test_several_layers_are_fused() -> None:
    model, images = network("resnet18"), noise(2, 96)
    each = [attribution.class_activation_maps(model, images, "layercam", layers=[layer])[0] for layer in ("layer3", "layer4")]
    both, _, _ = attribution.class_activation_maps(model, images, "layercam", layers=["layer4", "layer3"])
    assert both.shape == (2, 6, 6)
    torch.testing.assert_close(both, cam.fuse(each), rtol=1e-4, atol=1e-5)


def test_eigencam_of_pytorch_grad_cam_is_centred_and_ours_is_the_papers() -> None:
    model, images = network("resnet18"), noise(2, 96)
    features = attribution.feature_maps(model, images).detach()
    computed, _, _ = attribution.class_activation_maps(model, images, "eigencam")
    with EigenCAM(model=model, target_layers=[model.layer4]) as peer:
        reference = peer.get_cam_image(images, model.layer4, [], features.numpy(), None, False)
    for n in range(2):
        places = features[n].flatten(1).T.double().numpy()
        for found, rows in ((computed[n].numpy().ravel(), places), (np.abs(reference[n]).ravel(), places - places.mean(axis=0))):
            expected = rows @ np.linalg.svd(rows, full_matrices=False)[2][0]
            np.testing.assert_allclose(np.abs(found), np.abs(expected), rtol=1e-3, atol=1e-4 * np.abs(expected).max())
    assert (computed > 0).float().mean() > 0.99  # features behind a ReLU point one way


@pytest.mark.parametrize("name", ["resnet18", "test_convnext"])
def test_contrast_is_the_difference_of_two_signed_maps(name: str) -> None:
    model, features = network(name), None
    features = attribution.feature_maps(model, noise(2, SMALL[name])).detach()
    one, other = torch.tensor([1, 4]), torch.tensor([3, 0])
    _, _, gradients = attribution.head_gradients(model, features, one, other)
    expected = autograd_gradients(model, features, [1, 4]) - autograd_gradients(model, features, [3, 0])
    np.testing.assert_allclose(gradients.numpy(), expected.numpy(), rtol=1e-4, atol=1e-5 * expected.abs().max().item())
    maps, _, _ = attribution.class_activation_maps(model, noise(2, SMALL[name]), "gradcam", one, other)
    signed = (features * cam.gradcam_weights(features, expected)).sum(dim=1)
    assert_same_maps(maps.numpy(), signed.clamp(min=0).numpy(), 1e-4)
    if name == "resnet18":
        named, _, _ = attribution.class_activation_maps(model, noise(2, 96), "gradcam", one, other, layers=["layer4"])
        assert_same_maps(named.numpy(), maps.numpy(), 1e-4)


def test_a_class_held_against_itself_has_no_evidence() -> None:
    maps, _, _ = attribution.class_activation_maps(network("resnet18"), noise(1, 96), "gradcam", torch.tensor([2]), torch.tensor([2]))
    assert (maps == 0).all()


def test_unknown_layer_is_refused_with_its_neighbours() -> None:
    with pytest.raises(ConfigError, match=r"unknown layer 'layr4' of ResNet; did you mean layer4"):
        attribution.class_activation_maps(network("resnet18"), noise(1, 64), "gradcam", layers=["layr4"])


def test_a_layer_that_takes_no_part_is_refused_and_hooks_are_removed() -> None:
    model = network("resnet18")
    model.spare = nn.ReLU()
    with pytest.raises(BackboneError, match="layer spare is not used"):
        attribution.class_activation_maps(model, noise(1, 64), "gradcam", layers=["spare"])
    assert not any(module._forward_hooks for module in model.modules())
    assert torch.is_grad_enabled()


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_named_layers_work_inside_the_callers_mode_and_leave_it(mode: Any) -> None:
    model = network("resnet18")
    expected, _, _ = attribution.class_activation_maps(model, noise(2, 96), "gradcam", layers=["layer3"])
    with mode():
        found, _, _ = attribution.class_activation_maps(model, noise(2, 96), "gradcam", layers=["layer3"])
        assert not torch.is_grad_enabled()
    assert torch.is_grad_enabled()
    torch.testing.assert_close(found, expected)
    assert all(p.grad is None for p in model.parameters())


# ---------------------------------------------------------------- edges


@pytest.mark.parametrize("method", cam.METHODS)
def test_a_image_of_nan_has_a_map_of_zeros_and_does_not_touch_the_others(method: str) -> None:
    model, images = network("resnet18"), noise(3, 96)
    expected, _, _ = attribution.class_activation_maps(model, images, method, torch.tensor([1, 2, 3]))
    images[1, 0, 5, 5] = float("nan")
    found, _, _ = attribution.class_activation_maps(model, images, method, torch.tensor([1, 2, 3]))
    assert (found[1] == 0).all()
    assert expected[[0, 2]].max() > 0
    torch.testing.assert_close(found[[0, 2]], expected[[0, 2]], rtol=1e-3, atol=1e-4 * expected[[0, 2]].max().item())


@pytest.mark.parametrize("method", cam.METHODS)
def test_a_feature_map_of_one_place(method: str) -> None:
    model = network("resnet18")
    maps, _, _ = attribution.class_activation_maps(model, noise(2, 32), method, torch.tensor([0, 1]))
    assert maps.shape == (2, 1, 1)
    assert maps.isfinite().all()


def test_a_thousand_calls_leave_no_memory_behind() -> None:
    model, images = network("resnet18"), noise(1, 32)

    def calls(n: int) -> int:
        for _ in range(n):
            attribution.class_activation_maps(model, images, "gradcam++", layers=["layer4"])
        gc.collect()
        return sum(1 for item in gc.get_objects() if isinstance(item, Tensor))

    before = calls(3)
    assert calls(1000) <= before


# ---------------------------------------------------------------- methods that ask again


def test_ablation_of_a_linear_head_is_its_closed_form() -> None:
    model, images, targets = network("resnet18"), noise(2, 64), torch.tensor([3, 5])
    maps, logits, _ = attribution.class_activation_maps(model, images, "ablationcam", targets)
    features = attribution.feature_maps(model, images).detach()
    # Without channel k the logit is lower by W_k mean(A_k).
    lost = model.get_classifier().weight.detach()[targets] * features.mean(dim=(2, 3)) / logits.gather(1, targets[:, None])
    expected = cam.weighted_map(features, lost[:, :, None, None])
    torch.testing.assert_close(maps, expected, rtol=1e-3, atol=1e-4 * expected.max().item())
    named, _, _ = attribution.class_activation_maps(model, images[:, :, ::2, ::2], "ablationcam", targets, layers=["layer4"])
    default, _, _ = attribution.class_activation_maps(model, images[:, :, ::2, ::2], "ablationcam", targets)
    torch.testing.assert_close(named, default, rtol=1e-3, atol=1e-4 * default.max().item())


@pytest.mark.parametrize(("name", "peer"), [("ablationcam", AblationCAM), ("scorecam", ScoreCAM)])
def test_asking_methods_equal_those_of_pytorch_grad_cam(name: str, peer: Any) -> None:
    model, images, targets = network("test_resnet", gain=30), noise(2, 96), [3, 5]
    layer = model.layer4
    computed, _, _ = attribution.class_activation_maps(model, images, name, torch.tensor(targets))
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(PEERS, name, peer)
        # Their enlargement of a mask puts corners on corners, ours pixels on pixels.
        patch.setattr(nn, "UpsamplingBilinear2d", lambda size: nn.Upsample(size, mode="bilinear", align_corners=False))
        reference = peer_maps(name, model, layer, images, targets)
    assert reference.max() > 0
    np.testing.assert_allclose(computed.numpy(), reference, rtol=0, atol=2e-3 * reference.max())


@pytest.mark.parametrize("method", cam.PERTURBATION_METHODS)
@pytest.mark.parametrize("name", ["test_mambaout", "test_vit"])
def test_asking_methods_in_other_layouts(name: str, method: str) -> None:
    model = network(name, gain=30)
    maps, logits, chosen = attribution.class_activation_maps(model, noise(1, 160), method)
    assert maps.shape == ((1, 5, 5) if name == "test_mambaout" else (1, 10, 10))
    assert maps.isfinite().all()
    assert chosen.item() == logits.argmax().item()
    assert not any(module._forward_hooks for module in model.modules())


# ---------------------------------------------------------------- moved copies


def test_the_mean_over_moved_copies_finds_a_place_between_cells() -> None:
    """A network whose 7 x 7 cells each count their bright pixels: alone it says which cell, moved copies say where."""

    class Cells(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.classifier = nn.Linear(3, 2)
            nn.init.ones_(self.classifier.weight)

        def get_classifier(self) -> nn.Linear:
            return self.classifier

        def forward_features(self, images: Tensor) -> Tensor:
            return nn.functional.avg_pool2d(images, 8)

        def forward_head(self, features: Tensor) -> Tensor:
            return self.classifier(features.mean(dim=(2, 3)))

        def forward(self, images: Tensor) -> Tensor:
            return self.forward_head(self.forward_features(images))

    images = torch.zeros(1, 3, 56, 56)
    images[:, :, 24:32, 28:36] = 1.0  # centred at (28, 32), on the corner of cells: their centres are at 4, 12, 20, 28, 36
    model, targets = Cells(), torch.tensor([1])
    single, _, _ = attribution.smoothed_maps(model, images, "gradcam", targets)
    assert single.shape == (1, 7, 7)
    fine, logits, chosen = attribution.smoothed_maps(model, images, "gradcam", targets, smooth=4)
    assert fine.shape == (1, 56, 56)
    assert chosen.tolist() == [1]
    torch.testing.assert_close(logits, model(images))
    places = torch.stack(torch.meshgrid(torch.arange(56), torch.arange(56), indexing="ij")).float()
    centre = (places * fine[0]).sum(dim=(1, 2)) / fine[0].sum()
    np.testing.assert_allclose(centre.numpy(), [27.5, 31.5], atol=0.6)
    assert 0 <= fine.min() <= fine.max() <= 1


# ---------------------------------------------------------------- pixels, by captum


class BrightCorner(nn.Module):
    """Two classes: the sums of the upper left and of the lower right quarter, times a weight a colour."""

    def forward(self, images: Tensor) -> Tensor:
        seen = images * torch.tensor([1.0, 2.0, -1.0])[:, None, None]
        half = images.shape[-1] // 2
        return torch.stack([seen[..., :half, :half].sum(dim=(1, 2, 3)), seen[..., half:, half:].sum(dim=(1, 2, 3))], dim=1)


def test_integrated_gradients_of_a_linear_network_are_weight_times_image() -> None:
    images = torch.rand(3, 3, 28, 28, generator=torch.Generator().manual_seed(0)) - 0.3
    targets = torch.tensor([0, 1, 0])
    maps, _, chosen = attribution.class_activation_maps(BrightCorner(), images, "integrated_gradients", targets)
    expected = (images * torch.tensor([1.0, 2.0, -1.0])[:, None, None]).sum(dim=1)
    inside = torch.zeros(3, 28, 28)
    inside[0, :14, :14] = inside[2, :14, :14] = inside[1, 14:, 14:] = 1
    torch.testing.assert_close(maps, (expected * inside).clamp(min=0), atol=1e-5, rtol=1e-5)
    assert chosen.tolist() == targets.tolist()
    # Held against the other class, the other quarter counts with its sign turned.
    maps, _, _ = attribution.class_activation_maps(BrightCorner(), images, "integrated_gradients", targets, 1 - targets)
    outside = torch.stack([inside[n].flip(0, 1) for n in range(3)])
    torch.testing.assert_close(maps, (expected * (inside - outside)).clamp(min=0), atol=1e-5, rtol=1e-5)


def test_occlusion_of_a_linear_network_is_what_the_windows_hold() -> None:
    images = torch.zeros(2, 3, 28, 28)
    images[0, 1, 3, 3] = 1.0  # worth 2 to class 0, in whichever window covers it
    maps, _, chosen = attribution.class_activation_maps(BrightCorner(), images, "occlusion", torch.tensor([0, 0]))
    assert maps[1].max() == 0
    assert maps[0, 3, 3] == pytest.approx(6)  # the mean over windows that cover it, 2, for each of the three colours
    assert maps[0, 14:, 14:].max() == 0
    assert chosen.tolist() == [0, 0]


@pytest.mark.parametrize("method", cam.PIXEL_METHODS)
def test_pixel_methods_leave_the_network_as_it_was(method: str) -> None:
    model, images = network("test_resnet", gain=30).requires_grad_(False), noise(2, 64)
    with torch.inference_mode():
        maps, logits, chosen = attribution.class_activation_maps(model, images, method)
        assert not torch.is_grad_enabled()
    assert maps.shape == (2, 64, 64)
    assert maps.min() >= 0
    assert maps.max() > 0
    assert torch.equal(chosen, logits.argmax(dim=1))
    assert not any(p.requires_grad or p.grad is not None for p in model.parameters())
    with pytest.raises(ConfigError, match="explains pixels, not a layer"):
        attribution.class_activation_maps(model, images, method, layers=["layer4"])


# ---------------------------------------------------------------- the large ones of the parity table


@pytest.mark.parametrize(
    ("name", "layer", "method"), [("convnext_tiny", "stages.3", m) for m in ("gradcam", "hirescam", "xgradcam", "layercam")]
)
def test_convnext_tiny_equals_pytorch_grad_cam_and_captum(name: str, layer: str, method: str) -> None:
    model, images, targets = network(name), noise(1, 64), [3]
    computed, _, _ = attribution.class_activation_maps(model, images, method, torch.tensor(targets), layers=[layer])
    reference = peer_maps(method, model, model.get_submodule(layer), images, targets)
    assert_same_maps(computed.numpy(), reference, 1e-4)
    if method == "gradcam":
        captums = LayerGradCam(model, model.get_submodule(layer)).attribute(images, target=3, relu_attributions=True)[:, 0].detach()
        assert_same_maps(computed.numpy(), captums.numpy(), 1e-4)
