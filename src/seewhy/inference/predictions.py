"""Class probabilities of images -> Predictions: a table of the most probable classes, as CSV, parquet or JSON; needs no torch."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from seewhy.core.files import atomic_write, escape_formula, escape_formula_path
from seewhy.core.parallel import Worker, map_batches
from seewhy.core.progress import progress
from seewhy.data.decode import read_or_reason
from seewhy.errors import ImageError, OutputError

if TYPE_CHECKING:
    import pandas as pd


Columns = dict[str, list[Any]]  # name -> a value a row


@dataclass(frozen=True, eq=False)
class Predictions:
    """Class probabilities of N images.

    probs: (N, C), rows summing to 1, calibrated by the run's temperature. unknown: (N,) whether an image looks like nothing that the
    run was trained on, which 5% of known images do too. bad: (path, reason) of images left out with `skip_bad`.
    """

    paths: tuple[str, ...]
    probs: npt.NDArray[np.float64]
    classes: tuple[str, ...]
    ood: npt.NDArray[np.bool_]
    bad: tuple[tuple[str, str], ...] = field(default=())

    def columns(self, top_k: int = 5, min_confidence: float | None = None) -> Columns:
        """One row an image: path, class_1, prob_1, class_2, ... for the top_k most probable classes, and unknown.

        min_confidence: adds the column `decision`, class_1 where its probability is at least this and nothing elsewhere.
        """
        order = np.argsort(-self.probs, axis=1, kind="stable")[:, :top_k]
        columns: Columns = {"path": list(self.paths)}
        for k in range(order.shape[1]):
            columns[f"class_{k + 1}"] = [self.classes[c] for c in order[:, k]]
            columns[f"prob_{k + 1}"] = self.probs[np.arange(len(order)), order[:, k]].tolist()
        columns["ood"] = self.ood.tolist()
        if min_confidence is not None:
            columns["decision"] = [
                c if sure >= min_confidence else "" for c, sure in zip(columns["class_1"], columns["prob_1"], strict=True)
            ]
        return columns

    def table(self, top_k: int = 5, min_confidence: float | None = None) -> pd.DataFrame:
        """`columns` as a DataFrame."""
        import pandas as pd  # not at the top: an exported file is answered with where there is none

        return pd.DataFrame(self.columns(top_k, min_confidence))

    def records(self, top_k: int = 5, min_confidence: float | None = None) -> list[dict[str, Any]]:
        """JSON-ready: [{"path", "top": [{"class", "prob"}, ...], "ood"}, ...]; `min_confidence` adds "decision" (a class or null)."""
        return records_of(self.columns(top_k, min_confidence))

    def save(self, path: Path | str, top_k: int = 5) -> None:
        """Writes the table; .csv, .parquet or .json by suffix, whole or not at all."""
        with open_table(path) as write:
            write(self.columns(top_k))


def records_of(columns: Columns) -> list[dict[str, Any]]:
    """`Predictions.columns` -> `Predictions.records`."""
    top_k = sum(name.startswith("class_") for name in columns)
    found = []
    for n, path in enumerate(columns["path"]):
        top = [{"class": columns[f"class_{k}"][n], "prob": columns[f"prob_{k}"][n]} for k in range(1, top_k + 1)]
        answer = {"decision": columns["decision"][n] or None} if "decision" in columns else {}
        found.append({"path": path, "top": top, "ood": columns["ood"][n], **answer})
    return found


def check_table(path: Path) -> None:
    """OutputError for a suffix that names no kind of table."""
    if path.suffix not in WRITERS:
        raise OutputError(f"{path}: unknown table format; name it .csv, .parquet or .json")


@contextmanager
def open_table(path: Path | str) -> Iterator[Callable[[Columns], None]]:
    """A function that appends rows to a file of the kind its suffix names; the file appears when all is written.

    Raises OutputError for an unknown suffix or a place that cannot be written.
    """
    path = Path(path)
    check_table(path)
    with atomic_write(path) as work, WRITERS[path.suffix](work) as write:
        yield write


@contextmanager
def _csv_writer(path: Path) -> Iterator[Callable[[Columns], None]]:
    with path.open("w", newline="", encoding="utf-8") as file:
        rows = csv.writer(file, lineterminator="\n")
        started: list[bool] = []

        def write(columns: Columns) -> None:
            if not started:
                rows.writerow(columns)
                started.append(True)
            paths, *others = columns.values()
            for name, *cells in zip(paths, *others, strict=True):
                rows.writerow([escape_formula_path(name), *map(escape_formula, cells)])

        yield write


@contextmanager
def _parquet_writer(path: Path) -> Iterator[Callable[[Columns], None]]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    opened: list[Any] = []

    def write(columns: Columns) -> None:
        block = pa.table(columns)
        if not opened:
            opened.append(pq.ParquetWriter(path, block.schema))
        opened[0].write_table(block)

    try:
        yield write
    finally:
        for writer in opened:
            writer.close()


@contextmanager
def _json_writer(path: Path) -> Iterator[Callable[[Columns], None]]:
    with path.open("w", encoding="utf-8") as file:
        between = iter(["["])

        def write(columns: Columns) -> None:
            for row in zip(*columns.values(), strict=True):
                file.write(next(between, ",") + "\n" + json.dumps(dict(zip(columns, row, strict=True)), ensure_ascii=False))

        yield write
        file.write(next(between, "") + "\n]\n")


WRITERS: dict[str, Callable[[Any], AbstractContextManager[Callable[[Columns], None]]]] = {
    ".csv": _csv_writer,
    ".parquet": _parquet_writer,
    ".json": _json_writer,
}


def unreadable_error(bad: Sequence[tuple[str, str]], total: int, kept: int, count: int | None = None, listed: str = "") -> ImageError:
    """What to raise for images that could not be used, (path, reason) each.

    total, kept: images, and those of them that can be used. count: of all bad ones, if `bad` are only the first. listed: where all stand.
    """
    advice = ("pass --skip-bad to leave them out" + (", answers are kept" if listed else "")) if kept else "none is left to predict"
    return ImageError.of(bad, total, (f"all are listed in {listed}; " if listed else "") + advice, count)


def answer_files(
    worker: Worker[Predictions], classes: tuple[str, ...], paths: Sequence[Path], skip_bad: bool = False, threads: int = 2
) -> Iterator[Predictions]:
    """Predictions of image files, a batch at a time, so that memory does not grow with their number.

    Raises ImageError with the list of unusable images unless `skip_bad`, or where none can be used.
    """
    bad: list[tuple[str, str]] = []
    kept = 0

    def answer(names: list[str], inputs: list[Any]) -> Predictions | None:
        return None if bad and not skip_bad else worker.answer(names, inputs)  # the list is all that will be said

    nothing = Predictions((), np.empty((0, len(classes))), classes, np.zeros(0, dtype=bool))
    asked = Worker(worker.prepare, answer, worker.max_parallel_batches, worker.batch)
    with progress("predicting", len(paths)) as advance:
        for names, found, left_out in map_batches(asked, paths, lambda path: (str(path), read_or_reason(path)), threads):
            kept += len(names)
            bad += left_out
            if skip_bad or not bad:
                yield replace(found or nothing, bad=tuple(left_out))
            advance(len(names) + len(left_out))
    if bad and (not skip_bad or not kept):
        raise unreadable_error(bad, len(paths), kept)


def as_columns(worker: Worker[Predictions], options: dict[str, Any]) -> Worker[Columns]:
    """The same, answering with a table's columns. options: top_k and least, as `Predictions.columns` takes them."""

    def answer(names: list[str], inputs: list[Any]) -> Columns:
        return worker.answer(names, inputs).columns(options["top_k"], options["min_confidence"])

    return Worker(worker.prepare, answer, worker.max_parallel_batches, worker.batch)
