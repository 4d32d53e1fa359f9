"""Measure a run's accuracy on corrupted images at five strengths, and on slices of the uncorrupted ones, with intervals."""

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
    """One row per corruption and strength: corruption, strength (0: none), value, unit, accuracy, low, high (95% Wilson interval), n.

    Each image is decoded once and corrupted as the network's input; predictions are those of `predict`.
    Raises ConfigError for an unknown corruption.
    """
    if unknown := [name for name in names if name not in CORRUPTIONS]:
        raise ConfigError(f"unknown corruption {unknown[0]!r}; use one of {', '.join(CORRUPTIONS)}")
    preprocessing = run.backbone.preprocessing
    variants = [("none", 0), *itertools.product(names, STRENGTHS)]
    total = len(variants) * len(indices)
    forward = get_executor(run.executors["network"], run.backbone.model, preprocessing, total)

    def inputs_of(i: int) -> list[npt.NDArray[np.uint8]]:
        plain = load_pixels(images.paths[i], preprocessing)
        return [corrupt(plain, name, strength) if strength else plain for name, strength in variants]

    def predict(batch: list[npt.NDArray[np.uint8]]) -> Indices:
        pixels = np.stack(batch)
        logits = flip_tta(forward, pixels, len(run.classes)) if run.config.tta_flip else forward(pixels)
        classes: Indices = logits.argmax(axis=1)
        return classes

    inputs = itertools.chain.from_iterable(map_ordered(inputs_of, [int(i) for i in indices], workers, ahead=4))
    predicted = []
    with progress("corrupted images", total) as advance:
        for classes in map_ordered(predict, batched(inputs, BATCH), forward.max_parallel_batches, ahead=forward.max_parallel_batches):
            predicted.append(classes)
            advance(len(classes))
    correct = np.concatenate(predicted).reshape(len(indices), len(variants)) == images.labels[indices][:, None]
    rows = []
    for (name, strength), column in zip(variants, correct.T, strict=True):
        chosen = CORRUPTIONS.get(name)
        facts = {"value": chosen.values[strength - 1], "unit": chosen.unit} if chosen else {"value": None, "unit": ""}
        rows.append({"corruption": name, "strength": strength, **facts, **_accuracy(column)})
    return pd.DataFrame(rows)


def _accuracy(correct: npt.NDArray[np.bool_]) -> dict[str, float | int]:
    low, high = wilson_interval(int(correct.sum()), len(correct))
    return {"accuracy": float(correct.mean()), "low": low, "high": high, "n": len(correct)}


def run_robustness(run: SavedRun, max_images: int, names: Sequence[str] | None = None) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Run `robustness` on at most `max_images` random test images, and `slices` on all of them."""
    config = run.config
    images = open_images(config.data, config.data_root, config.skip_bad, config.workers)
    if images.classes != run.classes:
        raise DataError(f"{images.root}: no longer has the {len(run.classes)} classes of {run.path}; put the missing class folders back")
    split = read_split(run.path, images)
    drawn = np.sort(np.random.default_rng(0).permutation(split.test)[:max_images])
    table = robustness(run, images, drawn, tuple(dict.fromkeys(names or CORRUPTIONS)), config.workers)
    evaluation = evaluate_run(run, "test")
    return table, slices(images, split.test, evaluation.correct, np.bincount(images.labels[split.train], minlength=len(images.classes)))


def slices(images: ImageSet, indices: Indices, correct: npt.NDArray[np.bool_], train_sizes: Indices) -> pd.DataFrame:
    """Accuracy by image size, by colour, and by training images of the class: by, slice, accuracy, low, high, n.

    correct: (N,) whether the prediction for each image of `indices` is correct. train_sizes: (C,) training images of each class.
    Sizes are split into terciles.
    """
    sides = np.sqrt(images.sizes[indices].prod(axis=1))
    trained = train_sizes[images.labels[indices]]
    grey = images.grey[indices]
    members: list[tuple[str, str, npt.NDArray[np.bool_]]] = [
        *_terciles("image size", "{:.0f} to {:.0f} pixels a side", sides),
        ("colour", "grey", grey),
        ("colour", "coloured", ~grey),
        *_terciles("training images of the class", "{:.0f} to {:.0f}", trained.astype(np.float64)),
    ]
    return pd.DataFrame([{"by": by, "slice": name, **_accuracy(correct[inside])} for by, name, inside in members if inside.any()])


def _terciles(by: str, text: str, values: npt.NDArray[np.float64]) -> list[tuple[str, str, npt.NDArray[np.bool_]]]:
    """Up to three slices of about equal count; equal values share a slice."""
    edges = np.unique(np.quantile(values, [1 / 3, 2 / 3], method="lower"))
    numbers = np.searchsorted(edges, values, side="left")
    members = [numbers == number for number in np.unique(numbers)]
    return [(by, text.format(values[inside].min(), values[inside].max()), inside) for inside in members]
