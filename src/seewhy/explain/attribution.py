"""Compute heatmaps of a network: activations of a layer and gradients of a class score, combined by a method of cam.py."""

from __future__ import annotations

import difflib
import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from seewhy.errors import BackboneError, ConfigError
from seewhy.explain.cam import (
    METHODS,
    PERTURBATION_METHODS,
    PIXEL_METHODS,
    ablationcam_weights,
    fuse,
    scale_to_one,
    scorecam_weights,
    weighted_map,
    zero_nonfinite,
)
from seewhy.explain.pixel_attribution import class_scores, pixel_maps, resolve_targets


def feature_maps(model: nn.Module, images: Tensor) -> Tensor:
    """Return the last feature maps before pooling of (N, 3, S, S) images, in the layout of the network."""
    features: Tensor = cast(Any, model).forward_features(images)
    return features


class FeatureMaps(nn.Module):
    """A network without its head, as a module that executors can run."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> Tensor:
        return feature_maps(self.model, images)


def as_channels_first(model: nn.Module, features: Tensor) -> Tensor:
    """Bring features in the layout of the network to (N, K, H, W); patch tokens are read row by row, prefix tokens are dropped.

    Raises BackboneError if the tokens form no square grid, or the features are no maps.
    """
    if features.ndim == 4:
        channels_last = getattr(model, "output_fmt", "NCHW") == "NHWC"
        return features.permute(0, 3, 1, 2) if channels_last else features
    if features.ndim == 3:
        tokens = features[:, int(getattr(model, "num_prefix_tokens", 0)) :]
        side = round(tokens.shape[1] ** 0.5)
        if side * side == tokens.shape[1]:
            return tokens.transpose(1, 2).reshape(len(tokens), -1, side, side)
    raise BackboneError(f"no heatmaps for {type(model).__name__}: {tuple(features.shape[1:])} is no map; use a convolutional backbone")


def default_layers(model: nn.Module) -> tuple[str, ...]:
    """Return () for the last feature maps, or the first norm of the last block if a class token is the network's output.

    After that norm, patch tokens no longer reach the class token, and their gradient is zero.
    """
    if getattr(model, "global_pool", None) != "token":
        return ()
    blocks = getattr(model, "blocks", None)
    name = f"blocks.{len(blocks) - 1}.norm1" if isinstance(blocks, nn.Sequential | nn.ModuleList) else ""
    if name not in dict(model.named_modules()):
        raise BackboneError(f"no heatmaps for {type(model).__name__}: it classifies by a class token; name one of its layers")
    return (name,)


def linear_head(model: nn.Module, features: Tensor, logits: Tensor) -> Tensor | None:
    """Return the (C, K) weight if the head is average pooling and one linear layer, else None.

    Decided by comparing its outputs on these features, not by its type.
    """
    classifier = cast(Any, model).get_classifier()
    if not isinstance(classifier, nn.Linear) or features.ndim != 4 or classifier.in_features != features.shape[1]:
        return None
    finite = logits.isfinite().all(dim=1)  # ignore images that overflowed
    closed = nn.functional.linear(features[finite].mean(dim=(2, 3)), classifier.weight)
    scores = logits[finite] if classifier.bias is None else logits[finite] - classifier.bias
    if not len(scores):
        return None
    return classifier.weight if torch.allclose(closed, scores, rtol=1e-4, atol=1e-4 * scores.abs().max().item()) else None


def head_gradients(
    model: nn.Module, features: Tensor, targets: Tensor | None, contrast: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Differentiate each image's class score with respect to its features, through the head alone.

    features: from `feature_maps`. targets: (N,) class indices, None for the predicted class. contrast: (N,) classes whose
    score is subtracted. Returns logits (N, C), targets (N,), gradients shaped like the features. For average pooling and a
    linear layer the gradient is W[target] / (H W) everywhere, and no backward pass runs.
    """
    with torch.inference_mode(False):  # the caller's inference mode would forbid gradients
        features = features.detach().clone()
        with torch.no_grad():
            logits: Tensor = cast(Any, model).forward_head(features)
            weight = linear_head(model, features, logits)
        chosen = resolve_targets(logits, targets)
        if weight is not None:
            rows = weight.detach()[chosen]
            if contrast is not None:
                rows = rows - weight.detach()[contrast.to(logits.device)]
            return logits, chosen, (rows / (features.shape[2] * features.shape[3]))[:, :, None, None].expand_as(features)
        with torch.enable_grad():
            features.requires_grad_(True)
            scores = class_scores(cast(Any, model).forward_head(features), chosen, contrast)
            gradients = torch.autograd.grad(scores.sum(), features)[0]
        return logits, chosen, gradients


