"""A run x images -> Explanation: a heatmap an image, its overlay, and the scores behind it."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from torch import nn

from seewhy.core.parallel import BATCH, batched, map_ordered
from seewhy.core.progress import progress
from seewhy.data.decode import read_image
from seewhy.data.listing import find_images
from seewhy.errors import ConfigError, OutputError
from seewhy.evaluation.metrics import softmax
from seewhy.explain.attribution import FeatureMaps, default_layers, maps_of_features, named_layer, smoothed_maps
from seewhy.explain.cam import ALL_METHODS, PERTURBATION_METHODS, PIXEL_METHODS, scale_to_one
from seewhy.explain.overlay import overlay_heatmap
from seewhy.models.executors import Executor, NormalizeInput, get_executor
from seewhy.models.features import load_pixels
from seewhy.models.saved_run import SavedRun
from seewhy.models.transforms import Preprocessing, eval_view, flip_views, render

OVERLAY_SIZE = 448  # pixels of the long side; twice the usual network input, so that the image stays sharp


@dataclass(frozen=True, eq=False)
class Explanation:
    """Why the network says what it says of N images.

    maps: (N, h, w) float32, 0..1, of the class `targets[n]`, over what the network saw of the image.
    targets: (N,) class indices. probs: (N, C). method: its name in ALL_METHODS.
    """

    method: str
    paths: tuple[str, ...]
    maps: npt.NDArray[np.float32]
    targets: npt.NDArray[np.int64]
    probs: npt.NDArray[np.float64]
    classes: tuple[str, ...]
    preprocessing: Preprocessing

    def overlay(self, n: int) -> Image.Image:
        """What the network saw of the n-th image, in its own proportions, with the heatmap over it; RGB."""
        return Image.fromarray(overlay_heatmap(display_view(self.paths[n], self.preprocessing), self.maps[n]))

    def records(self) -> list[dict[str, Any]]:
        """JSON-ready: path, explained class, its probability, predicted class."""
        best = self.probs.argmax(axis=1)
        return [
            {
                "path": path,
                "class": self.classes[self.targets[n]],
                "prob": float(self.probs[n, self.targets[n]]),
                "predicted": self.classes[best[n]],
                "method": self.method,
            }
            for n, path in enumerate(self.paths)
        ]

    def save(self, folder: Path | str) -> list[Path]:
        """Writes one overlay an image, NAME.CLASS.METHOD.png; the files written."""
        folder = Path(folder)
        written: list[Path] = []
        try:
            folder.mkdir(parents=True, exist_ok=True)
            for n, path in enumerate(self.paths):
                name = re.sub(r"[^\w.-]", "_", f"{Path(path).stem}.{self.classes[self.targets[n]]}.{self.method}")
                file = folder / f"{name}.png"
                if file in written:  # the same file name in two folders
                    file = folder / f"{name}.{n}.png"
                self.overlay(n).save(file)
                written.append(file)
        except OSError as error:
            raise OutputError(f"{folder}: overlays cannot be written ({error.strerror}); choose another place with --out") from error
        return written


def display_view(path: Path | str, preprocessing: Preprocessing, long_side: int = OVERLAY_SIZE) -> npt.NDArray[np.uint8]:
    """The evaluation view in the image's own proportions: (h, w, 3) uint8 RGB, the longer side `long_side`."""
    image = read_image(path, 2 * long_side)
    view = eval_view(image.width, image.height, preprocessing)
    left, top, right, bottom = view.box
    factor = long_side / max(right - left, bottom - top)
    size = (max(1, round(factor * (right - left))), max(1, round(factor * (bottom - top))))
    return render(image, view, size, "lanczos")


def class_index(name: str, classes: Sequence[str]) -> int:
    """Position of a class by its name; ConfigError with the nearest ones otherwise."""
    if name in classes:
        return list(classes).index(name)
    import difflib

    near = difflib.get_close_matches(name, classes, n=3) or list(classes[:3])
    raise ConfigError(f"unknown class {name!r}; did you mean {' or '.join(near)}? (the run has {len(classes)} classes)")


