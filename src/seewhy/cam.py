"""Activations and gradients -> class activation maps: METHODS, one pure function a method."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor, nn

from seewhy.errors import BackboneError


def gradcam_weights(activations: Tensor, gradients: Tensor) -> Tensor:
    """Grad-CAM: the mean gradient of each channel. (N, K, H, W) twice -> (N, K, 1, 1).

    Eq. 1, arXiv:1610.02391.
    """
    return gradients.mean(dim=(2, 3), keepdim=True)


def gradcam_plus_plus_weights(activations: Tensor, gradients: Tensor) -> Tensor:
    """Grad-CAM++: a weighted sum of the positive gradients. (N, K, H, W) twice -> (N, K, 1, 1).

    alpha = g^2 / (2 g^2 + sum(A) g^3), weight = sum(alpha relu(g)): Eq. 19 and 5, arXiv:1710.11063,
    for the class score exp(logit), whose higher derivatives are powers of the logit's gradient g.
    Where the denominator is 0, alpha is 0. Divided through by g^2 before use, since g^2 of a
    confident network underflows float32: alpha = 1 / (2 + sum(A) g), 0 where g = 0.
    Only relu(g) > 0 contributes, and activations behind a ReLU are not negative, so no
    denominator can vanish there. pytorch-grad-cam adds 1e-6 to the undivided denominator, which
    is as large as g^2 itself on a 7x7 map and shrinks its weights.
    """
    denominator = 2 + activations.sum(dim=(2, 3), keepdim=True) * gradients
    defined = (gradients != 0) & (denominator != 0)
    alpha = torch.where(defined, 1 / torch.where(defined, denominator, torch.ones_like(denominator)), torch.zeros_like(denominator))
    return (alpha * gradients.clamp(min=0)).sum(dim=(2, 3), keepdim=True)


METHODS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "gradcam": gradcam_weights,
    "gradcam++": gradcam_plus_plus_weights,
}


def gradcam_all_weights(weight: Tensor, sums: Tensor, places: int) -> Tensor:
    """`gradcam_weights` of every class where the gradient is weight / places. (C, K) -> (1, C, K)."""
    return weight[None] / places


def gradcam_plus_plus_all_weights(weight: Tensor, sums: Tensor, places: int) -> Tensor:
    """`gradcam_plus_plus_weights` of every class where the gradient is weight / places everywhere.

    weight: (C, K). sums: (N, K), sum(A) of each channel. -> (N, C, K).
    The sum over places of alpha relu(g) with g = W / places is relu(W) / (2 + sum(A) W / places).
    Only positive W are left by the numerator; behind a ReLU the denominator is then at least 2.
    """
    positive = weight.clamp(min=0)
    denominator = torch.addcmul(torch.full((), 2.0, dtype=weight.dtype, device=weight.device), sums[:, None], positive[None] / places)
    if bool((sums < 0).any()):  # activations without a ReLU: the denominator may vanish, and alpha is 0 there
        return torch.where(denominator != 0, positive / torch.where(denominator != 0, denominator, 1.0), 0.0)
    return torch.div(positive, denominator, out=denominator)


# The same methods for all classes at once, for a head of average pooling and one linear layer.
ALL_CLASSES: dict[str, Callable[[Tensor, Tensor, int], Tensor]] = {
    "gradcam": gradcam_all_weights,
    "gradcam++": gradcam_plus_plus_all_weights,
}


def combine(activations: Tensor, weights: Tensor) -> Tensor:
    """relu(sum over channels of weight * activation): (N, K, H, W) and (N, K, 1, 1) -> (N, H, W), at least 0."""
    return (weights * activations).sum(dim=1).clamp(min=0)


def scale_to_one(maps: Tensor) -> Tensor:
    """Each (H, W) map over its maximum, so 0..1; a map of zeros stays zeros."""
    peak = maps.amax(dim=(1, 2), keepdim=True)
    return torch.where(peak > 0, maps / torch.where(peak > 0, peak, torch.ones_like(peak)), torch.zeros_like(maps))


def feature_maps(model: nn.Module, pictures: Tensor) -> Tensor:
    """(N, 3, S, S) -> the last feature maps before pooling, as the network lays them out."""
    features: Tensor = cast(Any, model).forward_features(pictures)
    return features


class FeatureMaps(nn.Module):
    """A network up to its head, for an engine to run."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, pictures: Tensor) -> Tensor:
        return feature_maps(self.model, pictures)


