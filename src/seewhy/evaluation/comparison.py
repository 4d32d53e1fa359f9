"""Runs -> which of two is better on the same images, and how much one recipe varies over splits."""

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
    """a, b: what each run says of the same images. paired: their comparison; difference is b - a."""

    a: Evaluation
    b: Evaluation
    paired: Comparison


def compare_runs(a: SavedRun, b: SavedRun, data: str | None = None) -> RunComparison:
    """Two runs on the images that are in the test part of both, or on all images of another labelled folder.

    Raises RunError where the runs do not know the same classes, or share no test image.
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
            raise RunError(f"{a.path} and {b.path} share no test image; train one with --split-from the other")
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
            f"{images.root}: holds other classes than {run.path} was trained on; pass --data with labelled images of its classes"
        )
    return evaluate_part(images, indices, "shared test", run.backbone, run.cut, run.config, groups, run.temperature)
