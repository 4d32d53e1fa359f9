"""A run x files -> Predictions: a table of the most probable classes, as CSV, parquet or JSON."""

from __future__ import annotations

import glob
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd

from seewhy.engines import Engine, kept_engine
from seewhy.errors import DataError, ImageError, OutputError
from seewhy.features import BATCH, EVAL_VIEW, render_view
from seewhy.images import list_pictures, read_image
from seewhy.metrics import softmax
from seewhy.progress import progress
from seewhy.run import Run


@dataclass(frozen=True)
class Predictions:
    """Class probabilities of N pictures.

    probs: (N, C), rows summing to 1. bad: (path, reason) of pictures left out with `skip_bad`.
    """

    paths: tuple[str, ...]
    probs: npt.NDArray[np.float64]
    classes: tuple[str, ...]
    bad: tuple[tuple[str, str], ...] = field(default=())

    def table(self, top_k: int = 5) -> pd.DataFrame:
        """One row a picture: path, class_1, prob_1, class_2, ... for the top_k most probable classes."""
        order = np.argsort(-self.probs, axis=1, kind="stable")[:, :top_k]
        columns: dict[str, Any] = {"path": list(self.paths)}
        for k in range(order.shape[1]):
            columns[f"class_{k + 1}"] = [self.classes[c] for c in order[:, k]]
            columns[f"prob_{k + 1}"] = self.probs[np.arange(len(order)), order[:, k]]
        return pd.DataFrame(columns)

    def records(self, top_k: int = 5) -> list[dict[str, Any]]:
        """JSON-ready: [{"path", "top": [{"class", "prob"}, ...]}, ...]."""
        order = np.argsort(-self.probs, axis=1, kind="stable")[:, :top_k]
        return [
            {"path": path, "top": [{"class": self.classes[c], "prob": float(self.probs[n, c])} for c in order[n]]}
            for n, path in enumerate(self.paths)
        ]

    def save(self, path: Path | str, top_k: int = 5) -> None:
        """Writes the table; .csv, .parquet or .json by suffix, whole or not at all."""
        path = Path(path)
        writers = {".csv": _write_csv, ".parquet": _write_parquet, ".json": _write_json}
        if path.suffix not in writers:
            raise OutputError(f"{path}: unknown table format; name it .csv, .parquet or .json")
        work = path.parent / f".{path.name}-{os.getpid()}"  # not by tempfile, whose files their owner alone may read
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            writers[path.suffix](self.table(top_k), work)
            os.replace(work, path)
        except OSError as error:
            with suppress(OSError):  # where the folder could not be made, neither is there a file to remove
                work.unlink()
            raise OutputError(f"{path}: cannot be written ({error.strerror}); choose another place") from error


def _write_csv(table: pd.DataFrame, path: Path) -> None:
    table.to_csv(path, index=False)


def _write_parquet(table: pd.DataFrame, path: Path) -> None:
    table.to_parquet(path, index=False)


def _write_json(table: pd.DataFrame, path: Path) -> None:
    table.to_json(path, orient="records", indent=1)


def both_ways(forward: Engine, squares: npt.NDArray[np.uint8]) -> npt.NDArray[np.float32]:
    """Mean logits of (N, size, size, 3) squares and their mirror images."""
    mean: npt.NDArray[np.float32] = np.mean([forward(squares), forward(np.ascontiguousarray(squares[:, :, ::-1]))], axis=0)
    return mean


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


def predict(run: Run, inputs: Sequence[str | Path], skip_bad: bool = False, engine: str = "auto", workers: int = 2) -> Predictions:
    """Class probabilities of files, folders and patterns.

    Raises DataError where nothing is found, ImageError with the list of unusable pictures unless `skip_bad`.
    """
    paths = find_pictures(inputs)
    preprocessing = run.backbone.preprocessing
    forward = kept_engine(run.engines["network"], run.backbone.model, preprocessing, len(paths), engine)
    bad: list[tuple[str, str]] = []

    def square_of(path: Path) -> npt.NDArray[np.uint8] | str:
        try:
            return render_view(read_image(path, preprocessing.enough), EVAL_VIEW, "", preprocessing)
        except ImageError as error:
            return error.bad[0][1]

    kept: list[Path] = []
    logits: list[npt.NDArray[np.float32]] = []
    with ThreadPoolExecutor(max(1, workers)) as pool, progress("predicting", len(paths)) as advance:
        for start in range(0, len(paths), BATCH):
            chunk = paths[start : start + BATCH]
            squares = []
            for path, square in zip(chunk, pool.map(square_of, chunk), strict=True):
                if isinstance(square, str):
                    bad.append((str(path), square))
                else:
                    kept.append(path)
                    squares.append(square)
            if squares:
                logits.append(both_ways(forward, np.stack(squares)) if run.config.test_flip else forward(np.stack(squares)))
            advance(len(chunk))
    if bad and (not skip_bad or not kept):
        shown = ", ".join(f"{path} ({reason})" for path, reason in bad[:5])
        more = f", and {len(bad) - 5} more" if len(bad) > 5 else ""
        advice = "pass --skip-bad to leave them out" if kept else "none is left to predict"
        raise ImageError(f"{len(bad)} of {len(paths)} pictures cannot be used: {shown}{more}; {advice}", bad=tuple(bad))
    probs = softmax(np.concatenate(logits))
    return Predictions(tuple(str(path) for path in kept), probs, run.classes, tuple(bad))
