"""Write result tables and their figures into a folder."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pandas as pd

from seewhy.core.files import csv_text, write_json
from seewhy.errors import OutputError
from seewhy.explain.faithfulness import BASELINES
from seewhy.explain.method_comparison import OBJECT_AREA
from seewhy.reports.figures import method_scores, robustness_figure


def write_files(folder: Path, contents: Mapping[str, pd.DataFrame | dict[str, Any] | str | bytes]) -> list[Path]:
    """Write name -> content into `folder`, tables as CSV and dicts as JSON; the files written.

    Raises OutputError if the folder cannot be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, content in contents.items():
            if isinstance(content, dict):
                write_json(folder / name, content)
            elif isinstance(content, bytes):
                (folder / name).write_bytes(content)
            else:
                (folder / name).write_text(content if isinstance(content, str) else csv_text(content), encoding="utf-8")
    except OSError as error:
        raise OutputError(f"{folder}: cannot be written ({error.strerror}); choose another folder with --out") from error
    return [folder / name for name in contents]


def save_scores(table: pd.DataFrame, sanity: pd.DataFrame, folder: Path | str) -> list[Path]:
    """Write scores.csv, its figure scores.png, and sanity.csv; the files written."""
    figure = method_scores(table.to_dict("records"), [*BASELINES, OBJECT_AREA])
    return write_files(Path(folder), {"scores.csv": table, "scores.png": figure, "sanity.csv": sanity})


def save_robustness(table: pd.DataFrame, slices: pd.DataFrame, folder: Path) -> list[Path]:
    """Write robustness.csv, its figure robustness.png, and slices.csv; the files written."""
    figure = robustness_figure(table.to_dict("records"))
    return write_files(folder, {"robustness.csv": table, "robustness.png": figure, "slices.csv": slices})
