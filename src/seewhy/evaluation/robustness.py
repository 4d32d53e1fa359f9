"""Run x images -> accuracy under CORRUPTIONS at five strengths, and of slices of the plain images: tables with intervals."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import pandas as pd

from seewhy.core.parallel import BATCH, batched, map_ordered
from seewhy.core.progress import progress
from seewhy.curation.split import read_split
from seewhy.data.image_set import ImageSet, open_images
from seewhy.errors import ConfigError, DataError
from seewhy.evaluation.corruptions import CORRUPTIONS, corrupt
from seewhy.evaluation.evaluate import evaluate_run
from seewhy.evaluation.metrics import wilson_interval
from seewhy.models.executors import flip_tta, get_executor
from seewhy.models.features import load_pixels
from seewhy.models.saved_run import SavedRun

STRENGTHS = (1, 2, 3, 4, 5)


Indices = npt.NDArray[np.int64]


def robustness(
    run: SavedRun, images: ImageSet, indices: Indices, names: Sequence[str] = tuple(CORRUPTIONS), workers: int = 2
) -> pd.DataFrame:
    """A row a corruption and strength: corruption, strength (0 = none), value, unit, accuracy, low, high (95% Wilson interval), n.

    Each image is decoded once, corrupted as the network's square, and answered as `predict` would.
    Raises ConfigError for an unknown corruption.
    """
    if unknown := [name for name in names if name not in CORRUPTIONS]:
        raise ConfigError(f"unknown corruption {unknown[0]!r}; use one of {', '.join(CORRUPTIONS)}")
    preprocessing = run.backbone.preprocessing
    cells = [("none", 0), *itertools.product(names, STRENGTHS)]
    forward = get_executor(run.executors["network"], run.backbone.model, preprocessing, len(cells) * len(indices))

    def squares_of(i: int) -> list[npt.NDArray[np.uint8]]:
        plain = load_pixels(images.paths[i], preprocessing)
        return [corrupt(plain, name, strength) if strength else plain for name, strength in cells]

    def answer(batch: list[npt.NDArray[np.uint8]]) -> Indices:
        stacked = np.stack(batch)
        logits = flip_tta(forward, stacked, len(run.classes)) if run.config.tta_flip else forward(stacked)
        best: Indices = logits.argmax(axis=1)
        return best

    squares = itertools.chain.from_iterable(map_ordered(squares_of, [int(i) for i in indices], workers, ahead=4))
    found = []
    with progress("corrupted images", len(cells) * len(indices)) as advance:
        for classes in map_ordered(answer, batched(squares, BATCH), forward.max_parallel_batches, ahead=forward.max_parallel_batches):
            found.append(classes)
            advance(len(classes))
    right = np.concatenate(found).reshape(len(indices), len(cells)) == images.labels[indices][:, None]
    rows = []
    for (name, strength), column in zip(cells, right.T, strict=True):
        low, high = wilson_interval(int(column.sum()), len(column))
        chosen = CORRUPTIONS.get(name)
        rows.append(
            {
                "corruption": name,
                "strength": strength,
                "value": chosen.values[strength - 1] if chosen else None,
                "unit": chosen.unit if chosen else "",
                "accuracy": float(column.mean()),
                "low": low,
                "high": high,
                "n": len(column),
            }
        )
    return pd.DataFrame(rows)


def run_robustness(run: SavedRun, max_images: int, names: Sequence[str] | None = None) -> tuple[pd.DataFrame, pd.DataFrame]:
    """`robustness` on at most `max_images` test images drawn at random, and `slices` of the whole test part."""
    config = run.config
    images = open_images(config.data, config.data_root, config.skip_bad, config.workers)
    if images.classes != run.classes:
        raise DataError(f"{images.root}: no longer holds the {len(run.classes)} classes of {run.path}; put the missing class folders back")
    split = read_split(run.path, images)
    drawn = np.sort(np.random.default_rng(0).permutation(split.test)[:max_images])
    table = robustness(run, images, drawn, tuple(dict.fromkeys(names or CORRUPTIONS)), config.workers)
    evaluation = evaluate_run(run, "test")
    return table, slices(images, split.test, evaluation.correct, np.bincount(images.labels[split.train], minlength=len(images.classes)))


def slices(images: ImageSet, indices: Indices, right: npt.NDArray[np.bool_], train_sizes: Indices) -> pd.DataFrame:
    """Accuracy by image size, by colour and by how many training images the class had: by, slice, accuracy, low, high, n.

    right: (N,) whether the answer to each image of `indices` is right. train_sizes: (C,) training images of each class.
    Sizes are cut into three parts of equal count.
    """
    sides = np.sqrt(images.sizes[indices].prod(axis=1))
    trained = train_sizes[images.labels[indices]]
    grey = images.grey[indices]
    members: list[tuple[str, str, npt.NDArray[np.bool_]]] = [
        *_thirds("image size", "{:.0f} to {:.0f} pixels a side", sides),
        ("colour", "grey", grey),
        ("colour", "coloured", ~grey),
        *_thirds("training images of the class", "{:.0f} to {:.0f}", trained.astype(np.float64)),
    ]
    rows = []
    for by, name, inside in members:
        if n := int(inside.sum()):
            low, high = wilson_interval(int(right[inside].sum()), n)
            rows.append({"by": by, "slice": name, "accuracy": float(right[inside].mean()), "low": low, "high": high, "n": n})
    return pd.DataFrame(rows)


def _thirds(by: str, text: str, values: npt.NDArray[np.float64]) -> list[tuple[str, str, npt.NDArray[np.bool_]]]:
    """Up to three slices of nearly equal count; equal values are never torn apart."""
    cuts = np.unique(np.quantile(values, [1 / 3, 2 / 3], method="lower"))
    places = np.searchsorted(cuts, values, side="left")
    found = []
    for place in np.unique(places):
        inside = places == place
        found.append((by, text.format(values[inside].min(), values[inside].max()), inside))
    return found
