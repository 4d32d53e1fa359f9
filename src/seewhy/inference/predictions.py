"""Hold class probabilities of images and write tables of the most probable classes as CSV, parquet or JSON; needs no torch."""

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

Columns = dict[str, list[Any]]  # name -> one value per row


@dataclass(frozen=True, eq=False)
class Predictions:
    """Class probabilities of N images.

    probs: (N, C), rows summing to 1, calibrated by the run's temperature. ood: (N,) whether an image looks unlike the training
    data; true for 5% of in-distribution images, too. bad: (path, reason) of images skipped with `skip_bad`.
    """

    paths: tuple[str, ...]
    probs: npt.NDArray[np.float64]
    classes: tuple[str, ...]
    ood: npt.NDArray[np.bool_]
    bad: tuple[tuple[str, str], ...] = field(default=())

    def columns(self, top_k: int = 5, min_confidence: float | None = None) -> Columns:
        """Return one row per image: path, class_1, prob_1, class_2, ... for the top_k most probable classes, and ood.

        min_confidence: adds the column `decision`, class_1 if its probability is at least this and empty otherwise.
        """
        order = np.argsort(-self.probs, axis=1, kind="stable")[:, :top_k]
        columns: Columns = {"path": list(self.paths)}
        for k in range(order.shape[1]):
            columns[f"class_{k + 1}"] = [self.classes[c] for c in order[:, k]]
            columns[f"prob_{k + 1}"] = self.probs[np.arange(len(order)), order[:, k]].tolist()
        columns["ood"] = self.ood.tolist()
        if min_confidence is not None:
            best = zip(columns["class_1"], columns["prob_1"], strict=True)
            columns["decision"] = [name if prob >= min_confidence else "" for name, prob in best]
        return columns

    def table(self, top_k: int = 5, min_confidence: float | None = None) -> pd.DataFrame:
        """Return `columns` as a DataFrame."""
        import pandas as pd  # not installed where only exported files are used

        return pd.DataFrame(self.columns(top_k, min_confidence))

    def records(self, top_k: int = 5, min_confidence: float | None = None) -> list[dict[str, Any]]:
        """Return JSON-ready rows: [{"path", "top": [{"class", "prob"}, ...], "ood"}, ...].

        min_confidence: adds "decision", a class or None.
        """
        columns = self.columns(top_k, min_confidence)
        ranks = range(1, 1 + sum(name.startswith("class_") for name in columns))
        records = []
        for n, path in enumerate(columns["path"]):
            top = [{"class": columns[f"class_{k}"][n], "prob": columns[f"prob_{k}"][n]} for k in ranks]
            decision = {"decision": columns["decision"][n] or None} if "decision" in columns else {}
            records.append({"path": path, "top": top, "ood": columns["ood"][n], **decision})
        return records

    def save(self, path: Path | str, top_k: int = 5) -> None:
        """Write the table atomically: .csv, .parquet or .json by suffix."""
        with open_table(path) as write:
            write(self.columns(top_k))


def check_table_suffix(path: Path) -> None:
    """Raise OutputError for a suffix that is no table format."""
    if path.suffix not in WRITERS:
        raise OutputError(f"{path}: unknown table format; name it .csv, .parquet or .json")


@contextmanager
def open_table(path: Path | str) -> Iterator[Callable[[Columns], None]]:
    """Yield a function that appends rows to a table in the format of its suffix; the file appears when all rows are written.

    Raises OutputError for an unknown suffix or a path that cannot be written.
    """
    path = Path(path)
    check_table_suffix(path)
    with atomic_write(path) as work, WRITERS[path.suffix](work) as write:
        yield write


@contextmanager
def _csv_writer(path: Path) -> Iterator[Callable[[Columns], None]]:
    with path.open("w", newline="", encoding="utf-8") as file:
        rows = csv.writer(file, lineterminator="\n")
        started = False

        def write(columns: Columns) -> None:
            nonlocal started
            if not started:
                rows.writerow(columns)
                started = True
            paths, *others = columns.values()
            for name, *cells in zip(paths, *others, strict=True):
                rows.writerow([escape_formula_path(name), *map(escape_formula, cells)])

        yield write


@contextmanager
def _parquet_writer(path: Path) -> Iterator[Callable[[Columns], None]]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    writer: Any = None

    def write(columns: Columns) -> None:
        nonlocal writer
        block = pa.table(columns)
        writer = writer or pq.ParquetWriter(path, block.schema)
        writer.write_table(block)

    try:
        yield write
    finally:
        if writer is not None:
            writer.close()


@contextmanager
def _json_writer(path: Path) -> Iterator[Callable[[Columns], None]]:
    with path.open("w", encoding="utf-8") as file:
        separators = iter(["["])  # then commas

        def write(columns: Columns) -> None:
            for row in zip(*columns.values(), strict=True):
                file.write(next(separators, ",") + "\n" + json.dumps(dict(zip(columns, row, strict=True)), ensure_ascii=False))

        yield write
        file.write(next(separators, "") + "\n]\n")


WRITERS: dict[str, Callable[[Any], AbstractContextManager[Callable[[Columns], None]]]] = {
    ".csv": _csv_writer,
    ".parquet": _parquet_writer,
    ".json": _json_writer,
}


def unreadable_error(bad: Sequence[tuple[str, str]], total: int, usable: int, count: int | None = None, listed_in: str = "") -> ImageError:
    """Return the error for unreadable images, (path, reason) each.

    total, usable: numbers of images. count: of all unreadable ones, if `bad` holds only the first. listed_in: file with all of them.
    """
    advice = ("pass --skip-bad to skip them" + (", results are kept" if listed_in else "")) if usable else "none is left to predict"
    return ImageError.of(bad, total, (f"all are listed in {listed_in}; " if listed_in else "") + advice, count)


def predict_files(
    worker: Worker[Predictions], classes: tuple[str, ...], paths: Sequence[Path], skip_bad: bool = False, threads: int = 2
) -> Iterator[Predictions]:
    """Yield Predictions of image files batch by batch, so that memory does not grow with their number.

    Raises ImageError with the list of unreadable images unless `skip_bad`, or if no image can be used.
    """
    bad: list[tuple[str, str]] = []
    usable = 0

    def answer(names: list[str], inputs: list[Any]) -> Predictions | None:
        return None if bad and not skip_bad else worker.answer(names, inputs)  # after an unreadable image, only look for more

    empty = Predictions((), np.empty((0, len(classes))), classes, np.zeros(0, dtype=bool))
    batch_worker = Worker(worker.prepare, answer, worker.max_parallel_batches, worker.batch)
    with progress("predicting", len(paths)) as advance:
        for names, batch, batch_bad in map_batches(batch_worker, paths, lambda path: (str(path), read_or_reason(path)), threads):
            usable += len(names)
            bad += batch_bad
            if skip_bad or not bad:
                yield replace(batch or empty, bad=tuple(batch_bad))
            advance(len(names) + len(batch_bad))
    if bad and (not skip_bad or not usable):
        raise unreadable_error(bad, len(paths), usable)


def to_columns(worker: Worker[Predictions], options: dict[str, Any]) -> Worker[Columns]:
    """Return the worker with table columns as its results. options: top_k and min_confidence, as for `Predictions.columns`."""

    def answer(names: list[str], inputs: list[Any]) -> Columns:
        return worker.answer(names, inputs).columns(options["top_k"], options["min_confidence"])

    return Worker(worker.prepare, answer, worker.max_parallel_batches, worker.batch)
