"""DATA x TrainConfig -> what a run will take, stage by stage: time, disk and memory, from rates measured on this machine now."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from seewhy.backbones import Backbone, create_backbone
from seewhy.checking import check_file
from seewhy.config import TrainConfig
from seewhy.cutting import Cut, cut_backbone
from seewhy.embedding import EMBEDDER
from seewhy.engines import MANY as SIDE_BY_SIDE
from seewhy.engines import Engine, make_engine, settled_engine
from seewhy.errors import DataError
from seewhy.features import feature_shape, square_of
from seewhy.fitting import FitModule
from seewhy.grouping import MANY
from seewhy.images import list_data
from seewhy.shards import shard_of
from seewhy.spill import ABLE
from seewhy.store import stored_dtype
from seewhy.streams import BATCH, in_batches, in_order
from seewhy.transforms import Preprocessing
from seewhy.unknowns import REFERENCES

SAMPLE = 64  # pictures that are looked at
PICTURE_BYTES = (
    120 if ABLE else 500
)  # of memory that a picture takes on its own: path, hash, split, answers (measured: 121, and 385 where all stay in memory)
COPIES = 6  # of the weights: themselves, their gradients, AdamW's two moments, the average over the steps, the exported network
START_S = 12.0  # what does not grow with the pictures: imports, making the networks ready for ONNX Runtime
REPORT_S = 6.0  # figures and report, likewise


@dataclass(frozen=True)
class Rates:
    """What this machine does, pictures (for `train` and `answer`: rows of features) a second.

    check: read, hash and decode. features: decode, render and run the frozen part; 0 where nothing is frozen. embed: the same for the
    network that finds near-duplicates. train: a training step of what trains, forward, backward and update. answer: its forward pass.
    row_bytes: of a picture's features in one view. weight_bytes: of the network. base_bytes: memory of this process, networks loaded.
    """

    check: float
    features: float
    embed: float
    train: float
    answer: float
    row_bytes: int
    weight_bytes: int
    base_bytes: int


@dataclass(frozen=True)
class Cost:
    """seconds: by stage. disk_bytes: cache and run. memory_bytes: the most at a time, without the system's own cache of files."""

    seconds: dict[str, float]
    disk_bytes: int
    memory_bytes: int

    @property
    def total_seconds(self) -> float:
        return sum(self.seconds.values())


def cost_of(rates: Rates, config: TrainConfig, pictures: int, machines: int = 1) -> Cost:
    """What `seewhy train` of so many pictures costs. config must be resolved.

    machines: that share the work, each a process (`seewhy train --nodes`).
    """
    flips = 2 if config.test_flip else 1
    val, test = round(pictures * config.val_fraction), round(pictures * config.test_fraction)
    train = pictures - val - test
    epochs = int(config.epochs or 1)
    cached = rates.features > 0 and config.cache and not config.fresh_views
    seconds = {"start": START_S, "checking pictures": pictures / rates.check / machines}
    grouped = config.group_by == "duplicates" and pictures <= MANY
    if grouped:
        seconds["near-duplicates"] = pictures / rates.embed / machines
    shared = grouped and config.backbone == EMBEDDER and config.unfreeze == 0  # the same features of the plain view
    views = (config.views * train + flips * (val + test)) if cached else flips * (val + test)
    below = rates.features or rates.check  # where nothing is frozen, pictures are decoded all the same
    if rates.features:
        seconds["features"] = max(0, views - (pictures if shared else 0)) / rates.features / machines
    each = 1 / rates.train + (0 if cached else 1 / below)
    fit = epochs * (train * each + val / rates.answer + (0 if cached else val / below))
    seconds["fit"] = fit if cached and config.unfreeze == 0 else fit / machines  # one process trains a classifier on stored vectors for all
    asked = (flips * (val + test) + min(REFERENCES, train) + val + test) / rates.answer
    seconds["evaluation"] = (asked + (0 if rates.features else flips * (val + test) / below)) / machines
    seconds["report"] = REPORT_S
    embedder_rows = 1280 * 4 * pictures if grouped and not shared else 0
    disk = (views * rates.row_bytes if cached else 0) + embedder_rows + rates.weight_bytes
    return Cost(seconds, int(disk), int(rates.base_bytes + PICTURE_BYTES * pictures + COPIES * rates.weight_bytes))


# ---------------------------------------------------------------- measuring


