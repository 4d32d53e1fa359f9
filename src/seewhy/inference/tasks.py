"""Make the worker of each batch task: predictions, heatmaps or features of images as rows of a table."""

from __future__ import annotations

import io
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image

from seewhy.config import TrainConfig
from seewhy.core.parallel import BATCH, Worker
from seewhy.data.decode import decode
from seewhy.data.verify import CHECK_FIELDS, ImageCheck, check_bytes
from seewhy.errors import RunError
from seewhy.evaluation.metrics import softmax
from seewhy.explain.attribution import maps_from_features
from seewhy.explain.cam import scale_to_one
from seewhy.explain.explainer import class_index, flip_tta_maps, maps_executor
from seewhy.inference.predict import logits_executor, make_worker, network_input
from seewhy.inference.predictions import Columns, to_columns
from seewhy.inference.work_units import ASSUMED_IMAGES
from seewhy.models.backbones import Backbone, create_backbone
from seewhy.models.executors import MIN_PARALLEL_IMAGES, Executor, batch_invariant, make_executor
from seewhy.models.feature_store import stored_dtype
from seewhy.models.features import feature_shape, render_view, round_to
from seewhy.models.saved_run import SavedRun, load
from seewhy.models.transforms import flip_views
from seewhy.models.trunk_tail import TrunkTail, split_backbone

MIN_IMAGES_TO_MEASURE = 5_000  # fewer do not repay the second that measuring batch sizes takes
BATCH_SIZES = (1, 2, 4, 8, 16, 32, 64, 128, 256)
MIN_SPEEDUP = 1.05  # that a larger batch must bring to be worth its memory
MEASURE_S = 0.15  # for each batch size


def choose_batch_size(measured: Sequence[tuple[int, float]]) -> int:
    """Return the smallest batch size after which throughput grows by less than MIN_SPEEDUP. measured: (size, images/s), sizes growing."""
    chosen, best = measured[0]
    for size, rate in measured[1:]:
        if rate > best * MIN_SPEEDUP:
            chosen, best = size, rate
    return chosen


def measure_batch_size(forward: Executor, side: int) -> tuple[Executor, int]:
    """Return the executor with the batch size that is fastest on this machine, and that size.

    Sizes grow until two in a row are no faster, so that one disturbed measurement does not stop the search, or memory runs out.
    """
    measured: list[tuple[int, float]] = []
    pixels = np.random.default_rng(0).integers(0, 256, (1, side, side, 3), dtype=np.uint8)
    for size in BATCH_SIZES:
        batch = np.repeat(pixels, size, axis=0)
        try:
            forward.run(batch)
            start, done = time.perf_counter(), 0
            while (elapsed := time.perf_counter() - start) < MEASURE_S or not done:
                forward.run(batch)
                done += size
        except (MemoryError, torch.cuda.OutOfMemoryError):
            break
        measured.append((size, done / elapsed))
        if len(measured) > 2 and choose_batch_size(measured) < measured[-2][0]:
            break
    if not measured:
        raise RunError("not enough memory for a single image; use fewer workers or a machine with more memory")
    size = choose_batch_size(measured)
    return replace(forward, batch=size), size


def _with_batch_size(forward: Executor, side: int, images: int) -> tuple[Executor, int]:
    """Return the executor and the batch size of its worker: BATCH, or larger if measured to be faster for many images."""
    if images < MIN_IMAGES_TO_MEASURE:
        return forward, BATCH
    forward, size = measure_batch_size(forward, side)
    return forward, max(BATCH, size)


def _predict(model_path: Path, options: dict[str, Any], images: int) -> Worker[Columns]:
    """Predict classes; options: top_k, min_confidence. Columns as in `Predictions.columns`."""
    run = load(model_path)
    forward, size = _with_batch_size(logits_executor(run, images), run.backbone.preprocessing.size, images)
    return replace(to_columns(make_worker(run, forward), options), batch=size)


