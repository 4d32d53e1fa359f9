"""Network x images -> heatmaps: activations of a layer and the gradients of a class score there, put through a method of cam.py."""

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
from seewhy.explain.pixel_attribution import chosen_classes, class_scores, pixel_maps

# ---------------------------------------------------------------- the last feature maps


def feature_maps(model: nn.Module, images: Tensor) -> Tensor:
    """(N, 3, S, S) -> the last feature maps before pooling, as the network lays them out."""
    features: Tensor = cast(Any, model).forward_features(images)
    return features


class FeatureMaps(nn.Module):
    """A network up to its head, for an executor to run."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> Tensor:
        return feature_maps(self.model, images)


def as_channels_first(model: nn.Module, features: Tensor) -> Tensor:
    """(N, K, H, W) from whatever layout the network uses; tokens without the prefix ones, row by row.

    Raises BackboneError where the tokens make no square, or no map is there at all.
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
    """() for the last feature maps; for a network that classifies by a class token the last block's first norm.

    Behind it, patch tokens do not reach the class token any more, so that their gradient would be zero.
    """
    if getattr(model, "global_pool", None) != "token":
        return ()
    blocks = getattr(model, "blocks", None)
    name = f"blocks.{len(blocks) - 1}.norm1" if isinstance(blocks, nn.Sequential | nn.ModuleList) else ""
    if name not in dict(model.named_modules()):
        raise BackboneError(f"no heatmaps for {type(model).__name__}: it classifies by a class token; name one of its layers")
    return (name,)


def linear_head(model: nn.Module, features: Tensor, logits: Tensor) -> Tensor | None:
    """The (C, K) weight if the head is average pooling and one linear layer, else None.

    Decided by what it computes on these very features, not by its type.
    """
    classifier = cast(Any, model).get_classifier()
    if not isinstance(classifier, nn.Linear) or features.ndim != 4 or classifier.in_features != features.shape[1]:
        return None
    whole = logits.isfinite().all(dim=1)  # an image that overflowed says nothing about the head
    closed = nn.functional.linear(features[whole].mean(dim=(2, 3)), classifier.weight)
    scores = logits[whole] if classifier.bias is None else logits[whole] - classifier.bias
    if not len(scores):
        return None
    return classifier.weight if torch.allclose(closed, scores, rtol=1e-4, atol=1e-4 * scores.abs().max().item()) else None


# ---------------------------------------------------------------- gradients


