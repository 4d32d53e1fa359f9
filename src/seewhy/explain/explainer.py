"""Explain a run's predictions: one heatmap per image, its overlay on the image, and the class probabilities."""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image

from seewhy.core.parallel import BATCH, batched, map_ordered
from seewhy.core.progress import progress
from seewhy.data.decode import read_image
from seewhy.data.listing import find_images
from seewhy.errors import ConfigError, OutputError
from seewhy.evaluation.metrics import softmax
from seewhy.explain.attribution import FeatureMaps, default_layers, maps_from_features, named_layer, smoothed_maps
from seewhy.explain.cam import ALL_METHODS, PERTURBATION_METHODS, PIXEL_METHODS, scale_to_one
from seewhy.explain.overlay import overlay_heatmap
from seewhy.models.executors import Executor, get_executor
from seewhy.models.features import load_pixels
from seewhy.models.saved_run import SavedRun
from seewhy.models.transforms import Normalize, Preprocessing, eval_view, flip_views, render

OVERLAY_SIZE = 448  # pixels of the long side: twice the usual network input, to keep the image sharp


@dataclass(frozen=True, eq=False)
class Explanation:
    """Heatmaps and class probabilities of N images.

    method: one of ALL_METHODS. maps: (N, h, w) float32, 0..1, evidence for class `targets[n]` in the part of the image that the
    network sees. targets: (N,) class indices. probs: (N, C).
    """

    method: str
    paths: tuple[str, ...]
    maps: npt.NDArray[np.float32]
    targets: npt.NDArray[np.int64]
    probs: npt.NDArray[np.float64]
    classes: tuple[str, ...]
    preprocessing: Preprocessing

    def overlay(self, n: int) -> Image.Image:
        """Return the n-th image as the network sees it, at its own aspect ratio, with the heatmap over it; RGB."""
        return Image.fromarray(overlay_heatmap(display_view(self.paths[n], self.preprocessing), self.maps[n]))

    def records(self) -> list[dict[str, Any]]:
        """Return JSON-ready rows: path, explained class, its probability, predicted class, method."""
        return [
            {
                "path": path,
                "class": self.classes[target],
                "prob": float(probs[target]),
                "predicted": self.classes[probs.argmax()],
                "method": self.method,
            }
            for path, target, probs in zip(self.paths, self.targets, self.probs, strict=True)
        ]

    def save(self, folder: Path | str) -> list[Path]:
        """Write one overlay per image, NAME.CLASS.METHOD.png; return the files."""
        folder = Path(folder)
        written: list[Path] = []
        try:
            folder.mkdir(parents=True, exist_ok=True)
            for n, path in enumerate(self.paths):
                name = re.sub(r"[^\w.-]", "_", f"{Path(path).stem}.{self.classes[self.targets[n]]}.{self.method}")
                file = folder / f"{name}.png"
                if file in written:  # images of the same name in two folders
                    file = folder / f"{name}.{n}.png"
                self.overlay(n).save(file)
                written.append(file)
        except OSError as error:
            raise OutputError(f"{folder}: overlays cannot be written ({error.strerror}); choose another --out") from error
        return written


def display_view(path: Path | str, preprocessing: Preprocessing, long_side: int = OVERLAY_SIZE) -> npt.NDArray[np.uint8]:
    """Return the evaluation view at the image's own aspect ratio: (h, w, 3) uint8 RGB, the longer side `long_side`."""
    image = read_image(path, 2 * long_side)
    view = eval_view(image.width, image.height, preprocessing)
    left, top, right, bottom = view.box
    factor = long_side / max(right - left, bottom - top)
    size = (max(1, round(factor * (right - left))), max(1, round(factor * (bottom - top))))
    return render(image, view, size, "lanczos")


def class_index(name: str, classes: Sequence[str]) -> int:
    """Return the index of a class; ConfigError with the closest names if there is none."""
    if name in classes:
        return list(classes).index(name)
    similar = difflib.get_close_matches(name, classes, n=3) or list(classes[:3])
    raise ConfigError(f"unknown class {name!r}; did you mean {' or '.join(similar)}? (the run has {len(classes)} classes)")


def class_indices(names: str | Sequence[str] | None, classes: Sequence[str], n: int) -> torch.Tensor | None:
    """Return (n,) class indices of one name for all images, or of one name per image; ConfigError if their number differs from n."""
    if names is None:
        return None
    names = [names] * n if isinstance(names, str) else names
    if len(names) != n:
        raise ConfigError(f"{len(names)} classes for {n} images; name one class, or one per image")
    return torch.tensor([class_index(name, classes) for name in names])


