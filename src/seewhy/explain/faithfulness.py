"""Score heatmaps by faithfulness and localisation: one pure function per metric, and random and centred baseline maps."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import cast

import numpy as np
import torch
from scipy.ndimage import distance_transform_edt
from scipy.sparse import csc_matrix
from scipy.sparse.linalg import splu
from scipy.stats import rankdata
from torch import Tensor, nn
from torch.nn import functional as F
from torchmetrics.functional.image import structural_similarity_index_measure
from torchvision.transforms.functional import gaussian_blur

from seewhy.explain.cam import scale_to_one

STEPS = 14  # of the insertion and deletion curves
MARGIN = 0.03  # around the object in the pointing game, as a fraction of the image's side
ROAD_SHARES = (0.1, 0.3, 0.5)  # of the pixels, removed; larger shares cost seconds per image
ROAD_NOISE = 0.01  # standard deviation added to imputed pixels, as in the authors' code
PredictProbs = Callable[[Tensor], Tensor]  # (M, 3, S, S) normalised images to (M, C) probabilities


@dataclass(frozen=True)
class Score:
    """A metric. of: its function, returns (N,) values. better: 'higher' or 'lower'."""

    of: Callable[..., Tensor]
    better: str


# ---------------------------------------------------------------- perturbing the image


def average_drop(probs: Tensor, masked: Tensor) -> Tensor:
    """max(0, p - p') / p of the class probabilities p of the image and p' of the image times its map. 0..1, lower is better.

    "Average drop %", Sec. 4.1, arXiv:1710.11063. A map of ones has a drop of 0: compare with `confidence_increase` and the baselines.
    """
    return (probs - masked).clamp(min=0) / probs


def confidence_increase(probs: Tensor, masked: Tensor) -> Tensor:
    """1 if the class is more probable in the image times its map than in the image (Sec. 4.1, arXiv:1710.11063)."""
    return (masked > probs).to(probs.dtype)


def deletion(predict_probs: PredictProbs, images: Tensor, targets: Tensor, maps: Tensor) -> Tensor:
    """Area under the class probability as pixels are set to the mean colour, the most salient first. 0..1, lower is better.

    Sec. 3.3, arXiv:1806.07421.
    """
    return _area(predict_probs, torch.zeros_like(images), images, targets, maps)


def insertion(predict_probs: PredictProbs, images: Tensor, targets: Tensor, maps: Tensor) -> Tensor:
    """Area under the class probability as pixels are restored in the blurred image, the most salient first. 0..1, higher is better.

    Sec. 3.3, arXiv:1806.07421; blur of 11 pixels with sigma 5, as in the authors' code.
    """
    return _area(predict_probs, images, gaussian_blur(images, [11, 11], [5.0, 5.0]), targets, maps)


def road(predict_probs: PredictProbs, images: Tensor, targets: Tensor, maps: Tensor) -> Tensor:
    """(p without the least relevant pixels - p without the most relevant ones) / 2, mean over shares. -0.5..0.5, higher is better.

    Remove and debias: removed pixels are replaced by the noisy linear imputation of Sec. 4, arXiv:2202.00449, whose shape leaks
    less of the mask than a flat colour. pytorch-grad-cam's ROADCombined, on probabilities.
    """
    total = torch.zeros(len(images), dtype=images.dtype)
    generator = torch.Generator().manual_seed(0)
    with ThreadPoolExecutor(torch.get_num_threads()) as pool:  # SuperLU releases the GIL
        for share in ROAD_SHARES:
            for sign, relevance in ((1, 1 - maps), (-1, maps)):
                removed = _most_relevant(relevance, share)
                noise = ROAD_NOISE * torch.randn(images.shape, generator=generator, dtype=images.dtype)
                imputed = torch.stack(list(pool.map(impute, images, removed, noise)))
                total += sign * class_probabilities(predict_probs, imputed, targets)
    return total / (2 * len(ROAD_SHARES))


# of: class probabilities (N,) of the images and of the images times their maps to (N,).
MASKING_METRICS = {"average drop": Score(average_drop, "lower"), "confidence increase": Score(confidence_increase, "higher")}
# of: predict_probs, images (N, 3, S, S), targets (N,) and maps (N, S, S) in 0..1 to (N,).
DELETION_METRICS = {
    "deletion AUC": Score(deletion, "lower"),
    "insertion AUC": Score(insertion, "higher"),
    "ROAD": Score(road, "higher"),
}
FAITHFULNESS_METRICS = MASKING_METRICS | DELETION_METRICS


# ---------------------------------------------------------------- localisation


def pointing_game(maps: Tensor, masks: Tensor) -> Tensor:
    """1 if the map's maximum lies within 3% of the side of the object, else 0, also for a map of zeros. Returns (N,).

    maps: (N, S, S). masks: the same, bool. The pointing game, Sec. 4.2, arXiv:1608.00507, with its margin of 15 pixels in images
    of about 500. Equal maxima share the hit.
    """
    near = [distance_transform_edt(~mask.numpy()) <= MARGIN * mask.shape[-1] for mask in masks]
    return strict_pointing_game(maps, torch.from_numpy(np.stack(near)) & masks.flatten(1).any(dim=1)[:, None, None])


def strict_pointing_game(maps: Tensor, masks: Tensor) -> Tensor:
    """1 if the map's maximum lies on the object: `pointing_game` without its margin. Maps (N, S, S) and bool masks to (N,)."""
    peak = maps.amax(dim=(1, 2), keepdim=True)
    at_peak = (maps == peak) & (peak > 0)
    return (at_peak & masks).sum(dim=(1, 2)) / at_peak.sum(dim=(1, 2)).clamp(min=1)


def energy_pointing_game(maps: Tensor, masks: Tensor) -> Tensor:
    """Share of the map's sum that lies on the object; 0 for a map of zeros. Maps (N, S, S) and bool masks to (N,), 0..1.

    The energy-based pointing game, Eq. 9, arXiv:1910.01279.
    """
    total = maps.sum(dim=(1, 2))
    return torch.where(total > 0, (maps * masks).sum(dim=(1, 2)) / torch.where(total > 0, total, 1.0), 0.0)


LOCALIZATION_METRICS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "pointing game": pointing_game,
    "strict pointing game": strict_pointing_game,
    "energy-based pointing game": energy_pointing_game,
}


