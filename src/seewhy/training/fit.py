"""Batches -> a fitted network and its history: the LightningModule and its Trainer."""

from __future__ import annotations

import io
import math
import os
import shutil
import signal
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint, EarlyStopping, ModelCheckpoint, WeightAveraging
from lightning.pytorch.plugins.io import TorchCheckpointIO
from lightning.pytorch.utilities.seed import isolate_rng
from torch import nn

from seewhy.config import TrainConfig
from seewhy.core import distributed
from seewhy.core.files import atomic_write
from seewhy.core.process_state import quiet
from seewhy.core.progress import LOG, progress
from seewhy.errors import ConfigError
from seewhy.models.backbones import Backbone
from seewhy.models.executors import resolve_runtime
from seewhy.models.trunk_tail import TrunkTail
from seewhy.training.data_parallel import check_shards
from seewhy.training.loaders import CachedViews, ImageViews, TrainingData, make_loader
from seewhy.training.module import FitModule, StandardisedLinear, inverse_size_weights, moving_average
from seewhy.training.trackers import make_loggers


@dataclass(frozen=True)
class Fit:
    """What a fit leaves besides the network, whose best weights are in place.

    history: one row an epoch: epoch (from 1), train_loss, train_accuracy, val_loss, val_accuracy, lr, seconds.
    best_epoch: the row with the least val_loss. seconds: wall time of the fit.
    """

    history: tuple[dict[str, float], ...]
    best_epoch: int
    seconds: float


class FitInterrupted(KeyboardInterrupt):
    """Ctrl-C during a fit; the checkpoint holds the finished epochs but for those of the last SAVE_S seconds."""


def fit(backbone: Backbone, cut: TrunkTail, data: TrainingData, config: TrainConfig, folder: Path) -> Fit:
    """Trains the tail of `cut` in place and restores the weights of the best epoch.

    config must be resolved. folder receives checkpoints and, by `config.tracker`, TensorBoard files; a checkpoint found
    there is resumed from. The caller's random state is left as it was.
    Several processes train by data parallelism, each on its shard of every batch; but the main process alone trains a classifier on
    stored vectors, since its steps take less time than an all-reduce would.
    Raises FitInterrupted on Ctrl-C, ConfigError if the loss stops being a number.
    """
    if distributed.world_size() == 1 or not (isinstance(data.train, CachedViews) and isinstance(cut.tail, nn.Linear)):
        return _fit(backbone, cut, data, config, folder)
    fitted = None
    if distributed.is_main_process():
        with distributed.main_process_only():
            fitted = _fit(backbone, cut, data, config, folder)
    distributed.broadcast_tensors(list(cut.tail.eval().state_dict().values()))
    return cast(Fit, distributed.broadcast(fitted))


# Lightning's hints about workers, logging intervals and checkpoints concern choices made here on purpose.
@quiet("lightning.pytorch", warnings_of="lightning")
def _fit(backbone: Backbone, cut: TrunkTail, data: TrainingData, config: TrainConfig, folder: Path) -> Fit:
    if config.compile and not (torch.cuda.is_available() or shutil.which(os.environ.get("CXX", "g++"))):
        raise ConfigError("compile=true needs a C++ compiler (g++, or the one $CXX names); install it, or leave compile out")
    batch_size, epochs, patience = (int(value or 0) for value in (config.batch_size, config.epochs, config.patience))
    began = time.perf_counter()
    check_shards(batch_size, len(data.val))
    train_loader = make_loader(data.train, batch_size, config.seed, config.workers)
    val_loader = make_loader(data.val, 256, None, config.workers)
    weights = inverse_size_weights(data.labels, data.classes) if config.class_weights else None
    steps = len(train_loader)
    images = len(data.train.images) if isinstance(data.train, ImageViews) else 0
    module = FitModule(backbone, cut, config, data.classes, weights, steps, resolve_runtime(config.runtime, images))
    keeper = HistoryCallback(config, steps)
    stopper = EarlyStopping("val_loss", patience=patience, min_delta=config.min_delta)
    saver = ModelCheckpoint(folder / "checkpoints", "best", monitor="val_loss", enable_version_counter=False)
    averaging = [WeightAveraging(avg_fn=moving_average(config.ema_decay))] if config.ema_decay else []
    last = folder / "checkpoints" / "last.ckpt"
    handler = signal.getsignal(signal.SIGINT)
    with isolate_rng(include_cuda=False), progress("training", epochs * steps) as advance:
        trainer = Trainer(
            max_epochs=epochs,
            accelerator="auto",
            devices=distributed.local_world_size(),
            num_nodes=distributed.world_size() // distributed.local_world_size(),
            strategy="auto",  # DDP where there are several processes
            use_distributed_sampler=False,  # EpochBatches shards
            precision=config.precision,
            plugins=[AtomicCheckpointIO()],
            callbacks=[keeper, ProgressCallback(advance), *averaging, stopper, saver, LastCheckpoint(last)],
            logger=make_loggers(config, folder),
            default_root_dir=str(folder),
            enable_progress_bar=False,
            enable_model_summary=False,
            num_sanity_val_steps=0,
        )
        try:
            if not (stopped := _stopped_early(last, keeper)):
                trainer.fit(module, train_loader, val_loader, ckpt_path=str(last) if last.exists() else None, weights_only=True)
        except SystemExit as error:  # how Lightning ends after Ctrl-C, with the signal switched off
            raise FitInterrupted from error
        finally:
            if threading.current_thread() is threading.main_thread():  # others may not touch signals
                signal.signal(signal.SIGINT, handler)
    history = tuple(keeper.rows)
    if not history or not math.isfinite(history[-1]["train_loss"]):
        raise DivergedError(f"the loss became {history[-1]['train_loss'] if history else 'undefined'}; lower --lr (now {config.lr})")
    if distributed.is_main_process():
        best_file = last.with_name("best.ckpt") if stopped else saver.best_model_path
        best = torch.load(best_file, map_location="cpu", weights_only=True)["state_dict"]
        module.cpu().load_state_dict(best)
    distributed.broadcast_tensors(list(module.cpu().state_dict().values()))
    if isinstance(module.tail, StandardisedLinear):
        module.tail.fold()
    elif module.tail is not cut.tail:  # the copy of sync_batch_norm: parameters are shared, running statistics are not
        cut.tail.load_state_dict(module.tail.state_dict())
    backbone.model.to(memory_format=torch.contiguous_format).eval()
    cut.tail.eval()
    best_epoch = int(min(history, key=lambda row: row["val_loss"])["epoch"])
    return Fit(history, best_epoch, time.perf_counter() - began)