def classes_of(names: str | Sequence[str] | None, classes: Sequence[str], n: int) -> torch.Tensor | None:
    """(n,) class indices of one name for all images or of one an image; ConfigError where their number does not fit."""
    if names is None:
        return None
    each = [names] * n if isinstance(names, str) else names
    if len(each) != n:
        raise ConfigError(f"{len(each)} classes for {n} images; name one class, or one an image")
    return torch.tensor([class_index(name, classes) for name in each])


def check_method(method: str) -> None:
    """ConfigError for a method that is not in ALL_METHODS."""
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
    """Heatmaps of the predicted class, or of class `target`, of files, folders and patterns.

    target: one class, or one an image. contrast: likewise, whose score is taken away: why the one and not the other.
    layers: dotted names of layers, fused where there are several; none: the last feature maps, which the executor of `predict`
    computes, since nothing of a map needs the gradients below the head. smooth: the mean over smooth x smooth moved copies
    (`attribution.smoothed_maps`), finer at that many times the cost.

    Raises ConfigError for an unknown method, class or layer, ImageError for an unusable image.
    """
    check_method(method)
    model, preprocessing = run.backbone.model, run.backbone.preprocessing
    for name in layers:
        named_layer(model, name)  # refused before any work
    layers = layers if method in PIXEL_METHODS else layers or default_layers(model)
    paths = find_images(inputs)
    wanted, others = (classes_of(names, run.classes, len(paths)) for names in (target, contrast))
    below = NormalizeInput(nn.Identity(), preprocessing)
    if from_images := bool(layers) or smooth > 1 or method in (*PERTURBATION_METHODS, *PIXEL_METHODS):
        forward = Executor(lambda squares: below(torch.from_numpy(squares)).numpy())
    else:
        forward = get_executor(run.executors["maps"], FeatureMaps(model), preprocessing, len(paths))
    maps, targets, logits = [], [], []

    def ways_of(batch: list[npt.NDArray[np.uint8]]) -> list[torch.Tensor]:
        """What the maps start from: of the squares and, where the run answers with the mean over both directions, mirrored."""
        return [torch.from_numpy(forward(way)) for way in flip_views(np.stack(batch), run.config.tta_flip)]

    def maps_of(way: torch.Tensor, given: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        contrasts = others[done : done + len(way)] if others is not None else None
        if from_images:
            return smoothed_maps(model, way, method, given, contrasts, layers, smooth)
        return maps_of_features(model, way, method, given, contrasts)

    done = 0
    with progress("explaining", len(paths)) as advance:
        batches = batched(map_ordered(lambda path: load_pixels(path, preprocessing), paths, workers), BATCH)
        for ways in map_ordered(ways_of, batches, forward.max_parallel_batches, ahead=forward.max_parallel_batches):
            given = wanted[done : done + len(ways[0])] if wanted is not None else None
            found, scores, chosen = maps_of(ways[0], given) if len(ways) == 1 else flip_tta_maps(maps_of, ways, given)
            maps.append(scale_to_one(found).numpy())
            targets.append(chosen.numpy())
            logits.append(scores.numpy())
            done += len(chosen)
            advance(len(chosen))
    return Explanation(
        method=method,
        paths=tuple(str(path) for path in paths),
        maps=np.concatenate(maps),
        targets=np.concatenate(targets),
        probs=softmax(np.concatenate(logits) / run.temperature),
        classes=run.classes,
        preprocessing=preprocessing,
    )


def flip_tta_maps(
    maps_of: Callable[[torch.Tensor, torch.Tensor | None], tuple[torch.Tensor, torch.Tensor, torch.Tensor]],
    ways: list[torch.Tensor],
    given: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Maps, logits and targets of what `predict` answers: means over images and their mirror images, whose maps are turned back.

    The predicted class is that of the mean logits; where a direction alone would have said another, its map is made again.
    """
    (one, plain, first), (other, mirrored, second) = (maps_of(way, given) for way in ways)
    logits = (plain + mirrored) / 2
    chosen = logits.argmax(dim=1) if given is None else given
    if not (torch.equal(first, chosen) and torch.equal(second, chosen)):
        (one, _, _), (other, _, _) = (maps_of(way, chosen) for way in ways)
    return (one + other.flip(2)) / 2, logits, chosen