# ---------------------------------------------------------------- sanity checks


def rank_correlation(maps: Tensor, others: Tensor) -> Tensor:
    """Spearman's rank correlation of each pair of maps, ties at their mean rank; 0 for a constant map. Two (N, h, w) to (N,), -1..1."""
    ranks = [torch.from_numpy(rankdata(m.flatten(1).numpy(), axis=1)) for m in (maps, others)]
    a, b = (r - r.mean(dim=1, keepdim=True) for r in ranks)
    scale = (a.square().sum(dim=1) * b.square().sum(dim=1)).sqrt()
    return torch.where(scale > 0, (a * b).sum(dim=1) / torch.where(scale > 0, scale, 1.0), 0.0)


def structural_similarity(maps: Tensor, others: Tensor) -> Tensor:
    """SSIM of each pair of maps in 0..1 (Wang 2004, by torchmetrics). Two (N, S, S) to (N,), at most 1."""
    ssim = structural_similarity_index_measure(maps[:, None].float(), others[:, None].float(), data_range=1.0, reduction="none")
    return cast(Tensor, ssim)  # a pair only with return_full_image


def randomise(model: nn.Module, parts: Sequence[str], seed: int = 0) -> None:
    """Re-initialise the named modules in place by `reset_parameters`, or shuffle the weights of modules without it.

    The cascading randomisation of Sec. 2.2, arXiv:1810.03292: a map that does not change does not depend on what was learnt.
    """
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(seed)
        for part in parts:
            for module in model.get_submodule(part).modules():
                if callable(reset := getattr(module, "reset_parameters", None)):
                    reset()
                else:
                    for parameter in module.parameters(recurse=False):
                        parameter.copy_(parameter.flatten()[torch.randperm(parameter.numel())].view_as(parameter))


# ---------------------------------------------------------------- baselines


def random_maps(n: int, size: int, seed: int = 0) -> Tensor:
    """Return (n, size, size) smooth noise in 0..1: 7 x 7 uniform numbers, enlarged like a map."""
    noise = torch.rand(n, 7, 7, generator=torch.Generator().manual_seed(seed))
    return enlarge(noise, size)