def layer_gradients(
    model: nn.Module, images: Tensor, layers: Sequence[str], targets: Tensor | None, contrast: Tensor | None = None
) -> tuple[Tensor, Tensor, list[tuple[Tensor, Tensor]]]:
    """Return activations and gradients at named layers, from one forward pass; nothing below the first layer is differentiated.

    images: (N, 3, S, S) normalised. Returns logits (N, C), targets (N,), and a pair of tensors per layer, in its own layout.
    Raises ConfigError for an unknown layer, BackboneError for one that is not used or whose output is no tensor.
    """
    outputs: dict[str, Tensor] = {}

    def keep(name: str) -> Callable[[nn.Module, Any, Any], Tensor]:
        def hook(module: nn.Module, inputs: Any, output: Any) -> Tensor:
            if not isinstance(output, Tensor):
                raise BackboneError(f"layer {name} gives {type(output).__name__}, not a feature map; name another layer")
            outputs[name] = output if outputs else output.detach().requires_grad_(True)
            torch.set_grad_enabled(True)  # from the first layer on; no_grad below restores the caller's state
            return outputs[name].clone()  # the network may modify it in place

        return hook

    modules = [named_layer(model, name) for name in layers]
    handles = [module.register_forward_hook(keep(name)) for name, module in zip(layers, modules, strict=True)]
    try:
        with torch.inference_mode(False), torch.no_grad():
            logits: Tensor = model(images.clone())
            chosen = resolve_targets(logits.detach(), targets)
            if missing := [name for name in layers if name not in outputs]:
                raise BackboneError(f"layer {missing[0]} is not used by {type(model).__name__}; name another layer")
            with torch.enable_grad():
                scores = class_scores(logits, chosen, contrast).sum()
            gradients = torch.autograd.grad(scores, [outputs[name] for name in layers])
    finally:
        for handle in handles:
            handle.remove()
    return logits.detach(), chosen, [(outputs[name].detach(), gradient) for name, gradient in zip(layers, gradients, strict=True)]


def named_layer(model: nn.Module, name: str) -> nn.Module:
    """Return a module by its dotted name; ConfigError with the closest names if there is none."""
    modules: dict[str, nn.Module] = dict(model.named_modules())
    if name and name in modules:
        return modules[name]
    similar = difflib.get_close_matches(name, list(filter(None, modules)), n=3, cutoff=0.3)
    raise ConfigError(f"unknown layer {name!r} of {type(model).__name__}; did you mean {' or '.join(similar) or 'one of its modules'}?")


def class_activation_maps(
    model: nn.Module,
    images: Tensor,
    method: str,
    targets: Tensor | None = None,
    contrast: Tensor | None = None,
    layers: Sequence[str] = (),
) -> tuple[Tensor, Tensor, Tensor]:
    """Return maps (N, h, w) >= 0 of one class per image, with logits (N, C) and target classes (N,).

    model: timm network in eval mode. images: (N, 3, S, S) normalised float32. contrast: (N,) classes whose score is
    subtracted: evidence for the target and not for them. layers: dotted names; several are fused; none: the last feature maps.
    """
    if method in PIXEL_METHODS:
        if layers:
            raise ConfigError(f"{method} explains pixels, not a layer; leave the layer out or choose another method")
        return pixel_maps(model, images, method, targets, contrast)
    layers = layers or default_layers(model)
    if method in PERTURBATION_METHODS:
        return perturbation_maps(model, images, method, targets, contrast, layers)
    if not layers:
        with torch.no_grad():
            features = feature_maps(model, images)
        return maps_from_features(model, features, method, targets, contrast)
    logits, chosen, pairs = layer_gradients(model, images, layers, targets, contrast)
    maps = [_map(model, activations, gradients, method) for activations, gradients in pairs]
    return maps[0] if len(maps) == 1 else fuse(maps), logits, chosen


def smoothed_maps(
    model: nn.Module,
    images: Tensor,
    method: str,
    targets: Tensor | None = None,
    contrast: Tensor | None = None,
    layers: Sequence[str] = (),
    smooth: int = 1,
) -> tuple[Tensor, Tensor, Tensor]:
    """Average `class_activation_maps` over smooth x smooth copies of each image, shifted cyclically by half cells of a 7 x 7 map.

    Shows detail below the size of a coarse map's cells, at smooth^2 times the cost; benchmarks/cam_quality.py measures the gain.
    Returns maps (N, S, S), each scaled to 0..1 before averaging, with logits and targets of the unshifted image.
    """
    if smooth == 1:
        return class_activation_maps(model, images, method, targets, contrast, layers)
    with torch.inference_mode(False), torch.no_grad():
        logits: Tensor = model(images.clone())
        chosen = resolve_targets(logits, targets)
    size = images.shape[-1]
    offsets = [round((n - (smooth - 1) / 2) * size / 14) for n in range(smooth)]
    total = torch.zeros(len(images), size, size)
    for dy, dx in itertools.product(offsets, offsets):
        shifted = torch.roll(images, (dy, dx), dims=(2, 3))
        maps, _, _ = class_activation_maps(model, shifted, method, chosen, contrast, layers)
        large = nn.functional.interpolate(scale_to_one(maps)[:, None], (size, size), mode="bilinear", align_corners=False)[:, 0]
        total += torch.roll(large, (-dy, -dx), dims=(1, 2)).to(total.device)
    return total / len(offsets) ** 2, logits, chosen