def _explain(model_path: Path, options: dict[str, Any], images: int) -> Worker[Columns]:
    """Draw heatmaps; options: method, target, contrast. Columns path, class, prob, predicted, heatmap (PNG, grey, maximum 255)."""
    run = load(model_path)
    model, preprocessing = run.backbone.model, run.backbone.preprocessing
    forward, size = _with_batch_size(maps_executor(run, images), preprocessing.size, images)
    target, contrast = (options[name] and class_index(options[name], run.classes) for name in ("target", "contrast"))

    def make_maps(features: torch.Tensor, targets: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        contrasts = torch.full((len(features),), contrast) if contrast is not None else None
        return maps_from_features(model, features, options["method"], targets, contrasts)

    def answer(names: list[str], crops: list[npt.NDArray[np.uint8]]) -> Columns:
        features = [torch.from_numpy(forward(pixels)) for pixels in flip_views(np.stack(crops), run.config.tta_flip)]
        targets = torch.full((len(names),), target) if target is not None else None
        raw_maps, logits, chosen = flip_tta_maps(make_maps, features, targets)
        probs, maps = softmax(logits.numpy() / run.temperature), scale_to_one(raw_maps).numpy()
        return {
            "path": names,
            "class": [run.classes[c] for c in chosen],
            "prob": probs[np.arange(len(names)), chosen.numpy()].tolist(),
            "predicted": [run.classes[c] for c in probs.argmax(axis=1)],
            "heatmap": [_png(heatmap) for heatmap in maps],
        }

    return Worker(network_input(preprocessing), answer, forward.max_parallel_batches, size)


def _png(heatmap: npt.NDArray[np.float32]) -> bytes:
    """Encode (h, w) values in 0..1 as a grey image."""
    file = io.BytesIO()
    Image.fromarray((255 * heatmap).round().astype(np.uint8)).save(file, "PNG")
    return file.getvalue()


def build_trunk_tail(config: TrainConfig, classes: int) -> tuple[Backbone, TrunkTail]:
    """Return the network that training with this config starts from, and its frozen trunk and trained tail."""
    backbone = create_backbone(config.backbone, classes, config.weights, config.seed, config.resize, config.size)
    return backbone, split_backbone(backbone, config.unfreeze)


def _features(model_path: Path, options: dict[str, Any], images: int) -> Worker[Columns]:
    """Compute trunk features; options: config (TrainConfig as JSON), classes, views, runtime.

    Columns path, views (the features of all views as bytes) and the fields of ImageCheck. Unreadable images have a row, too, with the
    reason and no features, for the record of checked files.
    """
    config = TrainConfig.model_validate(options["config"])
    backbone, split = build_trunk_tail(config, options["classes"])
    assert split.trunk is not None  # precompute refuses a network without a frozen part
    preprocessing, views = backbone.preprocessing, range(options["views"])
    dtype = stored_dtype(feature_shape(split.trunk, preprocessing), config.feature_dtype)
    forward = make_executor(split.trunk, preprocessing, max(images, MIN_PARALLEL_IMAGES), options["runtime"])
    if options["runtime"] == "onnx":  # PyTorch's bits depend on the batch
        forward, _ = _with_batch_size(forward, preprocessing.size, images)

    def prepare(data: bytes) -> tuple[ImageCheck, list[npt.NDArray[np.uint8]]]:
        checked = check_bytes(data)
        if checked.problem:
            return checked, []
        image = decode(data, preprocessing.min_decode_side)
        return checked, [render_view(image, view, checked.sha256, preprocessing) for view in views]

    def answer(names: list[str], inputs: list[tuple[ImageCheck, list[npt.NDArray[np.uint8]]]]) -> Columns:
        crops = [crop for _, crops_of_image in inputs for crop in crops_of_image]
        rows = iter(round_to(batch_invariant(forward, np.stack(crops)), dtype) if crops else np.empty(0, dtype))
        columns: Columns = {"path": names, "views": [b"".join(next(rows).tobytes() for _ in crops) for _, crops in inputs]}
        return columns | {name: [getattr(checked, name) for checked, _ in inputs] for name in CHECK_FIELDS}

    return Worker(prepare, answer, forward.max_parallel_batches)


TASKS: dict[str, Callable[[Path, dict[str, Any], int], Worker[Columns]]] = {"predict": _predict, "explain": _explain, "features": _features}


def load_model(task: str, model_path: Path, export: bool) -> SavedRun:
    """Load a run to report errors before any work. export: also export its network to the cache, which many workers will read."""
    run = load(model_path)
    if export:
        (logits_executor if task == "predict" else maps_executor)(run, ASSUMED_IMAGES)
    return run
