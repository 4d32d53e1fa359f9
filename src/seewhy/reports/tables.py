"""Write the tables and figures of heatmap scores and of robustness."""

from __future__ import annotations

from pathlib import Path

import pandas as pd

from seewhy.core.files import csv_text
from seewhy.errors import OutputError
from seewhy.explain.faithfulness import (
    BASELINES,
)
from seewhy.explain.method_comparison import AREA
from seewhy.reports.figures import method_scores, robustness_figure


def save_scores(table: pd.DataFrame, sanity: pd.DataFrame, folder: Path | str) -> list[Path]:
    """Writes scores.csv, its figure scores.png, and sanity.csv; the files written."""
    folder = Path(folder)
    files = [folder / "scores.csv", folder / "scores.png", folder / "sanity.csv"]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        files[0].write_text(csv_text(table), encoding="utf-8")
        files[1].write_bytes(method_scores(table.to_dict("records"), [*BASELINES, AREA]))
        files[2].write_text(csv_text(sanity), encoding="utf-8")
    except OSError as error:
        raise OutputError(f"{folder}: scores cannot be written ({error.strerror}); choose another place with --out") from error
    return files


def save_robustness(table: pd.DataFrame, parts: pd.DataFrame, folder: Path) -> list[Path]:
    """Writes robustness.csv, robustness.png and slices.csv; the files written."""
    files = [folder / "robustness.csv", folder / "robustness.png", folder / "slices.csv"]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        files[0].write_text(csv_text(table), encoding="utf-8")
        files[1].write_bytes(robustness_figure(table.to_dict("records")))
        files[2].write_text(csv_text(parts), encoding="utf-8")
    except OSError as error:
        raise OutputError(f"{folder}: cannot be written ({error.strerror}); choose another place with --out") from error
    return files
