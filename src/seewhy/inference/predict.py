"""A run x files -> Predictions, a batch at a time: decoded, answered and calibrated."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

from seewhy.core.parallel import Worker
from seewhy.data.decode import decode
from seewhy.data.listing import find_images
from seewhy.evaluation.metrics import softmax
from seewhy.inference.predictions import Predictions, answer_files
from seewhy.models.executors import Executor, flip_tta, get_executor
from seewhy.models.features import eval_pixels
from seewhy.models.saved_run import SavedRun
from seewhy.models.trunk_tail import WithPenultimate


def predict(run: SavedRun, inputs: Sequence[str | Path], skip_bad: bool = False, runtime: str = "auto", workers: int = 2) -> Predictions:
    """Class probabilities of files, folders and patterns.

    Raises DataError where nothing is found, ImageError with the list of unusable images unless `skip_bad`.
    """
    blocks = list(predict_blocks(run, inputs, skip_bad, runtime, workers))
    return Predictions(
        paths=tuple(path for block in blocks for path in block.paths),
        probs=np.concatenate([block.probs for block in blocks]),
        classes=run.classes,
        ood=np.concatenate([block.ood for block in blocks]),
        bad=tuple(pair for block in blocks for pair in block.bad),
    )


def logits_executor(run: SavedRun, images: int, runtime: str = "auto") -> Executor:
    """What gives logits (N, C) of squares and, where the run can tell what it does not know, the vectors behind them (N, C + K)."""
    network = run.backbone.model
    kind, model = ("network", network) if run.references is None else ("answers", WithPenultimate(network, network))
    return get_executor(run.executors[kind], model, run.backbone.preprocessing, images, runtime)


def logits_of(run: SavedRun, forward: Executor, squares: npt.NDArray[np.uint8]) -> npt.NDArray[np.float32]:
    """What `forward` of `logits_executor` says of (N, size, size, 3) squares, over both directions where the run answers so."""
    return flip_tta(forward, squares, len(run.classes)) if run.config.tta_flip else forward(squares)


def as_predictions(run: SavedRun, paths: Sequence[str], scores: npt.NDArray[np.float32]) -> Predictions:
    """`logits_of` N images -> their Predictions."""
    classes = len(run.classes)
    probs = softmax(scores[:, :classes] / run.temperature)
    return Predictions(tuple(paths), probs, run.classes, _unknown(run, scores[:, classes:]))


def _unknown(run: SavedRun, vectors: npt.NDArray[np.float32]) -> npt.NDArray[np.bool_]:
    """(N, K) -> (N,) which look like nothing known; none where the run cannot tell (K = 0)."""
    if run.references is None or not vectors.size:
        return np.zeros(len(vectors), dtype=bool)
    strange: npt.NDArray[np.bool_] = run.references.ood_score(vectors) > run.ood_threshold
    return strange


def worker_of(run: SavedRun, forward: Executor) -> Worker[Predictions]:
    """What answers by a run. forward: of `logits_executor`."""
    preprocessing = run.backbone.preprocessing

    def answer(names: list[str], squares: list[npt.NDArray[np.uint8]]) -> Predictions:
        return as_predictions(run, names, logits_of(run, forward, np.stack(squares)))

    return Worker(
        lambda data: eval_pixels(decode(data, preprocessing.min_decode_side), preprocessing), answer, forward.max_parallel_batches
    )


def predict_blocks(
    run: SavedRun, inputs: Sequence[str | Path], skip_bad: bool = False, runtime: str = "auto", workers: int = 2
) -> Iterator[Predictions]:
    """The same, a batch at a time, so that memory does not grow with the number of images."""
    paths = find_images(inputs)
    return answer_files(worker_of(run, logits_executor(run, len(paths), runtime)), run.classes, paths, skip_bad, workers)
