"""Class probabilities of pictures -> Predictions: a table of the most probable classes, as CSV, parquet or JSON; needs no torch."""

from __future__ import annotations

import csv
import glob
import itertools
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from seewhy.columns import Paths, Texts
from seewhy.errors import DataError, ImageError, OutputError
from seewhy.images import check_name, list_pictures
from seewhy.shards import is_shard, members, shard_of, shards_in
from seewhy.writing import harmless, harmless_path, whole_file

if TYPE_CHECKING:
    import pandas as pd

BLOCK = 1024  # pictures that are answered and kept at a time
Columns = dict[str, list[Any]]  # name -> a value a row


@dataclass(frozen=True, eq=False)
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

    def columns(self, top_k: int = 5, abstain_below: float | None = None) -> Columns:
        """One row a picture: path, class_1, prob_1, class_2, ... for the top_k most probable classes, and unknown.

        abstain_below: adds the column `answer`, class_1 where its probability is at least this and nothing elsewhere.
        """
        order = np.argsort(-self.probs, axis=1, kind="stable")[:, :top_k]
        columns: Columns = {"path": list(self.paths)}
        for k in range(order.shape[1]):
            columns[f"class_{k + 1}"] = [self.classes[c] for c in order[:, k]]
            columns[f"prob_{k + 1}"] = self.probs[np.arange(len(order)), order[:, k]].tolist()
        columns["unknown"] = self.unknown.tolist()
        if abstain_below is not None:
            columns["answer"] = [c if sure >= abstain_below else "" for c, sure in zip(columns["class_1"], columns["prob_1"], strict=True)]
        return columns

    def table(self, top_k: int = 5, abstain_below: float | None = None) -> pd.DataFrame:
        """`columns` as a DataFrame."""
        import pandas as pd  # not at the top: an exported file is answered with where there is none

        return pd.DataFrame(self.columns(top_k, abstain_below))

    def records(self, top_k: int = 5, abstain_below: float | None = None) -> list[dict[str, Any]]:
        """JSON-ready: [{"path", "top": [{"class", "prob"}, ...], "unknown"}, ...]; `abstain_below` adds "answer" (a class or null)."""
        return records_of(self.columns(top_k, abstain_below))

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
        answer = {"answer": columns["answer"][n] or None} if "answer" in columns else {}
        found.append({"path": path, "top": top, "unknown": columns["unknown"][n], **answer})
    return found


# ---------------------------------------------------------------- tables on disk


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
    with whole_file(path) as work, WRITERS[path.suffix](work) as write:
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
                rows.writerow([harmless_path(name), *map(harmless, cells)])

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


WRITERS: dict[str, Callable[[Path], AbstractContextManager[Callable[[Columns], None]]]] = {
    ".csv": _csv_writer,
    ".parquet": _parquet_writer,
    ".json": _json_writer,
}


# ---------------------------------------------------------------- pictures to predict


def find_pictures(inputs: Sequence[str | Path]) -> Paths:
    """Files, shards, paths into shards, folders (with all below) and glob patterns -> pictures, each once, in the order given.

    A folder without pictures gives those of the shards in it.
    """
    texts: Iterable[str] = (check_name(str(path)) for item in inputs for path in _pictures_of(item))
    found = Paths(Texts.of(dict.fromkeys(texts) if len(inputs) > 1 else texts))  # one alone names nothing twice
    if not found:
        raise DataError("no pictures given; name files, folders or patterns")
    return found


def _pictures_of(item: str | Path) -> Iterable[Path]:
    path = Path(item)
    if path.is_dir():
        if pictures := list_pictures(path):
            return pictures
        shards = [shard for shard in shards_in(path) if len(members(shard))]
        if not shards:
            raise DataError(f"{path}: no pictures in this folder")
        return itertools.chain(*map(_members_of, shards))
    if path.exists() or shard_of(path):
        return _members_of(path)
    matches = [Path(match) for match in sorted(set(glob.glob(str(item), recursive=True))) if Path(match).is_file()]
    if not matches:
        raise DataError(f"{item}: no such file, folder or pattern")
    return itertools.chain(*map(_members_of, matches))


def _members_of(path: Path) -> Iterable[Path]:
    return (path / member.name for member in members(path)) if is_shard(path) else [path]


def refuse_bad(bad: Sequence[tuple[str, str]], total: int, kept: int) -> ImageError:
    """What to raise for pictures that could not be used, (path, reason) each."""
    shown = ", ".join(f"{path} ({reason})" for path, reason in bad[:5])
    more = f", and {len(bad) - 5} more" if len(bad) > 5 else ""
    advice = "pass --skip-bad to leave them out" if kept else "none is left to predict"
    return ImageError(f"{len(bad)} of {total} pictures cannot be used: {shown}{more}; {advice}", bad=tuple(bad))
