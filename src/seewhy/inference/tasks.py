"""What one worker does with images, by a network: predictions, heatmaps or features, as rows of a table; here or on another machine."""

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
from seewhy.explain.attribution import FeatureMaps, maps_of_features
from seewhy.explain.cam import scale_to_one
from seewhy.explain.explainer import class_index, flip_tta_maps
from seewhy.inference.predict import logits_executor, worker_of
from seewhy.inference.predictions import Columns, as_columns
from seewhy.models.backbones import Backbone, create_backbone
from seewhy.models.executors import MIN_PARALLEL_IMAGES, Executor, batch_invariant, get_executor, make_executor
from seewhy.models.feature_store import stored_dtype
from seewhy.models.features import eval_pixels, feature_shape, render_view, round_to
from seewhy.models.saved_run import SavedRun, load
from seewhy.models.transforms import flip_views
from seewhy.models.trunk_tail import TrunkTail, split_backbone

MANY_ASKED = 1_000_000  # images that a job is made ready for; only "many" counts
WORTH_MEASURING = 5_000  # images from which finding the best batch size, about a second, is won back
BATCHES = (1, 2, 4, 8, 16, 32, 64, 128, 256)  # that are tried
GAIN = 1.05  # what twice the batch has to be faster by, to be worth its memory
TRIED_S = 0.15  # a batch size


# ---------------------------------------------------------------- how many at once


def choose_batch(measured: Sequence[tuple[int, float]]) -> int:
    """(batch size, images a second) of growing sizes -> the smallest size from which the next ones gain less than GAIN.

    Two steps are looked at, so that one disturbed measurement does not end the growth.
    """
    chosen, best = measured[0]
    for size, rate in measured[1:]:
        if rate > best * GAIN:
            chosen, best = size, rate
    return chosen


def measured_batch(forward: Executor, side: int) -> tuple[Executor, int]:
    """The executor with the batch size that is fastest here, and that size; sizes grow until two in a row gain nothing or memory is out."""
    measured: list[tuple[int, float]] = []
    squares = np.random.default_rng(0).integers(0, 256, (1, side, side, 3), dtype=np.uint8)
    for size in BATCHES:
        batch = np.repeat(squares, size, axis=0)
        try:
            forward.run(batch)
            began, done = time.perf_counter(), 0
            while (spent := time.perf_counter() - began) < TRIED_S or not done:
                forward.run(batch)
                done += size
        except (MemoryError, torch.cuda.OutOfMemoryError):
            break
        measured.append((size, done / spent))
        if len(measured) > 2 and choose_batch(measured) < measured[-2][0]:
            break
    if not measured:
        raise RunError("not even one image fits into memory here; ask fewer workers, or a machine with more")
    size = choose_batch(measured)
    return replace(forward, batch=size), size


def _settled(forward: Executor, side: int, images: int) -> tuple[Executor, int]:
    """The executor and how many squares it is given at once: BATCH, or more where many are asked about and it takes more."""
    if images < WORTH_MEASURING:
        return forward, BATCH
    forward, size = measured_batch(forward, side)
    return forward, max(BATCH, size)


# ---------------------------------------------------------------- predict


def _predict(asked: Path, options: dict[str, Any], images: int) -> Worker[Columns]:
    """options: top_k, least. Columns as `Predictions.columns`."""
    run = load(asked)
    forward, size = _settled(logits_executor(run, images), run.backbone.preprocessing.size, images)
    return replace(as_columns(worker_of(run, forward), options), batch=size)


# ---------------------------------------------------------------- explain


