"""Weight activations into class activation maps: one pure function per method, all from activations, gradients or class scores."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F


def gradcam_weights(activations: Tensor, gradients: Tensor) -> Tensor:
    """Grad-CAM: the mean gradient of each channel. Two (N, K, H, W) to (N, K, 1, 1). Eq. 1, arXiv:1610.02391."""
    return gradients.mean(dim=(2, 3), keepdim=True)


def gradcam_plus_plus_weights(activations: Tensor, gradients: Tensor) -> Tensor:
    """Grad-CAM++: a weighted sum of the positive gradients. Two (N, K, H, W) to (N, K, 1, 1).

    alpha = g^2 / (2 g^2 + sum(A) g^3), weight = sum(alpha relu(g)): Eq. 19 and 5, arXiv:1710.11063, for the class score
    exp(logit), whose higher derivatives are powers of the logit's gradient g. Divided by g^2, which underflows float32 for a
    confident network: alpha = 1 / (2 + sum(A) g), and 0 where g or the denominator is 0. pytorch-grad-cam adds 1e-6 to the
    undivided denominator, as large as g^2 itself on a 7x7 map; torch-cam 0.5 divides a copy, so that its alpha is g^2.
    """
    denominator = 2 + activations.sum(dim=(2, 3), keepdim=True) * gradients
    defined = (gradients != 0) & (denominator != 0)
    alpha = torch.where(defined, 1 / torch.where(defined, denominator, torch.ones_like(denominator)), torch.zeros_like(denominator))
    return (alpha * gradients.clamp(min=0)).sum(dim=(2, 3), keepdim=True)


def hirescam_weights(activations: Tensor, gradients: Tensor) -> Tensor:
    """HiResCAM: the elementwise gradient. Two (N, K, H, W) to (N, K, H, W). Sec. 3.2, arXiv:2011.08891."""
    return gradients


def xgradcam_weights(activations: Tensor, gradients: Tensor) -> Tensor:
    """XGrad-CAM: the mean gradient, weighted by the activations. Two (N, K, H, W) to (N, K, 1, 1).

    sum(A g) / sum(A): Eq. 8, arXiv:2008.02312; 0 for a channel that sums to 0 (pytorch-grad-cam adds 1e-7 to the sum).
    """
    sums = activations.sum(dim=(2, 3), keepdim=True)
    weighted = (activations * gradients).sum(dim=(2, 3), keepdim=True)
    return torch.where(sums != 0, weighted / torch.where(sums != 0, sums, torch.ones_like(sums)), torch.zeros_like(sums))


def layercam_weights(activations: Tensor, gradients: Tensor) -> Tensor:
    """LayerCAM: the elementwise positive gradient. Two (N, K, H, W) to (N, K, H, W).

    Eq. 6, "LayerCAM", IEEE TIP 2021, doi:10.1109/TIP.2021.3089943.
    """
    return gradients.clamp(min=0)


def eigencam_weights(activations: Tensor, gradients: Tensor) -> Tensor:
    """EigenCAM: the principal direction of the features; no class, no gradient. (N, K, H, W) to (N, K, 1, 1).

    The first right singular vector of the (H W, K) matrix: Sec. III, arXiv:2008.00299, with the sign that makes the sum over
    the map positive. pytorch-grad-cam subtracts each channel's mean first, which the paper does not.
    """
    matrix = activations.flatten(2)  # (N, K, H W)
    if matrix.shape[1] <= matrix.shape[2]:
        vectors: Tensor = torch.linalg.eigh(matrix @ matrix.mT).eigenvectors[:, :, -1]  # (N, K)
    else:  # the same from the smaller Gram matrix: the last layers have fewer positions than channels
        vectors = F.normalize((matrix @ torch.linalg.eigh(matrix.mT @ matrix).eigenvectors[:, :, -1:])[:, :, 0], dim=1)
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


def ablationcam_weights(activations: Tensor, score: Callable[[Tensor], Tensor], channels: int = 1) -> Tensor:
    """Ablation-CAM: the relative loss of class score without each channel; returns (N, K, 1, 1).

    (y - y_k) / y with channel k set to 0: Eq. 2, doi:10.1109/WACV45572.2020.9093360; 0 where y is 0.
    activations: in the layout of the network, channels along axis `channels`. score: maps such activations to (N,) class scores.
    pytorch-grad-cam sets a channel 1e7 below the smallest activation instead, if that is not 0.
    """
    base = score(activations)
    losses = []
    for k in range(activations.shape[channels]):
        ablated = activations.clone()
        ablated.select(channels, k).zero_()
        losses.append(base - score(ablated))
    relative = torch.stack(losses, dim=1) / torch.where(base != 0, base, torch.ones_like(base))[:, None]
    return torch.where(base[:, None] != 0, relative, torch.zeros_like(relative))[:, :, None, None]


def scorecam_weights(activations: Tensor, score: Callable[[Tensor], Tensor], size: int) -> Tensor:
    """Score-CAM: the class score of the image masked by each channel. (N, K, h, w) to (N, K, 1, 1), which sum to 1 over K.

    Each channel, enlarged bilinearly to the image and scaled to 0..1, is a mask; the weights are the softmax of the scores over
    the channels: Eq. 5-8 and Alg. 1, arXiv:1910.01279 (the score of the empty image, subtracted there, cancels out).
    score: maps masks (N, size, size) to (N,) class scores (logits).
    """
    scores = []
    for k in range(activations.shape[1]):
        masks = F.interpolate(activations[:, k : k + 1], (size, size), mode="bilinear", align_corners=False)[:, 0]
        low, high = masks.amin(dim=(1, 2), keepdim=True), masks.amax(dim=(1, 2), keepdim=True)
        scores.append(score(torch.where(high > low, (masks - low) / torch.where(high > low, high - low, 1.0), 0.0)))
    return torch.stack(scores, dim=1).softmax(dim=1)[:, :, None, None]


PERTURBATION_METHODS = ("ablationcam", "scorecam")  # K forward passes per batch: of the head, and of the network
PIXEL_METHODS = ("integrated_gradients", "occlusion")  # see pixel_attribution.py
ALL_METHODS = (*METHODS, *PERTURBATION_METHODS, *PIXEL_METHODS)
SLOW_METHODS = ("scorecam", *PIXEL_METHODS)  # one forward pass of the network or more per channel, step or window


def gradcam_all_classes(weight: Tensor, features: Tensor) -> Tensor:
    """Grad-CAM of every class for average pooling and one linear layer: relu(W A / (h w)), without a backward pass.

    weight: (C, K). features: (N, K, h, w). Returns (N, C, h, w) >= 0. The gradient is W / (h w) everywhere (Sec. 3.1, arXiv:1610.02391).
    """
    return torch.einsum("ck,nkhw->nchw", weight / (features.shape[2] * features.shape[3]), features).clamp(min=0)


def weighted_map(activations: Tensor, weights: Tensor) -> Tensor:
    """Return relu(sum of weight * activation over channels): (N, K, H, W) and (N, K, 1 or H, 1 or W) to (N, H, W) >= 0."""
    return (weights * activations).sum(dim=1).clamp(min=0)


def zero_nonfinite(maps: Tensor) -> Tensor:
    """Zero each (H, W) map with a NaN or an infinity: a network that overflowed gives no evidence."""
    return torch.where(maps.isfinite().all(dim=(1, 2), keepdim=True), maps, torch.zeros_like(maps))


def fuse(maps: Sequence[Tensor]) -> Tensor:
    """Average the maps of several layers, each scaled to one and enlarged bilinearly to the largest: (N, h, w) each, 0..1."""
    size = max((map_.shape[1:] for map_ in maps), key=lambda shape: shape[0] * shape[1])
    large = [F.interpolate(scale_to_one(map_)[:, None], tuple(size), mode="bilinear", align_corners=False)[:, 0] for map_ in maps]
    return torch.stack(large).mean(dim=0)


def scale_to_one(maps: Tensor) -> Tensor:
    """Divide each (H, W) map by its maximum, to 0..1; a map of zeros stays zeros."""
    peak = maps.amax(dim=(1, 2), keepdim=True)
    return torch.where(peak > 0, maps / torch.where(peak > 0, peak, torch.ones_like(peak)), torch.zeros_like(maps))
