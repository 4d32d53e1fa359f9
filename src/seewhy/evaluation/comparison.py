"""Compare two runs on the same images, and list what differs between their records."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

import numpy as np

from seewhy.curation.split import read_split
from seewhy.data.image_set import open_images
from seewhy.errors import DataError, RunError
from seewhy.evaluation.evaluate import Evaluation, evaluate_part, evaluate_run
from seewhy.evaluation.metrics import Comparison, compare_paired
from seewhy.models.saved_run import SavedRun


@dataclass(frozen=True, eq=False)
class RunComparison:
    """Evaluations of runs a and b on the same images, and their paired comparison (difference: b - a)."""

    a: Evaluation
    b: Evaluation
    paired: Comparison


def compare_runs(a: SavedRun, b: SavedRun, data: str | None = None) -> RunComparison:
    """Compare two runs on the images that are in the test part of both, or on all images of another labelled folder.

    Raises RunError if the runs have different classes or share no test image, DataError if run a's dataset has changed its classes.
    """
    if set(a.classes) != set(b.classes):
        only = sorted(set(a.classes) ^ set(b.classes))
        raise RunError(f"{a.path} and {b.path} have different classes (only one has {only[0]!r}); compare runs of the same classes")
    if data is not None:
        evaluations = [evaluate_run(run, data=data) for run in (a, b)]
    else:
        images = open_images(a.config.data, a.config.data_root, a.config.skip_bad, a.config.workers)
        splits = [read_split(run.path, images) for run in (a, b)]
        shared = np.intersect1d(splits[0].test, splits[1].test)
        if not len(shared):
            raise RunError(f"{a.path} and {b.path} share no test image; train one with --split-from the other")
        for run in (a, b):
            if images.classes != run.classes:
                raise DataError(f"{images.root}: has other classes than {run.path}; pass --data with labelled images of its classes")
        evaluations = [
            evaluate_part(images, shared, "shared test", run.backbone, run.cut, run.config, splits[0].groups, run.temperature)
            for run in (a, b)
        ]
    correct = [np.array([e.classes[p] for p in e.predicted]) == np.array([e.classes[t] for t in e.labels]) for e in evaluations]
    return RunComparison(evaluations[0], evaluations[1], compare_paired(correct[0], correct[1], evaluations[0].groups))


def differences(a: SavedRun, b: SavedRun) -> dict[str, tuple[Any, Any]]:
    """Recorded options, data, split, versions and hardware that differ and can change a metric: name -> (value in a, value in b).

    Runs without differences have bitwise equal weights.
    """
    different = {}
    for part in ("config", "data", "split", "backbone", "preprocessing", "versions", "hardware"):
        in_a, in_b = (json.loads(json.dumps(run.manifest.get(part) or {})) for run in (a, b))  # tuples become lists, as in a file
        for name in sorted(in_a.keys() | in_b.keys()):
            pair = in_a.get(name), in_b.get(name)
            if pair[0] != pair[1] and (part not in ("data", "split") or name == "hash"):
                different[f"{part}.{name}"] = pair
    return different