def _explain(asked: Path, options: dict[str, Any], images: int) -> Worker[Columns]:
    """options: method, target, contrast. Columns path, class, prob, predicted, heatmap: a grey PNG of the network's last maps, 255 most."""
    run = load(asked)
    model, preprocessing = run.backbone.model, run.backbone.preprocessing
    forward = get_executor(run.executors["maps"], FeatureMaps(model), preprocessing, images)
    forward, size = _settled(forward, preprocessing.size, images)
    target, contrast = (options[name] and class_index(options[name], run.classes) for name in ("target", "contrast"))

    def maps_of(way: torch.Tensor, given: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        held = torch.full((len(way),), contrast) if contrast is not None else None
        return maps_of_features(model, way, options["method"], given, held)

    def answer(names: list[str], squares: list[npt.NDArray[np.uint8]]) -> Columns:
        features = [torch.from_numpy(forward(way)) for way in flip_views(np.stack(squares), run.config.tta_flip)]
        given = torch.full((len(names),), target) if target is not None else None
        found, logits, chosen = maps_of(features[0], given) if len(features) == 1 else flip_tta_maps(maps_of, features, given)
        probs, maps = softmax(logits.numpy() / run.temperature), scale_to_one(found).numpy()
        return {
            "path": names,
            "class": [run.classes[c] for c in chosen],
            "prob": probs[np.arange(len(names)), chosen.numpy()].tolist(),
            "predicted": [run.classes[c] for c in probs.argmax(axis=1)],
            "heatmap": [_png(each) for each in maps],
        }

    return Worker(
        lambda data: eval_pixels(decode(data, preprocessing.min_decode_side), preprocessing), answer, forward.max_parallel_batches, size
    )


def _png(heatmap: npt.NDArray[np.float32]) -> bytes:
    """(h, w) of 0..1 -> a grey image."""
    file = io.BytesIO()
    Image.fromarray((255 * heatmap).round().astype(np.uint8)).save(file, "PNG")
    return file.getvalue()


# ---------------------------------------------------------------- features


def frozen_part(config: TrainConfig, classes: int) -> tuple[Backbone, TrunkTail]:
    """The network that such a training starts from, and its cut."""
    backbone = create_backbone(config.backbone, classes, config.weights, config.seed, config.resize, config.size)
    return backbone, split_backbone(backbone, config.unfreeze)


def _features(asked: Path, options: dict[str, Any], images: int) -> Worker[Columns]:
    """options: config (of train, as JSON), classes, views, runtime. Columns path, views (all in a row of bytes), and those of ImageCheck.

    Images that cannot be used have a row too, with the reason and no views: the record of checked files wants them.
    """
    config = TrainConfig.model_validate(options["config"])
    backbone, cut = frozen_part(config, options["classes"])
    assert cut.trunk is not None  # the command refuses what has nothing frozen
    preprocessing, views = backbone.preprocessing, range(options["views"])
    dtype = stored_dtype(feature_shape(cut.trunk, preprocessing), config.feature_dtype)
    forward = make_executor(cut.trunk, preprocessing, max(images, MIN_PARALLEL_IMAGES), options["runtime"])
    if options["runtime"] == "onnx":  # PyTorch's bits depend on the batch
        forward, _ = _settled(forward, preprocessing.size, images)

    def prepare(data: bytes) -> tuple[ImageCheck, list[npt.NDArray[np.uint8]]]:
        checked = check_bytes(data)
        if checked.problem:
            return checked, []
        image = decode(data, preprocessing.min_decode_side)
        return checked, [render_view(image, view, checked.sha256, preprocessing) for view in views]

    def answer(names: list[str], found: list[tuple[ImageCheck, list[npt.NDArray[np.uint8]]]]) -> Columns:
        squares = [square for _, each in found for square in each]
        features = round_to(batch_invariant(forward, np.stack(squares)), dtype) if squares else np.empty(0, dtype)
        rows = iter(features)
        kept = [b"".join(next(rows).tobytes() for _ in each) for _, each in found]
        columns: Columns = {"path": names, "views": kept}
        for name in CHECK_FIELDS:
            columns[name] = [getattr(checked, name) for checked, _ in found]
        return columns

    return Worker(prepare, answer, forward.max_parallel_batches)


JOBS: dict[str, Callable[[Path, dict[str, Any], int], Worker[Columns]]] = {"predict": _predict, "explain": _explain, "features": _features}


def prepared(job: str, asked: Path, workers: bool) -> SavedRun:
    """A run, loaded before any work, so that mistakes are told of first. workers: whether many will want the export of its network."""
    run = load(asked)
    if workers and job == "predict":
        logits_executor(run, MANY_ASKED)
    elif workers:
        get_executor(run.executors["maps"], FeatureMaps(run.backbone.model), run.backbone.preprocessing, MANY_ASKED)
    return run
