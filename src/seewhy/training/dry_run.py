"""DATA x TrainConfig -> what `train` would do and about how long it takes; nothing is written, not even into the cache."""

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
from seewhy.curation.split import PARTS, Split, read_split, split_images
from seewhy.data.image_set import ImageSet, open_images
from seewhy.data.listing import find_caltech101
from seewhy.data.verify import DATABASE
from seewhy.errors import DataError
from seewhy.models.backbones import Backbone, check_request, create_backbone
from seewhy.models.features import feature_shape, square_of
from seewhy.models.trunk_tail import TrunkTail, split_backbone
from seewhy.training.run_dirs import resolve_run_dir

SAMPLE = 8  # images, or rows of features, that are timed
SHOWN = 20  # classes and unusable images


def dry_run(config: TrainConfig, out: Path | None = None, resume: bool = False) -> dict[str, Any]:
    """Check data and options as `train` does before its fit, and estimate the seconds that it takes, its cache empty.

    Returns JSON-ready facts. Raises what `train` raises, but for unusable images: `skipped` lists their (path, reason).
    """
    config = config.resolved()
    target = resolve_run_dir(config, out, resume).target
    check_request(config.backbone, config.weights)
    if config.data == "caltech101" and not (root := find_caltech101(config.data_root))[1]:
        raise DataError(f"caltech101 is not in {root[0]}; a dry run downloads nothing, train without --dry-run does (137 MB)")
    with _throwaway_cache():
        began = time.perf_counter()
        images = open_images(config.data, config.data_root, skip_bad=True, workers=config.workers)
        seconds = time.perf_counter() - began
        near = near_pairs(images).pairs  # by content and perceptual hash: features, which `train` compares too, are dear
        duplicates = config.group_by == "duplicates"
        groups = label_groups(len(images), near) if duplicates else group_images(images, config.group_by)
        ratio = (config.protocol, config.seed, config.val_fraction, config.test_fraction)
        split = read_split(Path(config.split_from), images) if config.split_from else split_images(images, *ratio, groups, duplicates)
        backbone = create_backbone(config.backbone, len(images.classes), "none", config.seed, config.resize, config.size)
        seconds += _estimate(config, images, split, backbone, split_backbone(backbone, config.unfreeze))
    return {
        "run": str(target),
        "data": images.name,
        "classes": {name: int(n) for name, n in zip(images.classes, np.bincount(images.labels), strict=True)},
        "parts": {part: len(split.part(part)) for part in PARTS},
        "near_duplicate_pairs": len(near),
        "skipped": [list(each) for each in images.bad],
        "backbone": backbone.timm_name,
        "unfreeze": config.unfreeze,
        "stages": len(backbone.stages),
        "parameters": sum(p.numel() for p in backbone.model.parameters()),
        "trained_parameters": sum(p.numel() for p in backbone.model.parameters() if p.requires_grad),
        "recipe": {name: getattr(config, name) for name in RECIPES[config.recipe]},
        "seconds": round(seconds, 1),
    }


def describe(facts: dict[str, Any]) -> list[str]:
    """The lines that say it to people: at most SHOWN classes, the largest first, and SHOWN unusable images."""
    counts = sorted(facts["classes"].items(), key=lambda item: -item[1])
    skipped, seconds = facts["skipped"], facts["seconds"]
    time_text = f"{seconds:.0f} s" if seconds < 90 else f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
    return [
        f"data      {facts['data']}: {sum(facts['classes'].values()):,} images in {len(counts)} classes",
        "          " + ", ".join(f"{name} {count:,}" for name, count in counts[:SHOWN]) + (", ..." if len(counts) > SHOWN else ""),
        "parts     about " + ", ".join(f"{name} {count:,}" for name, count in facts["parts"].items()),
        f"          {facts['near_duplicate_pairs']:,} pairs of near-duplicates by perceptual hash; training looks closer",
        *(f"skipped   {path} ({reason})" for path, reason in skipped[:SHOWN]),
        *([f"          {len(skipped):,} images cannot be used; without --skip-bad training stops at them"] if skipped else []),
        f"network   {facts['backbone']}: {facts['stages']} stages, --unfreeze {facts['unfreeze']} trains "
        f"{facts['trained_parameters']:,} of {facts['parameters']:,} parameters",
        "options   " + ", ".join(f"{name} {value}" for name, value in facts["recipe"].items()),
        f"time      about {time_text} for all epochs and an empty cache: image counts times the seconds of {SAMPLE} images, "
        "timed now in PyTorch on this CPU",
        f"run       {facts['run']} (not written)",
    ]


@contextmanager
def _throwaway_cache() -> Iterator[None]:
    """Point $SEEWHY_CACHE at a temporary folder that has what the real one knows of images; the real one is not even made."""
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


def _estimate(config: TrainConfig, images: ImageSet, split: Split, backbone: Backbone, cut: TrunkTail) -> float:
    """Seconds from near-duplicates to the evaluation: counts of images times the seconds of SAMPLE, timed in PyTorch on the CPU."""

    def timed(work: Callable[[], Any]) -> float:
        work()  # warm up
        began = time.perf_counter()
        work()
        return (time.perf_counter() - began) / SAMPLE

    paths, given = [images.paths[i] for i in np.resize(split.train, SAMPLE).tolist()], backbone.preprocessing
    squares = torch.randn(SAMPLE, 3, given.size, given.size)
    inputs = squares if cut.trunk is None else torch.randn(SAMPLE, *feature_shape(cut.trunk, given))
    below = timed(lambda: [square_of(path, given) for path in paths]) / max(1, config.workers)  # what comes before the layers that train
    if (trunk := cut.trunk) is not None:
        below += timed(torch.inference_mode()(lambda: trunk.eval()(squares)))
    step = timed(lambda: cut.tail.train()(inputs).sum().backward())
    train, val, test = (len(split.part(part)) for part in PARTS)
    epochs, answers = int(config.epochs or 1), (val + test) * (2 if config.tta_flip else 1)
    kept = cut.trunk is not None and config.cache and not config.fresh_views
    views = answers + (config.views * train if kept else epochs * (train + val))
    views += len(images) if config.group_by == "duplicates" and len(images) <= MANY else 0  # by a network of its own; taken for this one
    return views * below + (epochs * train + (epochs * val + answers) / 3) * step  # a step takes about three forward passes
