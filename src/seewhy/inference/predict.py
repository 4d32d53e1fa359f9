"""Predict class probabilities of image files with a saved run, batch by batch: decode, run the network, calibrate."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

from seewhy.core.parallel import Worker
from seewhy.data.decode import decode
from seewhy.data.listing import find_images
from seewhy.evaluation.metrics import softmax
from seewhy.inference.predictions import Predictions, predict_files
from seewhy.models.executors import Executor, flip_tta, get_executor
from seewhy.models.features import eval_pixels
from seewhy.models.saved_run import SavedRun
from seewhy.models.transforms import Preprocessing
from seewhy.models.trunk_tail import WithPenultimate


def predict(run: SavedRun, inputs: Sequence[str | Path], skip_bad: bool = False, runtime: str = "auto", workers: int = 2) -> Predictions:
    """Predict class probabilities of files, folders and patterns.

    Raises DataError if nothing is found, ImageError with the list of unreadable images unless `skip_bad`.
    """
    batches = list(predict_batches(run, inputs, skip_bad, runtime, workers))
    return Predictions(
        paths=tuple(path for batch in batches for path in batch.paths),
        probs=np.concatenate([batch.probs for batch in batches]),
        classes=run.classes,
        ood=np.concatenate([batch.ood for batch in batches]),
        bad=tuple(pair for batch in batches for pair in batch.bad),
    )


def predict_batches(
    run: SavedRun, inputs: Sequence[str | Path], skip_bad: bool = False, runtime: str = "auto", workers: int = 2
) -> Iterator[Predictions]:
    """Yield the same batch by batch, so that memory does not grow with the number of images."""
    paths = find_images(inputs)
    return predict_files(make_worker(run, logits_executor(run, len(paths), runtime)), run.classes, paths, skip_bad, workers)


def logits_executor(run: SavedRun, images: int, runtime: str = "auto") -> Executor:
    """Return the executor of logits (N, C), followed by penultimate vectors (N, C + K) if the run has an OOD reference."""
    network = run.backbone.model
    kind, model = ("network", network) if run.references is None else ("answers", WithPenultimate(network, network))
    return get_executor(run.executors[kind], model, run.backbone.preprocessing, images, runtime)


def compute_logits(run: SavedRun, forward: Executor, pixels: npt.NDArray[np.uint8]) -> npt.NDArray[np.float32]:
    """Run `logits_executor` on (N, size, size, 3) pixels, averaged over horizontal flips if the run uses flip TTA."""
    return flip_tta(forward, pixels, len(run.classes)) if run.config.tta_flip else forward(pixels)


def to_predictions(run: SavedRun, paths: Sequence[str], outputs: npt.NDArray[np.float32]) -> Predictions:
    """Make Predictions of `compute_logits`' outputs, (N, C) or (N, C + K)."""
    logits, vectors = np.split(outputs, [len(run.classes)], axis=1)
    if run.references is None or not vectors.size:
        ood = np.zeros(len(outputs), dtype=bool)
    else:
        ood = run.references.ood_score(vectors) > run.ood_threshold
    return Predictions(tuple(paths), softmax(logits / run.temperature), run.classes, ood)


def network_input(preprocessing: Preprocessing) -> Callable[[bytes], npt.NDArray[np.uint8]]:
    """Return a function that turns the bytes of an image file into (size, size, 3) pixels; it raises ValueError with the reason."""
    return lambda data: eval_pixels(decode(data, preprocessing.min_decode_side), preprocessing)


def make_worker(run: SavedRun, forward: Executor) -> Worker[Predictions]:
    """Return the worker that predicts with a run. forward: of `logits_executor`."""

    def answer(names: list[str], crops: list[npt.NDArray[np.uint8]]) -> Predictions:
        return to_predictions(run, names, compute_logits(run, forward, np.stack(crops)))

    return Worker(network_input(run.backbone.preprocessing), answer, forward.max_parallel_batches)
