"""Check data and options without training, and estimate the training time; writes nothing, not even to the cache."""

from __future__ import annotations

import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch

from seewhy.config import RECIPES, TrainConfig
from seewhy.core.cache import cache_path
from seewhy.curation.grouping import MANY, group_images
from seewhy.curation.near_duplicates import label_groups, near_pairs
from seewhy.curation.split import PARTS, read_split, split_images
from seewhy.data.image_set import open_images
from seewhy.data.listing import find_caltech101
from seewhy.data.verify import DATABASE
from seewhy.errors import DataError
from seewhy.models.backbones import check_request
from seewhy.models.features import feature_shape, load_pixels
from seewhy.training.loaders import TrainingContext, trains_on_features
from seewhy.training.run_dirs import resolve_run_dir

SAMPLE = 8  # images or rows of features to time
MAX_LINES = 20  # classes and skipped images to show


def dry_run(config: TrainConfig, out: Path | None = None, resume: bool = False) -> dict[str, Any]:
    """Check data and options as `train` does before the fit, and estimate its seconds with an empty cache.

    Returns JSON-ready facts; `skipped` lists (path, reason) of unreadable images. Raises the other errors of `train`.
    """
    config = config.resolved()
    target = resolve_run_dir(config, out, resume).final
    check_request(config.backbone, config.weights)
    if config.data == "caltech101" and not (root := find_caltech101(config.data_root))[1]:
        raise DataError(f"caltech101 is not in {root[0]}; a dry run downloads nothing, train without --dry-run to download it (137 MB)")
    with _throwaway_cache():
        began = time.perf_counter()
        images = open_images(config.data, config.data_root, skip_bad=True, workers=config.workers)
        seconds = time.perf_counter() - began
        near = near_pairs(images).pairs  # by perceptual hash only, since the features that `train` compares too are slow
        duplicates = config.group_by == "duplicates"
        groups = label_groups(len(images), near) if duplicates else group_images(images, config.group_by)
        ratio = (config.protocol, config.seed, config.val_fraction, config.test_fraction)
        split = read_split(Path(config.split_from), images) if config.split_from else split_images(images, *ratio, groups, duplicates)
        context = TrainingContext.create(images, split, config.model_copy(update={"weights": "none"}))
        seconds += _estimate(context)
    backbone, parameters = context.backbone, list(context.backbone.model.parameters())
    return {
        "run": str(target),
        "data": images.name,
        "classes": {name: int(n) for name, n in zip(images.classes, np.bincount(images.labels), strict=True)},
        "parts": {part: len(split.part(part)) for part in PARTS},
        "near_duplicate_pairs": len(near),
        "skipped": [list(item) for item in images.bad],
        "backbone": backbone.timm_name,
        "unfreeze": config.unfreeze,
        "stages": len(backbone.stages),
        "parameters": sum(p.numel() for p in parameters),
        "trained_parameters": sum(p.numel() for p in parameters if p.requires_grad),
        "recipe": {name: getattr(config, name) for name in RECIPES[config.recipe]},
        "seconds": round(seconds, 1),
    }


def describe(facts: dict[str, Any]) -> list[str]:
    """Format the facts as lines, with at most MAX_LINES classes, the largest first, and MAX_LINES skipped images."""
    counts = sorted(facts["classes"].items(), key=lambda item: -item[1])
    skipped, seconds = facts["skipped"], facts["seconds"]
    time_text = f"{seconds:.0f} s" if seconds < 90 else f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
    return [
        f"data      {facts['data']}: {sum(facts['classes'].values()):,} images in {len(counts)} classes",
        "          " + ", ".join(f"{name} {count:,}" for name, count in counts[:MAX_LINES]) + (", ..." if len(counts) > MAX_LINES else ""),
        "parts     about " + ", ".join(f"{name} {count:,}" for name, count in facts["parts"].items()),
        f"          {facts['near_duplicate_pairs']:,} pairs of near-duplicates by perceptual hash; training compares features too",
        *(f"skipped   {path} ({reason})" for path, reason in skipped[:MAX_LINES]),
        *([f"          {len(skipped):,} images are unreadable; without --skip-bad training stops"] if skipped else []),
        f"network   {facts['backbone']}: {facts['stages']} stages, --unfreeze {facts['unfreeze']} trains "
        f"{facts['trained_parameters']:,} of {facts['parameters']:,} parameters",
        "options   " + ", ".join(f"{name} {value}" for name, value in facts["recipe"].items()),
        f"time      about {time_text} for all epochs and an empty cache, extrapolated from {SAMPLE} images in PyTorch on this CPU",
        f"run       {facts['run']} (not written)",
    ]


@contextmanager
def _throwaway_cache() -> Iterator[None]:
    """Point $SEEWHY_CACHE at a temporary folder with the real cache's record of checked images, without creating the real one."""
    real, before = cache_path(), os.environ.get("SEEWHY_CACHE")
    with tempfile.TemporaryDirectory() as folder:
        if (real / DATABASE).is_file():
            shutil.copy(real / DATABASE, folder)
        if (real / "scenes").is_dir():
            Path(folder, "scenes").symlink_to((real / "scenes").absolute())
        os.environ["SEEWHY_CACHE"] = folder
        try:
            yield
        finally:
            del os.environ["SEEWHY_CACHE"]
            os.environ.update({"SEEWHY_CACHE": before} if before is not None else {})


def _estimate(context: TrainingContext) -> float:
    """Estimate the seconds from near-duplicates to evaluation, from those of SAMPLE images in PyTorch on the CPU."""

    def seconds_per_image(work: Callable[[], Any]) -> float:
        work()  # warm up
        began = time.perf_counter()
        work()
        return (time.perf_counter() - began) / SAMPLE

    images, cut, config, preprocessing = context.images, context.cut, context.config, context.backbone.preprocessing
    paths = [images.paths[i] for i in np.resize(context.split.train, SAMPLE).tolist()]
    batch = torch.randn(SAMPLE, 3, preprocessing.size, preprocessing.size)
    inputs = batch if cut.trunk is None else torch.randn(SAMPLE, *feature_shape(cut.trunk, preprocessing))
    view = seconds_per_image(lambda: [load_pixels(path, preprocessing) for path in paths]) / max(1, config.workers)
    if (trunk := cut.trunk) is not None:
        view += seconds_per_image(torch.inference_mode()(lambda: trunk.eval()(batch)))
    step = seconds_per_image(lambda: cut.tail.train()(inputs).sum().backward())
    train, val, test = (len(context.split.part(part)) for part in PARTS)
    epochs, evaluated = int(config.epochs or 1), (val + test) * (2 if config.tta_flip else 1)
    views = evaluated + (config.views * train if trains_on_features(cut, config) else epochs * (train + val))
    views += len(images) if config.group_by == "duplicates" and len(images) <= MANY else 0  # of another network, assumed equally fast
    return views * view + (epochs * train + (epochs * val + evaluated) / 3) * step  # a step takes about three forward passes