def check_method(method: str) -> None:
    """Raise ConfigError for a method that is not in ALL_METHODS."""
    if method not in ALL_METHODS:
        raise ConfigError(f"unknown method {method!r}; use one of {', '.join(ALL_METHODS)}")


def explain(
    run: SavedRun,
    inputs: Sequence[str | Path],
    method: str = "gradcam",
    target: str | Sequence[str] | None = None,
    contrast: str | Sequence[str] | None = None,
    layers: Sequence[str] = (),
    smooth: int = 1,
    workers: int = 2,
) -> Explanation:
    """Compute heatmaps of files, folders and patterns, for the predicted class or for `target`.

    target: one class, or one per image. contrast: likewise, whose score is subtracted: evidence for the one and not the other.
    layers: dotted names of layers, several are fused; none: the last feature maps, computed by an executor, since their maps need
    no gradients below the head. smooth: average over smooth x smooth shifted copies (`attribution.smoothed_maps`): finer, at that
    many times the cost.

    Raises ConfigError for an unknown method, class or layer, ImageError for an unreadable image.
    """
    check_method(method)
    model, preprocessing = run.backbone.model, run.backbone.preprocessing
    for name in layers:
        named_layer(model, name)  # raises ConfigError before any work
    layers = layers if method in PIXEL_METHODS else layers or default_layers(model)
    paths = find_images(inputs)
    all_targets, all_contrasts = (class_indices(names, run.classes, len(paths)) for names in (target, contrast))
    if from_images := bool(layers) or smooth > 1 or method in (*PERTURBATION_METHODS, *PIXEL_METHODS):
        normalize = Normalize(preprocessing)
        forward = Executor(lambda pixels: normalize(torch.from_numpy(pixels).permute(0, 3, 1, 2)).numpy())
    else:
        forward = maps_executor(run, len(paths))
    maps, targets, logits = [], [], []
    done = 0

    def network_inputs(crops: list[npt.NDArray[np.uint8]]) -> list[torch.Tensor]:
        return [torch.from_numpy(forward(pixels)) for pixels in flip_views(np.stack(crops), run.config.tta_flip)]

    def make_maps(inputs: torch.Tensor, classes: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        contrasts = all_contrasts[done : done + len(inputs)] if all_contrasts is not None else None
        if from_images:
            return smoothed_maps(model, inputs, method, classes, contrasts, layers, smooth)
        return maps_from_features(model, inputs, method, classes, contrasts)

    with progress("explaining", len(paths)) as advance:
        batches = batched(map_ordered(lambda path: load_pixels(path, preprocessing), paths, workers), BATCH)
        for flips in map_ordered(network_inputs, batches, forward.max_parallel_batches, ahead=forward.max_parallel_batches):
            classes = all_targets[done : done + len(flips[0])] if all_targets is not None else None
            raw_maps, batch_logits, chosen = flip_tta_maps(make_maps, flips, classes)
            maps.append(scale_to_one(raw_maps).numpy())
            targets.append(chosen.numpy())
            logits.append(batch_logits.numpy())
            done += len(chosen)
            advance(len(chosen))
    probs = softmax(np.concatenate(logits) / run.temperature)
    names = tuple(str(path) for path in paths)
    return Explanation(method, names, np.concatenate(maps), np.concatenate(targets), probs, run.classes, preprocessing)


def maps_executor(run: SavedRun, images: int) -> Executor:
    """Return the executor of the last feature maps: (N, size, size, 3) uint8 to features as the network lays them out."""
    return get_executor(run.executors["maps"], FeatureMaps(run.backbone.model), run.backbone.preprocessing, images)


def flip_tta_maps(
    make_maps: Callable[[torch.Tensor, torch.Tensor | None], tuple[torch.Tensor, torch.Tensor, torch.Tensor]],
    flips: list[torch.Tensor],
    targets: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Average maps (N, h, w) and logits (N, C) over images and their horizontal flips; return both, and the classes explained (N,).

    make_maps: inputs and classes to maps, logits and classes. flips: the inputs, and those of the flipped images for flip TTA.
    The predicted class is that of the mean logits; if either alone predicts another, its maps are computed again.
    """
    if len(flips) == 1:
        return make_maps(flips[0], targets)
    (maps, logits, first), (mirrored_maps, mirrored_logits, second) = (make_maps(inputs, targets) for inputs in flips)
    logits = (logits + mirrored_logits) / 2
    chosen = logits.argmax(dim=1) if targets is None else targets
    if not (torch.equal(first, chosen) and torch.equal(second, chosen)):
        (maps, _, _), (mirrored_maps, _, _) = (make_maps(inputs, chosen) for inputs in flips)
    return (maps + mirrored_maps.flip(2)) / 2, logits, chosen