def iter_method_maps(
    model: nn.Module, images: Tensor, methods: Sequence[str], targets: Tensor, layers: Sequence[str] = (), smooth: int = 1
) -> Iterator[tuple[str, Tensor]]:
    """Yield (method, maps (N, h, w) >= 0); methods that need only the last feature maps share one forward pass."""
    features = None
    for method in methods:
        if smooth > 1:
            yield method, smoothed_maps(model, images, method, targets, None, layers, smooth)[0]
        elif method in METHODS and not (layers or default_layers(model)):
            if features is None:
                with torch.no_grad():
                    features = feature_maps(model, images)
            yield method, maps_from_features(model, features, method, targets)[0]
        else:
            yield method, class_activation_maps(model, images, method, targets, layers=layers)[0]


def perturbation_maps(
    model: nn.Module, images: Tensor, method: str, targets: Tensor | None, contrast: Tensor | None, layers: Sequence[str]
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute `class_activation_maps` by a method that runs the network once per channel, on the whole batch."""
    maps = []
    with torch.inference_mode(False), torch.no_grad():
        images = images.clone()  # may be an inference tensor
        logits: Tensor = model(images)
        chosen = resolve_targets(logits, targets)

        def masked_scores(masks: Tensor) -> Tensor:
            return class_scores(model(images * masks[:, None]), chosen, contrast)

        for layer in layers or (None,):
            features = feature_maps(model, images) if layer is None else layer_output(model, images, layer)

            def changed_scores(changed: Tensor, layer: str | None = layer) -> Tensor:
                outputs = cast(Any, model).forward_head(changed) if layer is None else forward_from(model, images, layer, changed)
                return class_scores(outputs, chosen, contrast)

            activations = zero_nonfinite_images(as_channels_first(model, features))
            if method == "scorecam":
                weights = scorecam_weights(activations, masked_scores, images.shape[-1])
            else:
                channels_first = features.ndim == 4 and getattr(model, "output_fmt", "NCHW") == "NCHW"
                weights = ablationcam_weights(features, changed_scores, 1 if channels_first else features.ndim - 1)
            maps.append(zero_nonfinite(weighted_map(activations, weights)))
    return maps[0] if len(maps) == 1 else fuse(maps), logits, chosen


def layer_output(model: nn.Module, images: Tensor, layer: str) -> Tensor:
    """Return the output of a named layer; a copy, as the network may modify it in place."""
    outputs: list[Tensor] = []
    _run_with_hook(model, images, layer, lambda module, inputs, output: outputs.append(output.clone()))
    return outputs[0]


def forward_from(model: nn.Module, images: Tensor, layer: str, output: Tensor) -> Tensor:
    """Return the logits of the images with `output` in place of a named layer's output."""
    return _run_with_hook(model, images, layer, lambda module, inputs, replaced: output.clone())


def _run_with_hook(model: nn.Module, images: Tensor, layer: str, hook: Callable[[nn.Module, Any, Tensor], Tensor | None]) -> Tensor:
    handle = named_layer(model, layer).register_forward_hook(hook)
    try:
        logits: Tensor = model(images)
    finally:
        handle.remove()
    return logits


def zero_nonfinite_images(activations: Tensor) -> Tensor:
    """Zero the (N, K, H, W) activations of images with a NaN or an infinity, on which eigendecomposition of the batch fails."""
    if bool(activations.isfinite().all()):
        return activations
    return torch.where(activations.isfinite().all(dim=(1, 2, 3), keepdim=True), activations, torch.zeros_like(activations))


def _map(model: nn.Module, activations: Tensor, gradients: Tensor, method: str) -> Tensor:
    activations, gradients = zero_nonfinite_images(as_channels_first(model, activations)), as_channels_first(model, gradients)
    return zero_nonfinite(weighted_map(activations, METHODS[method](activations, gradients)))


def maps_from_features(
    model: nn.Module, features: Tensor, method: str, targets: Tensor | None = None, contrast: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute `class_activation_maps` from the last feature maps, whichever executor computed them."""
    logits, chosen, gradients = head_gradients(model, features, targets, contrast)
    return _map(model, features, gradients, method), logits, chosen
