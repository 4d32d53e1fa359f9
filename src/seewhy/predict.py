"""A run x files -> Predictions, a batch at a time: decoded, answered and calibrated."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

from seewhy.cutting import WithVector
from seewhy.decoding import decode
from seewhy.engines import Engine, kept_engine
from seewhy.features import square_in
from seewhy.metrics import softmax
from seewhy.predictions import Predictions, answer_files, find_pictures
from seewhy.saved_run import SavedRun
from seewhy.streams import Worker
from seewhy.transforms import directions


def both_ways(forward: Engine, squares: npt.NDArray[np.uint8], classes: int) -> npt.NDArray[np.float32]:
    """Mean logits, the first `classes` columns, of (N, size, size, 3) squares and their mirror images; the rest is the squares' own."""
    found, mirrored = map(forward, directions(squares, True))
    mean = (found[:, :classes] + mirrored[:, :classes]) / 2
    return np.concatenate([mean, found[:, classes:]], axis=1)


def predict(run: SavedRun, inputs: Sequence[str | Path], skip_bad: bool = False, engine: str = "auto", workers: int = 2) -> Predictions:
    """Class probabilities of files, folders and patterns.

    Raises DataError where nothing is found, ImageError with the list of unusable pictures unless `skip_bad`.
    """
    blocks = list(predict_blocks(run, inputs, skip_bad, engine, workers))
    return Predictions(
        paths=tuple(path for block in blocks for path in block.paths),
        probs=np.concatenate([block.probs for block in blocks]),
        classes=run.classes,
        unknown=np.concatenate([block.unknown for block in blocks]),
        bad=tuple(pair for block in blocks for pair in block.bad),
    )


def answers_engine(run: SavedRun, pictures: int, engine: str = "auto") -> Engine:
    """What gives logits (N, C) of squares and, where the run can tell what it does not know, the vectors behind them (N, C + K)."""
    network = run.backbone.model
    kind, model = ("network", network) if run.references is None else ("answers", WithVector(network, network))
    return kept_engine(run.engines[kind], model, run.backbone.preprocessing, pictures, engine)


def logits_of(run: SavedRun, forward: Engine, squares: npt.NDArray[np.uint8]) -> npt.NDArray[np.float32]:
    """What `forward` of `answers_engine` says of (N, size, size, 3) squares, over both directions where the run answers so."""
    return both_ways(forward, squares, len(run.classes)) if run.config.test_flip else forward(squares)


def as_predictions(run: SavedRun, paths: Sequence[str], scores: npt.NDArray[np.float32]) -> Predictions:
    """`logits_of` N pictures -> their Predictions."""
    classes = len(run.classes)
    probs = softmax(scores[:, :classes] / run.temperature)
    return Predictions(tuple(paths), probs, run.classes, _unknown(run, scores[:, classes:]))


def _unknown(run: SavedRun, vectors: npt.NDArray[np.float32]) -> npt.NDArray[np.bool_]:
    """(N, K) -> (N,) which look like nothing known; none where the run cannot tell (K = 0)."""
    if run.references is None or not vectors.size:
        return np.zeros(len(vectors), dtype=bool)
    strange: npt.NDArray[np.bool_] = run.references.strangeness(vectors) > run.unknown_above
    return strange


def worker_of(run: SavedRun, forward: Engine) -> Worker[Predictions]:
    """What answers by a run. forward: of `answers_engine`."""
    preprocessing = run.backbone.preprocessing

    def answer(names: list[str], squares: list[npt.NDArray[np.uint8]]) -> Predictions:
        return as_predictions(run, names, logits_of(run, forward, np.stack(squares)))

    return Worker(lambda data: square_in(decode(data, preprocessing.enough), preprocessing), answer, forward.lanes)


def predict_blocks(
    run: SavedRun, inputs: Sequence[str | Path], skip_bad: bool = False, engine: str = "auto", workers: int = 2
) -> Iterator[Predictions]:
    """The same, a batch at a time, so that memory does not grow with the number of pictures."""
    paths = find_pictures(inputs)
    return answer_files(worker_of(run, answers_engine(run, len(paths), engine)), run.classes, paths, skip_bad, workers)
