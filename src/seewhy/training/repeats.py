"""Train one config on several random splits and summarise its metrics by mean and standard deviation."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path

import pandas as pd

from seewhy.config import TrainConfig
from seewhy.core.files import csv_text, write_json
from seewhy.core.progress import LOG
from seewhy.errors import ConfigError, OutputError
from seewhy.evaluation.metrics import HEADLINE
from seewhy.training.pipeline import train_run


def repeat(config: TrainConfig, repeats: int, out: Path | None, resume: bool = False) -> tuple[Path, pd.DataFrame]:
    """Train `repeats` runs with seeds config.seed, config.seed + 1, ...; each has its own split, initialisation and order.

    Returns the folder (default runs/NAME-repeats) and a table with the headline metrics of val and test, a row for each seed.
    The folder contains seedN/ for each run, repeats.csv and repeats.json (mean, standard deviation over the splits, n).
    resume: train the missing and unfinished runs only.
    """
    data = Path(config.data).name or "data"
    folder = out or Path("runs") / f"{data}-{config.backbone}-unfreeze{config.unfreeze}-repeats"
    if config.split_from:
        raise ConfigError("--repeats makes a split for each run and --split-from reads one; leave one of them out")
    if folder.exists() and (not folder.is_dir() or (any(folder.iterdir()) and not resume)):
        raise OutputError(f"{folder}: exists already; choose another --out, remove it, or pass --resume")
    rows = []
    for number in range(repeats):
        seed = config.seed + number
        LOG.info(f"repeat {number + 1} of {repeats}: seed {seed}")
        run = train_run(config.model_copy(update={"seed": seed}), folder / f"seed{seed}", resume)
        metrics = {f"{part}_{name}": run.metrics[part].get(name) for part in ("val", "test") for name in HEADLINE}
        rows.append({"seed": seed, **{name: value for name, value in metrics.items() if value is not None}})
    table = pd.DataFrame(rows)
    try:
        (folder / "repeats.csv").write_text(csv_text(table), encoding="utf-8")
        write_json(folder / "repeats.json", {"n": repeats, **spread(table)})
    except OSError as error:
        raise OutputError(f"{folder}: cannot be written ({error.strerror}); the runs in it are complete") from error
    return folder, table


def spread(table: pd.DataFrame) -> dict[str, dict[str, float | None]]:
    """Mean and sample standard deviation (None for one row) of each column but the seed."""
    summary = {}
    for name in table.columns.drop("seed", errors="ignore"):
        values: Sequence[float] = table[name].tolist()
        summary[name] = {"mean": statistics.mean(values), "sd": statistics.stdev(values) if len(values) > 1 else None}
    return summary