def _stopped_early(last: Path, keeper: HistoryCallback) -> bool:
    """Whether the checkpoint is of a fit that early stopping had ended, with nothing left to train; `keeper` then has its history."""
    if not last.exists():
        return False
    states = torch.load(last, map_location="cpu", weights_only=True)["callbacks"]
    state = next(value for name, value in states.items() if name.startswith("EarlyStopping"))
    if state["wait_count"] < state["patience"]:
        return False
    keeper.load_state_dict(states[keeper.state_key])
    return True


SAVE_S = 5.0  # of finished epochs are the most that are trained again after an interruption


class HistoryCallback(Callback):
    """Collects one row an epoch, also across a resume, and tells of it."""

    def __init__(self, config: TrainConfig, steps: int) -> None:
        self.config = config
        self.steps = steps
        self.rows: list[dict[str, float]] = []
        self.began = 0.0

    def state_dict(self) -> dict[str, Any]:
        return {"rows": self.rows}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.rows = list(state["rows"])

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.began = time.perf_counter()

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # Runs after validation and, being the first callback, before the checkpoint is written.
        row = {"epoch": float(trainer.current_epoch + 1)}
        for name in ("train_loss", "train_accuracy", "val_loss", "val_accuracy"):
            row[name] = float(trainer.callback_metrics[name])
        row["lr"] = float(trainer.optimizers[0].param_groups[0]["lr"])
        row["seconds"] = round(time.perf_counter() - self.began, 3)
        self.rows.append(row)
        for logger in trainer.loggers:
            logger.log_metrics({name: value for name, value in row.items() if name != "epoch"}, int(row["epoch"]))
        if self.config.recipe != "linear" or (trainer.current_epoch + 1) % 10 == 0:
            LOG.info(
                f"epoch {trainer.current_epoch + 1:3d}/{self.config.epochs}  train loss {row['train_loss']:.3f}  "
                f"val loss {row['val_loss']:.3f}  val accuracy {row['val_accuracy']:.1%}  {row['seconds']:.1f} s"
            )


class DivergedError(ConfigError):
    """The loss stopped being a number; other options are needed, and nothing of this fit can be used."""


class LastCheckpoint(Checkpoint):
    """Keeps what a resume goes on from: after the first epoch, and after each that ends SAVE_S seconds or more after the last time.

    Lightning's own `save_last` follows the best epoch, so that a resume would repeat those after it. Comes last of all callbacks, since
    what it saves holds the states of the others.
    """

    def __init__(self, file: Path) -> None:
        self.file = file
        self.saved = -math.inf

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        due = time.monotonic() - self.saved >= SAVE_S or trainer.should_stop
        if trainer.strategy.reduce_boolean_decision(due, all=False):  # clocks of processes differ, and all save or none
            trainer.save_checkpoint(self.file)
            self.saved = time.monotonic()


class AtomicCheckpointIO(TorchCheckpointIO):
    """Checkpoints that are written beside their place: Lightning's way leads over the folder for temporary files, often another disk."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:
        content = io.BytesIO()  # PyTorch's own writer ends in a RuntimeError where a disk is full
        torch.save(checkpoint, content)
        with atomic_write(Path(path), "free some space, and go on with --resume") as work:
            work.write_bytes(content.getbuffer())


class ProgressCallback(Callback):
    """Moves the bar one step a batch."""

    def __init__(self, advance: Any) -> None:
        self.advance = advance

    def on_train_batch_end(self, *args: Any, **kwargs: Any) -> None:
        self.advance(1)
