"""Compute heatmaps of pixels instead of a layer: Integrated Gradients and occlusion, by captum."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from seewhy.errors import require

STEPS = 32  # of the path from the mean colour to the image
BATCH = 32  # images per forward pass
WINDOW, STRIDE = 7, 14  # fractions of the image's side: windows of 1/7, moved by 1/14


def resolve_targets(logits: Tensor, targets: Tensor | None) -> Tensor:
    """Return (N,) class indices: `targets`, or the predicted classes if None."""
    return logits.argmax(dim=1) if targets is None else targets.to(logits.device).clone()  # may be an inference tensor


def class_scores(logits: Tensor, targets: Tensor, contrast: Tensor | None) -> Tensor:
    """Return the (N,) logit of each image's class, minus that of its contrast class if given."""
    scores = logits.gather(1, targets[:, None])[:, 0]
    return scores if contrast is None else scores - logits.gather(1, contrast.to(logits.device)[:, None])[:, 0]


def pixel_maps(
    model: nn.Module, images: Tensor, method: str, targets: Tensor | None, contrast: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Return maps (N, S, S) >= 0 of one class per image, with logits (N, C) and target classes (N,).

    integrated_gradients: along the straight path from the mean colour (Gauss-Legendre, 32 steps; Eq. 1, arXiv:1703.01365).
    occlusion: loss of class score under a square of mean colour (Sec. 4.2, arXiv:1311.2901).
    Both are summed over the channels and clipped at 0, as in cam.py.
    images: (N, 3, S, S) normalised, so that the mean colour is 0. Raises ConfigError if captum is not installed.
    """
    require("captum", method, "captum")
    from captum.attr import IntegratedGradients, Occlusion

    with torch.inference_mode(False), torch.enable_grad():
        images = images.clone()  # may be an inference tensor
        with torch.no_grad():
            logits: Tensor = model(images)
        chosen = resolve_targets(logits, targets)

        def score(inputs: Tensor, classes: Tensor, others: Tensor | None) -> Tensor:
            return class_scores(model(inputs), classes, others)

        common: dict[str, Any] = {"inputs": images, "additional_forward_args": (chosen, contrast)}
        if method == "integrated_gradients":
            attributions = IntegratedGradients(score).attribute(**common, n_steps=STEPS, internal_batch_size=max(BATCH, len(images)))
        else:
            size = images.shape[-1]
            window, stride = max(1, size // WINDOW), max(1, size // STRIDE)
            with torch.no_grad():
                attributions = Occlusion(score).attribute(
                    **common,
                    sliding_window_shapes=(3, window, window),
                    strides=(3, stride, stride),
                    perturbations_per_eval=max(1, BATCH // len(images)),
                )
    return attributions.detach().sum(dim=1).clamp(min=0), logits, chosen
