"""Activations and gradients -> class activation maps: METHODS, and PERTURBATION_METHODS; one pure function a method."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F


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
    is as large as g^2 itself on a 7x7 map and shrinks its weights; torch-cam 0.5 divides a copy, so its alpha is g^2.
    """
    denominator = 2 + activations.sum(dim=(2, 3), keepdim=True) * gradients
    defined = (gradients != 0) & (denominator != 0)
    alpha = torch.where(defined, 1 / torch.where(defined, denominator, torch.ones_like(denominator)), torch.zeros_like(denominator))
    return (alpha * gradients.clamp(min=0)).sum(dim=(2, 3), keepdim=True)


def hirescam_weights(activations: Tensor, gradients: Tensor) -> Tensor:
    """HiResCAM: the gradient itself, place by place. (N, K, H, W) twice -> (N, K, H, W). Sec. 3.2, arXiv:2011.08891."""
    return gradients


def xgradcam_weights(activations: Tensor, gradients: Tensor) -> Tensor:
    """XGrad-CAM: the gradients' mean, weighted by the activations. (N, K, H, W) twice -> (N, K, 1, 1).

    sum(A g) / sum(A): Eq. 8, arXiv:2008.02312. Where a channel sums to 0 its weight is 0 (pytorch-grad-cam adds 1e-7 to the sum).
    """
    sums = activations.sum(dim=(2, 3), keepdim=True)
    weighted = (activations * gradients).sum(dim=(2, 3), keepdim=True)
    return torch.where(sums != 0, weighted / torch.where(sums != 0, sums, torch.ones_like(sums)), torch.zeros_like(sums))


def layercam_weights(activations: Tensor, gradients: Tensor) -> Tensor:
    """LayerCAM: the positive gradients, place by place. (N, K, H, W) twice -> (N, K, H, W).

    Eq. 6, "LayerCAM", IEEE TIP 2021, doi:10.1109/TIP.2021.3089943.
    """
    return gradients.clamp(min=0)


def eigencam_weights(activations: Tensor, gradients: Tensor) -> Tensor:
    """EigenCAM: the direction in which the places' features are largest; no class, no gradient. (N, K, H, W) -> (N, K, 1, 1).

    The first right singular vector of the (places, K) matrix: Sec. III, arXiv:2008.00299. Of its two signs the one with
    a positive sum over the map, which a singular value decomposition leaves open. pytorch-grad-cam subtracts each channel's
    mean first, which the paper does not: its map shows where features vary, and half of it is negative.
    """
    matrix = activations.flatten(2)  # (N, K, places)
    if matrix.shape[1] <= matrix.shape[2]:
        vectors: Tensor = torch.linalg.eigh(matrix @ matrix.mT).eigenvectors[:, :, -1]  # (N, K)
    else:  # the same from the smaller of the two products, as places are fewer than channels in the last layers
        vectors = torch.nn.functional.normalize((matrix @ torch.linalg.eigh(matrix.mT @ matrix).eigenvectors[:, :, -1:])[:, :, 0], dim=1)
    sums = (vectors * activations.sum(dim=(2, 3))).sum(dim=1, keepdim=True)
    signs = torch.where(sums < 0, -torch.ones_like(sums), torch.ones_like(sums))
    return (vectors * signs)[:, :, None, None]


METHODS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "gradcam": gradcam_weights,
    "gradcam++": gradcam_plus_plus_weights,
    "hirescam": hirescam_weights,
    "xgradcam": xgradcam_weights,
    "layercam": layercam_weights,
    "eigencam": eigencam_weights,
}


# ---------------------------------------------------------------- perturbation methods


def ablationcam_weights(activations: Tensor, score: Callable[[Tensor], Tensor], channels: int = 1) -> Tensor:
    """Ablation-CAM: the share of the class score that is lost without each channel. -> (N, K, 1, 1).

    (y - y_k) / y with channel k set to 0: Eq. 2, doi:10.1109/WACV45572.2020.9093360; 0 where y is 0.
    activations: as the network lays them out, channels along axis `channels`. score: such activations -> (N,) class scores.
    pytorch-grad-cam sets a channel 1e7 below the smallest activation instead, where that is not 0.
    """
    whole = score(activations)
    lost = []
    for k in range(activations.shape[channels]):
        without = activations.clone()
        without.select(channels, k).zero_()
        lost.append(whole - score(without))
    shares = torch.stack(lost, dim=1) / torch.where(whole != 0, whole, torch.ones_like(whole))[:, None]
    return torch.where(whole[:, None] != 0, shares, torch.zeros_like(shares))[:, :, None, None]


