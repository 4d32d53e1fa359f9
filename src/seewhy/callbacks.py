"""What is done beside a fit: its history, its bar, and checkpoints that are whole and hold the last epoch."""

from __future__ import annotations

import io
import math
import time
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.plugins.io import TorchCheckpointIO

from seewhy.config import TrainConfig
from seewhy.errors import ConfigError
from seewhy.progress import LOG
from seewhy.writing import whole_file

SAVE_S = 5.0  # of finished epochs are the most that are trained again after an interruption


class HistoryKeeper(Callback):
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


class Diverged(ConfigError):
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


class WholeCheckpoints(TorchCheckpointIO):
    """Checkpoints that are written beside their place: Lightning's way leads over the folder for temporary files, often another disk."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:
        content = io.BytesIO()  # PyTorch's own writer ends in a RuntimeError where a disk is full
        torch.save(checkpoint, content)
        with whole_file(Path(path), "free some space, and go on with --resume") as work:
            work.write_bytes(content.getbuffer())


class ProgressCallback(Callback):
    """Moves the bar one step a batch."""

    def __init__(self, advance: Any) -> None:
        self.advance = advance

    def on_train_batch_end(self, *args: Any, **kwargs: Any) -> None:
        self.advance(1)
