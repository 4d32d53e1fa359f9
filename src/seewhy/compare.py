"""Runs -> which of two is better on the same pictures, and how much one recipe varies over splits."""

from __future__ import annotations

import json
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from seewhy.config import TrainConfig
from seewhy.errors import ConfigError, DataError, OutputError, RunError
from seewhy.evaluate import Evaluation, evaluate_part, evaluate_run
from seewhy.images import open_images
from seewhy.metrics import HEADLINE, Comparison, compare_paired
from seewhy.progress import LOG
from seewhy.saved_run import SavedRun
from seewhy.split import read_split
from seewhy.workflow import train_run
from seewhy.writing import csv_text, write_json


@dataclass(frozen=True)
class RunComparison:
    """a, b: what each run says of the same pictures. paired: their comparison; difference is b - a."""

    a: Evaluation
    b: Evaluation
    paired: Comparison


def compare_runs(a: SavedRun, b: SavedRun, data: str | None = None) -> RunComparison:
    """Two runs on the pictures that are in the test part of both, or on all pictures of another labelled folder.

    Raises RunError where the runs do not know the same classes, or share no test picture.
    """
    if set(a.classes) != set(b.classes):
        only = sorted(set(a.classes) ^ set(b.classes))
        raise RunError(f"{a.path} and {b.path} know different classes ({only[0]!r} is in one alone); compare runs of the same classes")
    if data is not None:
        found = [evaluate_run(run, data=data) for run in (a, b)]
        groups = found[0].groups
    else:
        images = open_images(a.config.data, a.config.data_root, a.config.skip_bad, a.config.workers)
        splits = [read_split(run.path, images) for run in (a, b)]
        shared = np.intersect1d(splits[0].test, splits[1].test)
        if not len(shared):
            raise RunError(f"{a.path} and {b.path} share no test picture; train one with --split-from the other")
        found = [_on(run, images, shared, splits[0].groups) for run in (a, b)]
        groups = found[0].groups
    right = [np.array([e.classes[p] for p in e.predicted]) == np.array([e.classes[t] for t in e.labels]) for e in found]
    return RunComparison(found[0], found[1], compare_paired(right[0], right[1], groups))


def differences(a: SavedRun, b: SavedRun) -> dict[str, tuple[Any, Any]]:
    """What their records say differently that can change a number: options, data, split, versions, hardware. Name -> value in a, in b.

    Empty for runs that have to have the same weights, bit for bit.
    """
    found = {}
    for part in ("config", "data", "split", "backbone", "preprocessing", "versions", "hardware"):
        ours, theirs = (json.loads(json.dumps(run.manifest.get(part) or {})) for run in (a, b))  # as if both had been read from a file
        for name in sorted(ours.keys() | theirs.keys()):
            pair = ours.get(name), theirs.get(name)
            if pair[0] != pair[1] and (part not in ("data", "split") or name == "hash"):
                found[f"{part}.{name}"] = pair
    return found


def _on(run: SavedRun, images: Any, indices: Any, groups: Any) -> Evaluation:
    if images.classes != run.classes:
        raise DataError(
            f"{images.root}: holds other classes than {run.path} was trained on; pass --data with labelled pictures of its classes"
        )
    return evaluate_part(images, indices, "shared test", run.backbone, run.cut, run.config, groups, run.temperature)


# ---------------------------------------------------------------- the same again on other splits


def repeat(config: TrainConfig, repeats: int, out: Path | None, resume: bool = False) -> tuple[Path, pd.DataFrame]:
    """Trains `repeats` runs with seeds config.seed, config.seed + 1, ...: a split, a start and an order each.

    Returns the folder (default runs/NAME-repeats) and its table: a row a seed with the headline numbers of val and test.
    The folder receives seedN/ for each run, repeats.csv and repeats.json (mean, standard deviation over the splits, n).
    resume: goes on with the runs that are missing or unfinished.
    """
    data = Path(config.data).name or "data"
    folder = out or Path("runs") / f"{data}-{config.backbone}-unfreeze{config.unfreeze}-repeats"
    if config.split_from:
        raise ConfigError("--repeats draws a split for each run, and --split-from gives one; leave one of them out")
    if folder.exists() and (not folder.is_dir() or (any(folder.iterdir()) and not resume)):
        raise OutputError(f"{folder}: exists already; choose another --out, remove it, or pass --resume")
    rows = []
    for number in range(repeats):
        seed = config.seed + number
        LOG.info(f"repeat {number + 1} of {repeats}: seed {seed}")
        run = train_run(config.model_copy(update={"seed": seed}), folder / f"seed{seed}", resume)
        rows.append({"seed": seed, **{f"{part}_{name}": run.metrics[part][name] for part in ("val", "test") for name in HEADLINE}})
    table = pd.DataFrame(rows)
    try:
        (folder / "repeats.csv").write_text(csv_text(table), encoding="utf-8")
        write_json(folder / "repeats.json", {"n": repeats, **spread(table)})
    except OSError as error:
        raise OutputError(f"{folder}: cannot be written ({error.strerror}); the runs in it are whole") from error
    return folder, table


def spread(table: pd.DataFrame) -> dict[str, dict[str, float | None]]:
    """Column -> mean and sample standard deviation over the rows (None for one row)."""
    found = {}
    for name in table.columns:
        if name != "seed":
            values: Sequence[float] = table[name].tolist()
            found[name] = {"mean": statistics.mean(values), "sd": statistics.stdev(values) if len(values) > 1 else None}
    return found