def scorecam_weights(activations: Tensor, score: Callable[[Tensor], Tensor], size: int) -> Tensor:
    """Score-CAM: the class score of the image seen through each channel. (N, K, h, w) -> (N, K, 1, 1), which sum to 1.

    Each channel, enlarged bilinearly to the image and scaled to 0..1, is a mask; the softmax of the scores over the channels
    are the weights: Eq. 5-8 and Alg. 1, arXiv:1910.01279 (the score of the empty image, taken away there, cancels out).
    score: masks (N, size, size) -> (N,) class scores (logits).
    """
    scores = []
    for k in range(activations.shape[1]):
        masks = F.interpolate(activations[:, k : k + 1], (size, size), mode="bilinear", align_corners=False)[:, 0]
        low, high = masks.amin(dim=(1, 2), keepdim=True), masks.amax(dim=(1, 2), keepdim=True)
        scores.append(score(torch.where(high > low, (masks - low) / torch.where(high > low, high - low, 1.0), 0.0)))
    return torch.stack(scores, dim=1).softmax(dim=1)[:, :, None, None]


PERTURBATION_METHODS = ("ablationcam", "scorecam")  # K forward passes a batch: of the head, and of the whole network
PIXEL_METHODS = ("integrated_gradients", "occlusion")  # no activations at all: pixels.py
ALL_METHODS = (*METHODS, *PERTURBATION_METHODS, *PIXEL_METHODS)
SLOW = ("scorecam", *PIXEL_METHODS)  # a forward pass of the network, or more, a channel, step or window


# ---------------------------------------------------------------- all classes in closed form


def gradcam_all_classes(weight: Tensor, features: Tensor) -> Tensor:
    """Grad-CAM of every class for average pooling and one linear layer: relu(W A / places), which needs no backward pass.

    weight: (C, K). features: (N, K, h, w). -> (N, C, h, w), at least 0. The gradient is W / places everywhere (Sec. 3.1, arXiv:1610.02391).
    """
    return torch.einsum("ck,nkhw->nchw", weight / (features.shape[2] * features.shape[3]), features).clamp(min=0)


# ---------------------------------------------------------------- maps


def weighted_map(activations: Tensor, weights: Tensor) -> Tensor:
    """relu(sum over channels of weight * activation): (N, K, H, W) and (N, K, 1 or H, 1 or W) -> (N, H, W), at least 0."""
    return (weights * activations).sum(dim=1).clamp(min=0)


def zero_nonfinite(maps: Tensor) -> Tensor:
    """Zeros in place of each (H, W) map that holds a NaN or an infinity: a network that overflowed shows no evidence."""
    return torch.where(maps.isfinite().all(dim=(1, 2), keepdim=True), maps, torch.zeros_like(maps))


def fuse(maps: Sequence[Tensor]) -> Tensor:
    """Maps of several layers -> their mean, each first scaled to one and brought to the size of the largest.

    [(N, h, w), (N, h', w'), ...] -> (N, max h, max w), 0..1. Enlarged bilinearly.
    """
    size = max((map_.shape[1:] for map_ in maps), key=lambda shape: shape[0] * shape[1])
    large = [F.interpolate(scale_to_one(map_)[:, None], tuple(size), mode="bilinear", align_corners=False)[:, 0] for map_ in maps]
    return torch.stack(large).mean(dim=0)


def scale_to_one(maps: Tensor) -> Tensor:
    """Each (H, W) map over its maximum, so 0..1; a map of zeros stays zeros."""
    peak = maps.amax(dim=(1, 2), keepdim=True)
    return torch.where(peak > 0, maps / torch.where(peak > 0, peak, torch.ones_like(peak)), torch.zeros_like(maps))
