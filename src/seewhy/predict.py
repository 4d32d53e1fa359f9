"""A run x files -> Predictions: a table of the most probable classes, as CSV, parquet or JSON."""

from __future__ import annotations

import glob
import itertools
import json
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd

from seewhy.cutting import with_vector
from seewhy.engines import Engine, kept_engine
from seewhy.errors import DataError, ImageError, OutputError
from seewhy.features import BATCH, in_batches, in_order, square_of
from seewhy.images import list_pictures
from seewhy.metrics import softmax
from seewhy.progress import progress
from seewhy.run import Run


@dataclass(frozen=True)
class Predictions:
    """Class probabilities of N pictures.

    probs: (N, C), rows summing to 1, calibrated by the run's temperature. unknown: (N,) whether a picture looks like nothing that the
    run was trained on, which 5% of known pictures do too. bad: (path, reason) of pictures left out with `skip_bad`.
    """

    paths: tuple[str, ...]
    probs: npt.NDArray[np.float64]
    classes: tuple[str, ...]
    unknown: npt.NDArray[np.bool_]
    bad: tuple[tuple[str, str], ...] = field(default=())

    def table(self, top_k: int = 5, abstain_below: float | None = None) -> pd.DataFrame:
        """One row a picture: path, class_1, prob_1, class_2, ... for the top_k most probable classes, and unknown.

        abstain_below: adds the column `answer`, class_1 where its probability is at least this and nothing elsewhere.
        """
        order = np.argsort(-self.probs, axis=1, kind="stable")[:, :top_k]
        columns: dict[str, Any] = {"path": list(self.paths)}
        for k in range(order.shape[1]):
            columns[f"class_{k + 1}"] = [self.classes[c] for c in order[:, k]]
            columns[f"prob_{k + 1}"] = self.probs[np.arange(len(order)), order[:, k]]
        columns["unknown"] = self.unknown
        if abstain_below is not None:
            columns["answer"] = [c if sure >= abstain_below else "" for c, sure in zip(columns["class_1"], columns["prob_1"], strict=True)]
        return pd.DataFrame(columns)

    def records(self, top_k: int = 5, abstain_below: float | None = None) -> list[dict[str, Any]]:
        """JSON-ready: [{"path", "top": [{"class", "prob"}, ...], "unknown"}, ...]; `abstain_below` adds "answer" (a class or null)."""
        order = np.argsort(-self.probs, axis=1, kind="stable")[:, :top_k]
        found = []
        for n, path in enumerate(self.paths):
            top = [{"class": self.classes[c], "prob": float(self.probs[n, c])} for c in order[n]]
            answer = {"answer": top[0]["class"] if self.probs[n].max() >= abstain_below else None} if abstain_below is not None else {}
            found.append({"path": path, "top": top, "unknown": bool(self.unknown[n]), **answer})
        return found

    def save(self, path: Path | str, top_k: int = 5) -> None:
        """Writes the table; .csv, .parquet or .json by suffix, whole or not at all."""
        with open_table(path) as write:
            write(self.table(top_k))


# ---------------------------------------------------------------- tables on disk


@contextmanager
def open_table(path: Path | str) -> Iterator[Callable[[pd.DataFrame], None]]:
    """A function that appends tables to a file of the kind its suffix names; the file appears when all is written.

    Raises OutputError for an unknown suffix or a place that cannot be written.
    """
    path = Path(path)
    if path.suffix not in WRITERS:
        raise OutputError(f"{path}: unknown table format; name it .csv, .parquet or .json")
    work = path.parent / f".{path.name}-{os.getpid()}"  # not by tempfile, whose files their owner alone may read
    new_parent = not path.parent.exists()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with WRITERS[path.suffix](work) as write:
            yield write
        os.replace(work, path)
    except OSError as error:
        _remove(work, new_parent)
        raise OutputError(f"{path}: cannot be written ({error.strerror}); choose another place") from error
    except BaseException:
        _remove(work, new_parent)
        raise


def _remove(work: Path, new_parent: bool) -> None:
    with suppress(OSError):  # where the folder could not be made, neither is there a file to remove
        work.unlink()
    if new_parent:
        with suppress(OSError):
            work.parent.rmdir()


@contextmanager
def _csv_writer(path: Path) -> Iterator[Callable[[pd.DataFrame], None]]:
    with path.open("w", newline="", encoding="utf-8") as file:
        header = iter([True])
        yield lambda table: table.to_csv(file, index=False, header=next(header, False))


@contextmanager
def _parquet_writer(path: Path) -> Iterator[Callable[[pd.DataFrame], None]]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    opened: list[Any] = []

    def write(table: pd.DataFrame) -> None:
        block = pa.Table.from_pandas(table, preserve_index=False)
        if not opened:
            opened.append(pq.ParquetWriter(path, block.schema))
        opened[0].write_table(block)

    try:
        yield write
    finally:
        for writer in opened:
            writer.close()


