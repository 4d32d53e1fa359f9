"""Fit the tail of a network with Lightning: early stopping, checkpoints, history and progress."""

from __future__ import annotations

import io
import math
import os
import shutil
import signal
import threading
import time
from collections.abc import Callable
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
from seewhy.models.executors import resolve_runtime
from seewhy.training.data_parallel import check_shards
from seewhy.training.loaders import CachedViews, ImageViews, TrainingContext, TrainingData, make_loader
from seewhy.training.module import FitModule, StandardisedLinear, inverse_size_weights, moving_average
from seewhy.training.trackers import make_loggers

CHECKPOINT_S = 5.0  # seconds between checkpoints, which an interruption may lose


@dataclass(frozen=True)
class FitResult:
    """History of a fit.

    history: a row for each epoch: epoch (from 1), train_loss, train_accuracy, val_loss, val_accuracy, lr, seconds.
    best_epoch: the epoch with the least val_loss, whose weights the network has. seconds: wall time of the fit.
    """

    history: tuple[dict[str, float], ...]
    best_epoch: int
    seconds: float


class DivergedError(ConfigError):
    """The loss became nan or infinite; the fit needs other options."""


def fit(context: TrainingContext, data: TrainingData, folder: Path) -> FitResult:
    """Train the tail in place, from the checkpoint in `folder` if there is one, and restore the weights of the best epoch.

    folder: for checkpoints and, with `tracker` tensorboard, TensorBoard files. The global random state is restored.
    Several processes train data-parallel; only the main process trains a classifier on stored features, whose steps take
    less time than an all-reduce. Raises KeyboardInterrupt on Ctrl-C, DivergedError if the loss is not finite.
    """
    tail = context.cut.tail
    if distributed.world_size() == 1 or not (isinstance(data.train, CachedViews) and isinstance(tail, nn.Linear)):
        return _fit(context, data, folder)
    fitted = None
    if distributed.is_main_process():
        with distributed.main_process_only():
            fitted = _fit(context, data, folder)
    distributed.broadcast_tensors(list(tail.eval().state_dict().values()))
    return cast(FitResult, distributed.broadcast(fitted))


# Lightning's hints about workers, logging intervals and checkpoints do not apply here.
@quiet("lightning.pytorch", warnings_of="lightning")
def _fit(context: TrainingContext, data: TrainingData, folder: Path) -> FitResult:
    backbone, cut, config = context.backbone, context.cut, context.config
    if config.compile and not (torch.cuda.is_available() or shutil.which(os.environ.get("CXX", "g++"))):
        raise ConfigError("compile=true needs a C++ compiler (g++, or the one in $CXX); install it, or leave compile out")
    batch_size, epochs, patience = (int(value or 0) for value in (config.batch_size, config.epochs, config.patience))
    began = time.perf_counter()
    check_shards(batch_size, len(data.val))
    train_loader = make_loader(data.train, batch_size, config.seed, config.workers)
    val_loader = make_loader(data.val, 256, None, config.workers)
    weights = inverse_size_weights(data.labels, data.classes) if config.class_weights else None
    steps = len(train_loader)
    images = len(data.train.images) if isinstance(data.train, ImageViews) else 0
    module = FitModule(backbone, cut, config, data.classes, weights, steps, resolve_runtime(config.runtime, images))
    history = HistoryCallback(config)
    early_stopping = EarlyStopping("val_loss", patience=patience, min_delta=config.min_delta)
    best_checkpoint = ModelCheckpoint(folder / "checkpoints", "best", monitor="val_loss", enable_version_counter=False)
    averaging = [WeightAveraging(avg_fn=moving_average(config.ema_decay))] if config.ema_decay else []
    last = folder / "checkpoints" / "last.ckpt"
    handler = signal.getsignal(signal.SIGINT)
    with isolate_rng(include_cuda=False), progress("training", epochs * steps) as advance:
        trainer = Trainer(
            max_epochs=epochs,
            accelerator="auto",
            devices=distributed.local_world_size(),
            num_nodes=distributed.world_size() // distributed.local_world_size(),
            strategy="auto",  # DDP for several processes
            use_distributed_sampler=False,  # EpochBatches shards
            precision=config.precision,
            plugins=[AtomicCheckpointIO()],
            callbacks=[history, ProgressCallback(advance), *averaging, early_stopping, best_checkpoint, LastCheckpoint(last)],
            logger=make_loggers(config, folder),
            default_root_dir=str(folder),
            enable_progress_bar=False,
            enable_model_summary=False,
            num_sanity_val_steps=0,
        )
        try:
            if not (stopped := _stopped_early(last, history)):
                trainer.fit(module, train_loader, val_loader, ckpt_path=str(last) if last.exists() else None, weights_only=True)
        except SystemExit as error:  # Lightning's exit after Ctrl-C, for which it replaces the signal handler
            raise KeyboardInterrupt from error
        finally:
            if threading.current_thread() is threading.main_thread():  # only this thread may set signal handlers
                signal.signal(signal.SIGINT, handler)
    rows = tuple(history.rows)
    if not rows or not math.isfinite(rows[-1]["train_loss"]):
        raise DivergedError(f"the loss became {rows[-1]['train_loss'] if rows else 'undefined'}; lower --lr (now {config.lr})")
    if distributed.is_main_process():
        best_file = last.with_name("best.ckpt") if stopped else best_checkpoint.best_model_path
        module.cpu().load_state_dict(torch.load(best_file, map_location="cpu", weights_only=True)["state_dict"])
    distributed.broadcast_tensors(list(module.cpu().state_dict().values()))
    if isinstance(module.tail, StandardisedLinear):
        module.tail.fold()
    elif module.tail is not cut.tail:  # the copy of sync_batch_norm shares the parameters, but not the running statistics
        cut.tail.load_state_dict(module.tail.state_dict())
    backbone.model.to(memory_format=torch.contiguous_format).eval()
    cut.tail.eval()
    best_epoch = int(min(rows, key=lambda row: row["val_loss"])["epoch"])
    return FitResult(rows, best_epoch, time.perf_counter() - began)