def head_gradients(
    model: nn.Module, features: Tensor, targets: Tensor | None, contrast: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradient of each image's class score with respect to its features: from the head down, no further.

    features: from `feature_maps`. targets: (N,) class indices, None for the predicted class. contrast: (N,) classes whose
    score is taken away. Returns logits (N, C), targets (N,), gradients shaped like the features. For a head of average
    pooling and a linear layer the gradient is W[target] / (H W) at every place, and no backward runs.
    """
    with torch.inference_mode(False):  # a caller's inference mode would forbid gradients
        features = features.detach().clone()
        with torch.no_grad():
            logits: Tensor = cast(Any, model).forward_head(features)
            weight = linear_head(model, features, logits)
        chosen = chosen_classes(logits, targets)
        if weight is not None:
            places = features.shape[2] * features.shape[3]
            rows = weight.detach()[chosen] if contrast is None else weight.detach()[chosen] - weight.detach()[contrast.to(logits.device)]
            return logits, chosen, (rows / places)[:, :, None, None].expand_as(features)
        with torch.enable_grad():
            features.requires_grad_(True)
            scores = class_scores(cast(Any, model).forward_head(features), chosen, contrast)
            gradients = torch.autograd.grad(scores.sum(), features)[0]
        return logits, chosen, gradients


def layer_gradients(
    model: nn.Module, images: Tensor, layers: Sequence[str], targets: Tensor | None, contrast: Tensor | None = None
) -> tuple[Tensor, Tensor, list[tuple[Tensor, Tensor]]]:
    """Activations and gradients at named layers, in one forward pass; nothing below the first of them is differentiated.

    images: (N, 3, S, S) normalised. Returns logits (N, C), targets (N,), and a pair of tensors a layer, as the layer lays
    them out. Raises ConfigError for a layer the network does not have, BackboneError for one whose output is no tensor.
    """
    found: dict[str, Tensor] = {}

    def keep(name: str) -> Callable[[nn.Module, Any, Any], Tensor]:
        def hook(module: nn.Module, inputs: Any, output: Any) -> Tensor:
            if not isinstance(output, Tensor):
                raise BackboneError(f"layer {name} gives {type(output).__name__}, not a feature map; name another layer")
            found[name] = output if found else output.detach().requires_grad_(True)
            torch.set_grad_enabled(True)  # from the first layer on; the caller's state comes back behind the forward pass
            return found[name].clone()  # a network may go on in place

        return hook

    modules = [named_layer(model, name) for name in layers]
    handles = [module.register_forward_hook(keep(name)) for name, module in zip(layers, modules, strict=True)]
    try:
        with torch.inference_mode(False), torch.no_grad():
            logits: Tensor = model(images.clone())
            chosen = chosen_classes(logits.detach(), targets)
            if missing := [name for name in layers if name not in found]:
                raise BackboneError(f"layer {missing[0]} takes no part in an answer of {type(model).__name__}; name another layer")
            with torch.enable_grad():
                scores = class_scores(logits, chosen, contrast).sum()
            gradients = torch.autograd.grad(scores, [found[name] for name in layers])
    finally:
        for handle in handles:
            handle.remove()
    return logits.detach(), chosen, [(found[name].detach(), gradient) for name, gradient in zip(layers, gradients, strict=True)]


def named_layer(model: nn.Module, name: str) -> nn.Module:
    """A module by its dotted name; ConfigError with the nearest names otherwise."""
    modules: dict[str, nn.Module] = dict(model.named_modules())
    if name and name in modules:
        return modules[name]
    near = difflib.get_close_matches(name, [known for known in modules if known], n=3, cutoff=0.3)
    raise ConfigError(f"unknown layer {name!r} of {type(model).__name__}; did you mean {' or '.join(near) or 'one of its modules'}?")


# ---------------------------------------------------------------- maps


def class_activation_maps(
    model: nn.Module,
    images: Tensor,
    method: str,
    targets: Tensor | None = None,
    contrast: Tensor | None = None,
    layers: Sequence[str] = (),
) -> tuple[Tensor, Tensor, Tensor]:
    """Maps (N, h, w) >= 0 of one class an image, with logits (N, C) and target classes (N,).

    model: timm network in eval mode. images: (N, 3, S, S) normalised float32. contrast: (N,) classes the targets are held
    against: evidence for the one and not the other. layers: dotted names; several are fused; none: the last feature maps.
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
        return maps_of_features(model, features, method, targets, contrast)
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
    """`class_activation_maps` averaged over smooth x smooth copies of each image, moved around its rim by half cells of a 7 x 7 map.

    Places between the centres of a coarse map's cells become visible, at smooth^2 times the cost. Maps (N, S, S), each scaled to
    0..1 before the mean, with logits and targets of the image as it is. benchmarks/cam_quality.py measures what it brings.
    """
    if smooth == 1:
        return class_activation_maps(model, images, method, targets, contrast, layers)
    with torch.inference_mode(False), torch.no_grad():
        logits: Tensor = model(images.clone())
        chosen = chosen_classes(logits, targets)
    size = images.shape[-1]
    offsets = [round((n - (smooth - 1) / 2) * size / 14) for n in range(smooth)]
    total = torch.zeros(len(images), size, size)
    for dy, dx in itertools.product(offsets, offsets):
        moved = torch.roll(images, (dy, dx), dims=(2, 3))
        maps, _, _ = class_activation_maps(model, moved, method, chosen, contrast, layers)
        large = nn.functional.interpolate(scale_to_one(maps)[:, None], (size, size), mode="bilinear", align_corners=False)[:, 0]
        total += torch.roll(large, (-dy, -dx), dims=(1, 2)).to(total.device)
    return total / len(offsets) ** 2, logits, chosen


def maps_of_methods(
    model: nn.Module, images: Tensor, methods: Sequence[str], targets: Tensor, layers: Sequence[str] = (), smooth: int = 1
) -> Iterator[tuple[str, Tensor]]:
    """(method, maps (N, h, w) >= 0) of each method in turn; those that start from the last feature maps share one forward pass."""
    features = None
    for method in methods:
        if smooth > 1:
            yield method, smoothed_maps(model, images, method, targets, None, layers, smooth)[0]
        elif method in METHODS and not (layers or default_layers(model)):
            if features is None:
                with torch.no_grad():
                    features = feature_maps(model, images)
            yield method, maps_of_features(model, features, method, targets)[0]
        else:
            yield method, class_activation_maps(model, images, method, targets, layers=layers)[0]


def perturbation_maps(
    model: nn.Module, images: Tensor, method: str, targets: Tensor | None, contrast: Tensor | None, layers: Sequence[str]
) -> tuple[Tensor, Tensor, Tensor]:
    """`class_activation_maps` by a method that asks the network anew for each channel, in batches of the images."""
    maps = []
    with torch.inference_mode(False), torch.no_grad():
        images = images.clone()  # may be an inference tensor
        logits: Tensor = model(images)
        chosen = chosen_classes(logits, targets)

        def masked_scores(masks: Tensor) -> Tensor:
            return class_scores(model(images * masks[:, None]), chosen, contrast)

        everywhere: Sequence[str | None] = layers or [None]
        for layer in everywhere:
            features = feature_maps(model, images) if layer is None else output_of(model, images, layer)

            def changed_scores(changed: Tensor, layer: str | None = layer) -> Tensor:
                answer = cast(Any, model).forward_head(changed) if layer is None else forward_from(model, images, layer, changed)
                return class_scores(answer, chosen, contrast)

            activations = finite_images(as_channels_first(model, features))
            if method == "scorecam":
                weights = scorecam_weights(activations, masked_scores, images.shape[-1])
            else:
                weights = ablationcam_weights(features, changed_scores, channel_axis(model, features))
            maps.append(zero_nonfinite(weighted_map(activations, weights)))
    return maps[0] if len(maps) == 1 else fuse(maps), logits, chosen


def channel_axis(model: nn.Module, features: Tensor) -> int:
    """Along which axis the channels lie, as `as_channels_first` reads the layout."""
    return 1 if features.ndim == 4 and getattr(model, "output_fmt", "NCHW") == "NCHW" else features.ndim - 1


def output_of(model: nn.Module, images: Tensor, layer: str) -> Tensor:
    """What a named layer gives for the images; a copy, since a network may go on in place."""
    found: list[Tensor] = []
    handle = named_layer(model, layer).register_forward_hook(lambda module, inputs, output: found.append(output.clone()))
    try:
        model(images)
    finally:
        handle.remove()
    return found[0]


def forward_from(model: nn.Module, images: Tensor, layer: str, output: Tensor) -> Tensor:
    """Logits of the images if a named layer gave `output`."""
    handle = named_layer(model, layer).register_forward_hook(lambda module, inputs, own: output.clone())
    try:
        logits: Tensor = model(images)
    finally:
        handle.remove()
    return logits


def finite_images(activations: Tensor) -> Tensor:
    """(N, K, H, W) with zeros for each image that holds a NaN or an infinity, at which a decomposition would refuse the batch."""
    if bool(activations.isfinite().all()):
        return activations
    return torch.where(activations.isfinite().all(dim=(1, 2, 3), keepdim=True), activations, torch.zeros_like(activations))


def _map(model: nn.Module, activations: Tensor, gradients: Tensor, method: str) -> Tensor:
    activations, gradients = finite_images(as_channels_first(model, activations)), as_channels_first(model, gradients)
    return zero_nonfinite(weighted_map(activations, METHODS[method](activations, gradients)))


def maps_of_features(
    model: nn.Module, features: Tensor, method: str, targets: Tensor | None = None, contrast: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """`class_activation_maps` from the last feature maps that are there already, whichever executor computed them."""
    logits, chosen, gradients = head_gradients(model, features, targets, contrast)
    return _map(model, features, gradients, method), logits, chosen