def as_channels_first(model: nn.Module, features: Tensor) -> Tensor:
    """(N, K, H, W) from whatever layout the network uses.

    Raises BackboneError for a network that classifies by a class token: its patch tokens
    do not reach the classifier behind the last layer, so their gradient there is zero.
    """
    if features.ndim == 4:
        channels_last = getattr(model, "output_fmt", "NCHW") == "NHWC"
        return features.permute(0, 3, 1, 2) if channels_last else features
    if features.ndim == 3 and getattr(model, "global_pool", "token") != "token":
        tokens = features[:, int(getattr(model, "num_prefix_tokens", 0)) :]
        side = round(tokens.shape[1] ** 0.5)
        if side * side == tokens.shape[1]:
            return tokens.transpose(1, 2).reshape(len(tokens), -1, side, side)
    name = type(model).__name__
    raise BackboneError(f"no heatmaps for {name}: it has no feature map in front of its classifier; use a convolutional backbone")


def linear_head(model: nn.Module, features: Tensor, logits: Tensor) -> Tensor | None:
    """The (C, K) weight if the head is average pooling and one linear layer, else None.

    Decided by what it computes on these very features, not by its type.
    """
    classifier = cast(Any, model).get_classifier()
    if not isinstance(classifier, nn.Linear) or features.ndim != 4 or classifier.in_features != features.shape[1]:
        return None
    closed = nn.functional.linear(features.mean(dim=(2, 3)), classifier.weight)
    scores = logits if classifier.bias is None else logits - classifier.bias
    return classifier.weight if torch.allclose(closed, scores, rtol=1e-4, atol=1e-4 * scores.abs().max().item()) else None


def head_gradients(model: nn.Module, features: Tensor, targets: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """Gradient of each picture's class score with respect to its features: from the head down, no further.

    features: from `feature_maps`. targets: (N,) class indices, None for the predicted class.
    Returns logits (N, C), targets (N,), gradients shaped like the features. For a head of average
    pooling and a linear layer the gradient is W[target] / (H W) at every place, and no backward runs.
    """
    with torch.inference_mode(False):  # a caller's inference mode would forbid gradients
        features = features.detach().clone()
        with torch.no_grad():
            logits: Tensor = cast(Any, model).forward_head(features)
            weight = linear_head(model, features, logits)
        chosen = logits.argmax(dim=1) if targets is None else targets.to(logits.device).clone()  # may be an inference tensor
        if weight is not None:
            places = features.shape[2] * features.shape[3]
            return logits, chosen, (weight.detach()[chosen] / places)[:, :, None, None].expand_as(features)
        with torch.enable_grad():
            features.requires_grad_(True)
            scores = cast(Any, model).forward_head(features)
            gradients = torch.autograd.grad(scores.gather(1, chosen[:, None]).sum(), features)[0]
        return logits, chosen, gradients


def class_activation_maps(model: nn.Module, pictures: Tensor, method: str, targets: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """Maps (N, h, w) >= 0 of one class a picture, with logits (N, C) and target classes (N,).

    model: timm network in eval mode. pictures: (N, 3, S, S) normalised float32.
    """
    with torch.no_grad():
        features = feature_maps(model, pictures)
    return maps_of_features(model, features, method, targets)


def maps_of_features(model: nn.Module, features: Tensor, method: str, targets: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """`class_activation_maps` from feature maps that are there already, whichever engine computed them."""
    logits, chosen, gradients = head_gradients(model, features, targets)
    activations, gradients = as_channels_first(model, features), as_channels_first(model, gradients)
    return combine(activations, METHODS[method](activations, gradients)), logits, chosen


def all_class_maps(model: nn.Module, features: Tensor, method: str) -> tuple[Tensor, Tensor]:
    """Maps (N, C, h, w) >= 0 of every class, with logits (N, C).

    One matrix product for a head of average pooling and a linear layer; else one backward pass through the head a class.
    """
    with torch.inference_mode(False), torch.no_grad():
        features = features.detach().clone()
        logits: Tensor = cast(Any, model).forward_head(features)
        weight = linear_head(model, features, logits)
        if weight is not None:
            flat = features.flatten(2)  # (N, K, places)
            weights = ALL_CLASSES[method](weight.detach(), flat.sum(dim=2), flat.shape[2])
            maps = torch.matmul(weights, flat).clamp_(min=0)  # (N, C, K) x (N, K, places)
            return maps.reshape(*maps.shape[:2], *features.shape[2:]), logits
    each = []
    for target in range(logits.shape[1]):
        maps, _, _ = maps_of_features(model, features, method, torch.full((len(features),), target))
        each.append(maps)
    return torch.stack(each, dim=1), logits