def _stopped_early(last: Path, history: HistoryCallback) -> bool:
    """Whether early stopping had ended the fit of this checkpoint; if so, restore its history."""
    if not last.exists():
        return False
    states = torch.load(last, map_location="cpu", weights_only=True)["callbacks"]
    state = next(value for name, value in states.items() if name.startswith("EarlyStopping"))
    if state["wait_count"] < state["patience"]:
        return False
    history.load_state_dict(states[history.state_key])
    return True


# ---------------------------------------------------------------- callbacks


class HistoryCallback(Callback):
    """Collect, log and checkpoint a row for each epoch."""

    def __init__(self, config: TrainConfig) -> None:
        self.config = config
        self.rows: list[dict[str, float]] = []
        self.began = 0.0

    def state_dict(self) -> dict[str, Any]:
        return {"rows": self.rows}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.rows = list(state["rows"])

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.began = time.perf_counter()

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # Runs after validation and, as the first callback, before the checkpoint is written.
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


class LastCheckpoint(Checkpoint):
    """Save a checkpoint to resume from, every CHECKPOINT_S seconds and at the end. Must be the last callback, to save the others' states.

    Lightning's `save_last` saves at the best epoch only, so that a resume would repeat those since.
    """

    def __init__(self, file: Path) -> None:
        self.file = file
        self.saved = -math.inf

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        due = time.monotonic() - self.saved >= CHECKPOINT_S or trainer.should_stop
        if trainer.strategy.reduce_boolean_decision(due, all=False):  # all processes must save, though their clocks differ
            trainer.save_checkpoint(self.file)
            self.saved = time.monotonic()


class AtomicCheckpointIO(TorchCheckpointIO):
    """Write checkpoints atomically; Lightning's way uses the folder for temporary files, often on another disk."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:
        content = io.BytesIO()  # torch.save to a file raises RuntimeError on a full disk
        torch.save(checkpoint, content)
        with atomic_write(Path(path), "free some space, and resume with --resume") as work:
            work.write_bytes(content.getbuffer())


class ProgressCallback(Callback):
    """Advance the progress bar by a step after each batch."""

    def __init__(self, advance: Callable[[int], None]) -> None:
        self.advance = advance

    def on_train_batch_end(self, *args: Any, **kwargs: Any) -> None:
        self.advance(1)