def measure_rates(paths: Sequence[Path], classes: int, config: TrainConfig, pictures: int) -> Rates:
    """Looks at some pictures and runs what will be run on them: a few seconds, and the making of the networks ready for ONNX Runtime."""
    import psutil

    backbone = create_backbone(config.backbone, classes, config.weights, config.seed, config.resize, config.size)
    cut = cut_backbone(backbone, config.unfreeze)
    check = _rate(lambda: list(in_order(check_file, paths, config.workers)), len(paths))
    engine = settled_engine(config.engine, pictures)
    features = _pipeline_rate(paths, cut.trunk, backbone.preprocessing, engine, config.workers) if cut.trunk is not None else 0.0
    embedder = create_backbone(EMBEDDER, 2)
    trunk = cut_backbone(embedder, 0).trunk
    wanted = config.group_by == "duplicates" and pictures <= MANY
    embed = _pipeline_rate(paths, trunk, embedder.preprocessing, engine, config.workers) if wanted else math.inf
    shape = feature_shape(cut.trunk, backbone.preprocessing) if cut.trunk is not None else ()
    train, answer = _tail_rates(backbone, cut, config, classes, shape)
    row = int(np.prod(shape)) * np.dtype(stored_dtype(shape, config.feature_dtype)).itemsize if shape else 0
    weights = sum(value.numel() * value.element_size() for value in backbone.model.state_dict().values())
    return Rates(check, features, embed, train, answer, row, weights, psutil.Process().memory_info().rss)


def _rate(work: Callable[[], Any], amount: int, times: int = 3) -> float:
    """Pieces a second, median; the first time is not counted."""
    seconds = []
    for _ in range(times + 1):
        began = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - began)
    return amount / statistics.median(seconds[1:])


def _pipeline_rate(paths: Sequence[Path], trunk: Any, preprocessing: Preprocessing, engine: str, workers: int) -> float:
    """Decoding, rendering and running side by side, as `extract_features` does."""
    run: Engine = make_engine(trunk, preprocessing, SIDE_BY_SIDE, engine)

    def square(path: Path) -> npt.NDArray[np.uint8]:
        return square_of(path, preprocessing)

    def work() -> None:
        batches = in_batches(in_order(square, paths, workers), BATCH)
        for _ in in_order(lambda batch: run(np.stack(batch)), batches, run.lanes, ahead=run.lanes):
            pass

    return _rate(work, len(paths))


def _tail_rates(backbone: Backbone, cut: Cut, config: TrainConfig, classes: int, shape: tuple[int, ...]) -> tuple[float, float]:
    """Rows a second of a training step and of a forward pass of what trains, on random features."""
    n = int(config.batch_size or BATCH)
    module = FitModule(backbone, cut, config.model_copy(update={"compile": False}), classes, None, 1)
    size = backbone.preprocessing.size
    inputs = torch.randn(n, *(shape or (3, size, size)))
    labels = torch.randint(classes, (n,))
    optimizer = torch.optim.AdamW([p for p in module.tail.parameters() if p.requires_grad], lr=1e-6)

    def step() -> None:
        module.tail.train()
        logits, targets = module(inputs, labels)
        loss = torch.nn.functional.cross_entropy(logits, labels if targets is None else targets)
        optimizer.zero_grad()
        torch.autograd.backward(loss)
        optimizer.step()

    def answer() -> None:
        with torch.inference_mode():
            module.tail.eval()(inputs)

    return _rate(step, n), _rate(answer, n)


# ---------------------------------------------------------------- the whole


def plan(config: TrainConfig, pictures: int | None = None, machines: int = 1) -> tuple[Rates, Cost, int]:
    """Rates, cost and the number of pictures of a run of this config. pictures: None for as many as the data has.

    Raises DataError for data that is none.
    """
    config = config.resolved()
    listing = list_data(config.data, config.data_root)
    chosen = np.random.default_rng(0).permutation(len(listing.paths))[:SAMPLE]
    if shard_of(listing.paths[0]):  # read in their order, as a run does: parquet is slow in any other
        first = min(int(chosen[0]), max(0, len(listing.paths) - SAMPLE))
        chosen = np.arange(first, min(first + SAMPLE, len(listing.paths)))
    usable = [listing.paths[i] for i in chosen if not check_file(listing.paths[i]).problem]
    if not usable:
        raise DataError(f"{listing.root}: none of {len(chosen)} pictures drawn from it can be used; `seewhy audit` says why")
    count = len(listing.paths) if pictures is None else pictures
    sample = (usable * SAMPLE)[:SAMPLE]
    rates = measure_rates(sample, len(set(listing.class_names)), config, count)
    return rates, cost_of(rates, config, count, machines), count


def variants(config: TrainConfig) -> list[TrainConfig]:
    """What a budget may be spent on: the wanted backbone and the one of the package, frozen and with the last stage trained."""
    names = dict.fromkeys([config.backbone, EMBEDDER])
    recipe = dict.fromkeys(("epochs", "lr", "batch_size", "weight_decay", "patience", "label_smoothing", "ema_decay", "test_flip"))
    return [config.model_copy(update={**recipe, "backbone": name, "unfreeze": unfreeze}) for name in names for unfreeze in (0, 1)]