def centre_maps(n: int, size: int, seed: int = 0) -> Tensor:
    """Return (n, size, size) centred Gaussians in 0..1, sigma a quarter of the side: where objects usually are."""
    axis = (torch.arange(size) - (size - 1) / 2) / (size / 4)
    return scale_to_one(torch.exp(-(axis[:, None] ** 2 + axis[None] ** 2) / 2)[None]).expand(n, -1, -1)


BASELINES: dict[str, Callable[[int, int, int], Tensor]] = {"random": random_maps, "centre": centre_maps}


def enlarge(maps: Tensor, size: int) -> Tensor:
    """Enlarge (N, h, w) to (N, size, size) bilinearly, each map scaled to 0..1."""
    return scale_to_one(F.interpolate(maps[:, None], (size, size), mode="bilinear", align_corners=False)[:, 0].clamp(min=0))


def class_probabilities(predict_probs: PredictProbs, images: Tensor, targets: Tensor) -> Tensor:
    """Return the (N,) probability of each image's class."""
    return predict_probs(images).gather(1, targets[:, None])[:, 0]


def _ranks(maps: Tensor) -> Tensor:
    """Return the (N, S * S) rank of each pixel, the most salient first; equal ones in reading order."""
    order = maps.flatten(1).argsort(dim=1, descending=True, stable=True)
    return order.argsort(dim=1)


def _most_relevant(relevance: Tensor, share: float) -> Tensor:
    """Return (N, S, S) bool: the given share of the pixels, the most relevant ones."""
    return (_ranks(relevance) < round(share * relevance[0].numel())).view_as(relevance)


def _area(predict_probs: PredictProbs, salient: Tensor, rest: Tensor, targets: Tensor, maps: Tensor) -> Tensor:
    """Return the area (trapezoids) under the class probability as pixels of `salient` replace `rest` in the order of the map."""
    ranks, pixels = _ranks(maps).view_as(maps)[:, None], maps[0].numel()
    shares = torch.linspace(0, 1, STEPS + 1, dtype=salient.dtype)
    curve = [
        class_probabilities(predict_probs, torch.where(ranks < round(float(share) * pixels), salient, rest), targets) for share in shares
    ]
    return torch.trapezoid(torch.stack(curve, dim=1), shares, dim=1)


NEIGHBOURS = tuple((dy, dx, 1 / 6 if dy == 0 or dx == 0 else 1 / 12) for dy in (-1, 0, 1) for dx in (-1, 0, 1) if (dy, dx) != (0, 0))


def impute(image: Tensor, removed: Tensor, noise: Tensor) -> Tensor:
    """Replace each removed pixel (S, S) of an image (3, S, S) by the weighted mean of its eight neighbours, plus `noise` (3, S, S).

    Removed neighbours are unknowns, too, which gives one sparse linear system per image: Eq. 5, arXiv:2202.00449.
    """
    if not bool(removed.any()):
        return image
    if bool(removed.all()):
        return torch.zeros_like(image)
    mask, values = removed.numpy(), image.numpy().astype(np.float64)
    number = np.full(mask.shape, -1)
    number[mask] = np.arange(mask.sum())
    y, x = np.nonzero(mask)
    diagonal, known = np.zeros(len(y)), np.zeros((len(y), len(values)))
    rows, columns, weights = [], [], []
    for dy, dx, weight in NEIGHBOURS:
        inside = (y + dy >= 0) & (y + dy < mask.shape[0]) & (x + dx >= 0) & (x + dx < mask.shape[1])
        diagonal[inside] += weight
        i, ny, nx = np.flatnonzero(inside), y[inside] + dy, x[inside] + dx
        given = ~mask[ny, nx]
        known[i[given]] += weight * values[:, ny[given], nx[given]].T
        rows.append(i[~given])
        columns.append(number[ny[~given], nx[~given]])
        weights.append(np.full((~given).sum(), -weight))
    rows.append(np.arange(len(y)))
    columns.append(np.arange(len(y)))
    weights.append(diagonal)
    system = csc_matrix((np.concatenate(weights), (np.concatenate(rows), np.concatenate(columns))), shape=(len(y), len(y)))
    # The system is symmetric except at the image's border: this ordering takes half the time of the default.
    factors = splu(system, permc_spec="MMD_AT_PLUS_A", diag_pivot_thresh=0.0, options={"SymmetricMode": True})
    solved = torch.from_numpy(factors.solve(known).T).to(image.dtype)
    imputed = image.clone()
    imputed[:, removed] = solved + noise[:, removed]
    return imputed