@contextmanager
def _json_writer(path: Path) -> Iterator[Callable[[pd.DataFrame], None]]:
    with path.open("w", encoding="utf-8") as file:
        between = iter(["["])

        def write(table: pd.DataFrame) -> None:
            for record in table.to_dict("records"):
                file.write(next(between, ",") + "\n" + json.dumps(record, ensure_ascii=False))

        yield write
        file.write(next(between, "") + "\n]\n")


WRITERS: dict[str, Callable[[Path], AbstractContextManager[Callable[[pd.DataFrame], None]]]] = {
    ".csv": _csv_writer,
    ".parquet": _parquet_writer,
    ".json": _json_writer,
}


# ---------------------------------------------------------------- predicting


def find_pictures(inputs: Sequence[str | Path]) -> list[Path]:
    """Files, folders (with all below) and glob patterns -> files, in the order given."""
    found: list[Path] = []
    for item in inputs:
        path = Path(item)
        if path.is_dir():
            pictures = list_pictures(path)
            if not pictures:
                raise DataError(f"{path}: no pictures in this folder")
            found += pictures
        elif path.exists():
            found.append(path)
        else:
            matches = [Path(match) for match in sorted(glob.glob(str(item), recursive=True)) if Path(match).is_file()]
            if not matches:
                raise DataError(f"{item}: no such file, folder or pattern")
            found += matches
    if not found:
        raise DataError("no pictures given; name files, folders or patterns")
    return list(dict.fromkeys(found))


def both_ways(forward: Engine, squares: npt.NDArray[np.uint8]) -> npt.NDArray[np.float32]:
    """Mean logits of (N, size, size, 3) squares and their mirror images."""
    mean: npt.NDArray[np.float32] = np.mean([forward(squares), forward(np.ascontiguousarray(squares[:, :, ::-1]))], axis=0)
    return mean


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


def _unknown(run: Run, vectors: npt.NDArray[np.float32]) -> npt.NDArray[np.bool_]:
    """(N, K) -> (N,) which look like nothing known; none where the run cannot tell (K = 0)."""
    if run.references is None or not vectors.size:
        return np.zeros(len(vectors), dtype=bool)
    strange: npt.NDArray[np.bool_] = run.references.strangeness(vectors) > run.unknown_above
    return strange


def predict_blocks(
    run: Run, inputs: Sequence[str | Path], skip_bad: bool = False, engine: str = "auto", workers: int = 2, block: int = 4096
) -> Iterator[Predictions]:
    """The same, at most `block` pictures at a time, so that memory does not grow with their number."""
    paths = find_pictures(inputs)
    preprocessing = run.backbone.preprocessing
    classes = len(run.classes)
    network = with_vector(run.backbone, run.backbone.model) if run.references is not None else None
    kind, model = ("answers", network) if network is not None else ("network", run.backbone.model)
    forward = kept_engine(run.engines[kind], model, preprocessing, len(paths), engine)

    def square_or_reason(path: Path) -> npt.NDArray[np.uint8] | str:
        try:
            return square_of(path, preprocessing)
        except ImageError as error:
            return error.bad[0][1]

    bad: list[tuple[str, str]] = []
    kept = 0

    def answer(batch: list[tuple[Path, npt.NDArray[np.uint8] | str]]) -> tuple[list[tuple[Path, str | None]], npt.NDArray[np.float32]]:
        """What is wrong with each picture, None for nothing; logits of the others, and the vectors behind them where they are asked for."""
        good = [square for _, square in batch if not isinstance(square, str)]
        reasons = [(path, square if isinstance(square, str) else None) for path, square in batch]
        if not good or (bad and not skip_bad):  # then the list is all that will be said
            return reasons, np.empty((0, classes), dtype=np.float32)
        found = forward(np.stack(good))
        if run.config.test_flip:  # logits are the mean over both directions, vectors of the plain one
            mirrored = forward(np.ascontiguousarray(np.stack(good)[:, :, ::-1]))
            found[:, :classes] = (found[:, :classes] + mirrored[:, :classes]) / 2
        return reasons, found

    with progress("predicting", len(paths)) as advance:
        squares = zip(paths, in_order(square_or_reason, paths, workers), strict=True)
        for start in range(0, len(paths), block):
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
                yield Predictions(
                    paths=tuple(names),
                    probs=softmax(scores[:, :classes] / run.temperature),
                    classes=run.classes,
                    unknown=_unknown(run, scores[:, classes:]),
                    bad=tuple(bad[before:]),
                )
    if bad and (not skip_bad or not kept):
        shown = ", ".join(f"{path} ({reason})" for path, reason in bad[:5])
        more = f", and {len(bad) - 5} more" if len(bad) > 5 else ""
        advice = "pass --skip-bad to leave them out" if kept else "none is left to predict"
        raise ImageError(f"{len(bad)} of {len(paths)} pictures cannot be used: {shown}{more}; {advice}", bad=tuple(bad))
