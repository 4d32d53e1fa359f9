"""A run x files -> Predictions, a block at a time: decoded, answered and calibrated."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

from seewhy.cutting import WithVector
from seewhy.engines import Engine, kept_engine
from seewhy.errors import ImageError
from seewhy.features import square_of
from seewhy.metrics import softmax
from seewhy.predictions import BLOCK, Predictions, find_pictures, unreadable_error
from seewhy.progress import progress
from seewhy.run import Run
from seewhy.streams import BATCH, in_batches, in_order


def both_ways(forward: Engine, squares: npt.NDArray[np.uint8], classes: int) -> npt.NDArray[np.float32]:
    """Mean logits, the first `classes` columns, of (N, size, size, 3) squares and their mirror images; the rest is the squares' own."""
    found, mirrored = forward(squares), forward(np.ascontiguousarray(squares[:, :, ::-1]))
    mean = (found[:, :classes] + mirrored[:, :classes]) / 2
    return np.concatenate([mean, found[:, classes:]], axis=1)


def predict(run: Run, inputs: Sequence[str | Path], skip_bad: bool = False, engine: str = "auto", workers: int = 2) -> Predictions:
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


def answers_engine(run: Run, pictures: int, engine: str = "auto") -> Engine:
    """What gives logits (N, C) of squares and, where the run can tell what it does not know, the vectors behind them (N, C + K)."""
    network = run.backbone.model
    kind, model = ("network", network) if run.references is None else ("answers", WithVector(network, network))
    return kept_engine(run.engines[kind], model, run.backbone.preprocessing, pictures, engine)


def logits_of(run: Run, forward: Engine, squares: npt.NDArray[np.uint8]) -> npt.NDArray[np.float32]:
    """What `forward` of `answers_engine` says of (N, size, size, 3) squares, over both directions where the run answers so."""
    return both_ways(forward, squares, len(run.classes)) if run.config.test_flip else forward(squares)


def as_predictions(run: Run, paths: Sequence[str], scores: npt.NDArray[np.float32], bad: Sequence[tuple[str, str]]) -> Predictions:
    """`logits_of` N pictures -> their Predictions."""
    classes = len(run.classes)
    probs = softmax(scores[:, :classes] / run.temperature)
    return Predictions(tuple(paths), probs, run.classes, _unknown(run, scores[:, classes:]), tuple(bad))


def _unknown(run: Run, vectors: npt.NDArray[np.float32]) -> npt.NDArray[np.bool_]:
    """(N, K) -> (N,) which look like nothing known; none where the run cannot tell (K = 0)."""
    if run.references is None or not vectors.size:
        return np.zeros(len(vectors), dtype=bool)
    strange: npt.NDArray[np.bool_] = run.references.strangeness(vectors) > run.unknown_above
    return strange


def predict_blocks(
    run: Run,
    inputs: Sequence[str | Path],
    skip_bad: bool = False,
    engine: str = "auto",
    workers: int = 2,
    block: int = BLOCK,
) -> Iterator[Predictions]:
    """The same, at most `block` pictures at a time, so that memory does not grow with their number."""
    return answer_files(run, find_pictures(inputs), skip_bad, engine, workers, block)


def answer_files(
    run: Run,
    paths: Sequence[Path],
    skip_bad: bool = False,
    engine: str = "auto",
    workers: int = 2,
    block: int = BLOCK,
    begin: int = 0,
    kept: int = 0,
) -> Iterator[Predictions]:
    """The same of these very files, from the one at `begin` on; `kept` of those before could be used."""
    preprocessing = run.backbone.preprocessing
    classes = len(run.classes)
    forward = answers_engine(run, len(paths), engine)

    def square_or_reason(path: Path) -> npt.NDArray[np.uint8] | str:
        try:
            return square_of(path, preprocessing)
        except ImageError as error:
            return error.bad[0][1]

    bad: list[tuple[str, str]] = []

    def answer(batch: list[tuple[Path, npt.NDArray[np.uint8] | str]]) -> tuple[list[tuple[Path, str | None]], npt.NDArray[np.float32]]:
        """What is wrong with each picture, None for nothing; logits of the others, and the vectors behind them where they are asked for."""
        good = [square for _, square in batch if not isinstance(square, str)]
        reasons = [(path, square if isinstance(square, str) else None) for path, square in batch]
        if not good or (bad and not skip_bad):  # then the list is all that will be said
            return reasons, np.empty((0, classes), dtype=np.float32)
        return reasons, logits_of(run, forward, np.stack(good))

    with progress("predicting", len(paths) - begin) as advance:
        left = paths[begin:]
        squares = zip(left, in_order(square_or_reason, left, workers), strict=True)
        for start in range(begin, len(paths), block):
            part = in_batches(itertools.islice(squares, min(block, len(paths) - start)), BATCH)
            names: list[str] = []
            answers: list[npt.NDArray[np.float32]] = []
            before = len(bad)
            for reasons, found in in_order(answer, part, forward.lanes, ahead=forward.lanes):
                bad += [(str(path), reason) for path, reason in reasons if reason is not None]
                names += [str(path) for path, reason in reasons if reason is None]
                if len(found):
                    answers.append(found)
                advance(len(reasons))
            kept += len(names)
            if skip_bad or not bad:
                scores = np.concatenate(answers) if answers else np.empty((0, classes), dtype=np.float32)
                yield as_predictions(run, names, scores, bad[before:])
    if bad and (not skip_bad or not kept):
        raise unreadable_error(bad, len(paths), kept)
