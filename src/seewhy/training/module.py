"""Define the LightningModule of a tail: loss, metrics, optimizer, schedule and MixUp."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any, cast

import numpy as np
import numpy.typing as npt
import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torch.nn import functional as F
from torchmetrics import MeanMetric, Metric
from torchmetrics.classification import MulticlassAccuracy

from seewhy.config import TrainConfig
from seewhy.core import distributed
from seewhy.models.backbones import Backbone
from seewhy.models.executors import Executor, NormalizeInput, batch_invariant, make_executor
from seewhy.models.features import round_like_stored
from seewhy.models.trunk_tail import TrunkTail, parameter_stages
from seewhy.training.data_parallel import sync_batch_norm
from seewhy.training.loaders import Batch


class FitModule(LightningModule):
    """Train the tail with cross-entropy, on features, or on images through the frozen trunk."""

    class_weights: Tensor | None

    def __init__(
        self,
        backbone: Backbone,
        cut: TrunkTail,
        config: TrainConfig,
        classes: int,
        class_weights: Tensor | None,
        steps_per_epoch: int,
        runtime: str = "torch",
    ) -> None:
        super().__init__()
        self.tail = sync_batch_norm(StandardisedLinear(cut.tail) if isinstance(cut.tail, nn.Linear) else cut.tail)
        self.memory_format = best_memory_format(self.tail)
        self.tail.to(memory_format=self.memory_format)
        self.trunk_forward = trunk_forward(backbone, cut, runtime, config.feature_dtype)
        full_batch_tail = torch.compile(self.tail, dynamic=False) if config.compile else self.tail
        self.full_batch_tail = (full_batch_tail,)  # in a tuple, so that it is no submodule
        self.backbone = backbone
        self.config = config
        self.steps_per_epoch = steps_per_epoch
        self.register_buffer("class_weights", class_weights, persistent=False)
        self.mixer = _make_mixer(config.mixup, classes)
        sync = distributed.world_size() > 1  # torchmetrics' default ignores main_process_only()
        self.metrics: dict[str, Metric] = {}
        for part in ("train", "val"):
            self.metrics |= {
                # Not "disable", which ignores the weights (torchmetrics 1.9); infinity ends the fit as nan would.
                f"{part}_loss": MeanMetric(nan_strategy=math.inf, sync_on_compute=sync),
                f"{part}_accuracy": MulticlassAccuracy(classes, average="micro", sync_on_compute=sync),
            }
        self._metrics = nn.ModuleList(self.metrics.values())  # moves them to the device with the module

    def on_fit_start(self) -> None:
        self.train()

    def on_train_epoch_start(self) -> None:
        # For dropout and mixing: by epoch, so that a resume repeats it, and by process.
        torch.manual_seed(self.config.seed * 100_003 + self.current_epoch + distributed.rank() * 1_000_000_007)

    def forward(self, inputs: Tensor, targets: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """Map features, or (N, size, size, 3) uint8 pixels, to (N, C) logits; return the targets too, mixed like the inputs."""
        if inputs.dtype == torch.uint8:
            inputs = self.trunk_forward(inputs)
        if self.mixer is not None and targets is not None and self.training:
            maps = inputs if inputs.ndim == 4 else inputs.reshape(len(inputs), 1, 1, -1)  # MixUp of vectors and tokens
            mixed, targets = self.mixer(maps, targets)
            inputs = mixed.reshape(inputs.shape)
        if inputs.ndim == 4:
            inputs = inputs.contiguous(memory_format=self.memory_format)
        full = self.training and len(inputs) == self.config.batch_size  # each other size would be compiled
        logits: Tensor = self.full_batch_tail[0](inputs) if full else self.tail(inputs)
        return logits, targets

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        logits, targets = self(batch[0], batch[1])
        loss = self._loss(logits, targets)
        self._count("train", loss, logits, targets, batch[1])
        return loss if distributed.world_size() == 1 else loss * self._shard_weight(targets)

    def _shard_weight(self, targets: Tensor) -> float:
        """Factor of the loss that corrects DDP's mean over the ranks for shards that differ by an image or in class weights."""
        weight = self._weight(targets)
        return weight * distributed.world_size() / distributed.all_reduce_scalar(weight)

    def _weight(self, targets: Tensor) -> float:
        """Weight of these targets in a mean loss over several batches: their number, or the sum of their class weights."""
        return float(len(targets) if self.class_weights is None or targets.ndim > 1 else self.class_weights[targets].sum())

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        logits, _ = self(batch[0])
        self._count("val", self._loss(logits, batch[1]), logits, batch[1], batch[1])

    def _loss(self, logits: Tensor, targets: Tensor) -> Tensor:
        # Validation uses the very loss that is minimised: judged by plain cross-entropy, a fit with label
        # smoothing looks worse with every epoch that makes it better, and stops after the third.
        return F.cross_entropy(logits, targets, weight=self.class_weights, label_smoothing=self.config.label_smoothing or 0.0)

    def _count(self, part: str, loss: Tensor, logits: Tensor, targets: Tensor, labels: Tensor) -> None:
        self.metrics[f"{part}_loss"].update(loss.detach(), weight=self._weight(targets))
        self.metrics[f"{part}_accuracy"].update(logits.detach(), labels)

    def on_validation_epoch_end(self) -> None:
        # Validation runs after the last training batch of an epoch, before on_train_epoch_end.
        for name, metric in self.metrics.items():
            self.log(name, metric.compute(), logger=False)  # HistoryCallback logs them
            metric.reset()

    def configure_optimizers(self) -> Any:
        config = self.config
        optimizer = _make_optimizer(config, parameter_groups(self.backbone, config))
        if config.schedule == "plateau":
            plateau = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, factor=0.3, patience=1)
            return {"optimizer": optimizer, "lr_scheduler": {"scheduler": plateau, "monitor": "val_loss"}}
        warmup = config.warmup_epochs * self.steps_per_epoch
        total = (config.epochs or 1) * self.steps_per_epoch
        cosine = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: cosine_with_warmup(step, warmup, total))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": cosine, "interval": "step"}}


def trunk_forward(backbone: Backbone, cut: TrunkTail, runtime: str, dtype: str = "auto") -> Callable[[Tensor], Tensor]:
    """Function that maps (N, size, size, 3) uint8 pixels to the tail's input: normalised images, or features rounded as stored."""
    if cut.trunk is None:
        normalise = NormalizeInput(nn.Identity(), backbone.preprocessing)
        return lambda pixels: cast(Tensor, normalise.to(pixels.device)(pixels))
    trunk = cut.trunk

    @functools.cache  # made for the first image; stored features need no executor
    def executor() -> Executor:
        return make_executor(trunk, backbone.preprocessing, 1, runtime)

    return lambda pixels: round_like_stored(torch.from_numpy(batch_invariant(executor(), pixels.cpu().numpy())), dtype).to(pixels.device)


def best_memory_format(tail: nn.Module) -> torch.memory_format:
    """Faster memory format for training: channels_last on GPUs and for depthwise convolutions, else contiguous (benchmarks/epoch.py)."""
    depthwise = any(isinstance(m, nn.Conv2d) and m.groups == m.in_channels > 1 for m in tail.modules())
    return torch.channels_last if depthwise or torch.cuda.is_available() else torch.contiguous_format


class StandardisedLinear(nn.Module):
    """Linear classifier on features normalised to mean 0 and variance 1 by a BatchNorm without parameters.

    Pooled features differ a hundredfold in scale, which slows optimisers down; as in MAE's linear probe (Sec. A.1, arXiv:2111.06377).
    """

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(linear.in_features, affine=False, momentum=None)  # mean over all batches
        self.linear = linear

    def forward(self, features: Tensor) -> Tensor:
        logits: Tensor = self.linear(self.norm(features))
        return logits

    @torch.no_grad()
    def fold(self) -> None:
        """Fold the normalisation into `linear`: W' = W / sigma, b' = b - W' mu."""
        mean, variance = cast(Tensor, self.norm.running_mean), cast(Tensor, self.norm.running_var)
        self.linear.weight.div_((variance + self.norm.eps).sqrt())
        self.linear.bias.sub_(self.linear.weight @ mean)


def cosine_with_warmup(step: int, warmup: float, total: float) -> float:
    """Factor of the learning rate at `step` (from 0): linear up during `warmup` steps, then half a cosine down to 0."""
    if step < warmup:
        return (step + 1) / (warmup + 1)
    return 0.5 * (1 + math.cos(math.pi * min(1.0, (step - warmup) / max(1.0, total - warmup))))


def moving_average(decay: float) -> Callable[[Tensor, Tensor, Tensor | int], Tensor]:
    """Averaging function (average, weights, n) with decay min(decay, (1 + n) / (10 + n)), timm's and TensorFlow's warmup for short fits."""

    def average(averaged: Tensor, weights: Tensor, n: Tensor | int) -> Tensor:
        share = min(decay, (1 + int(n)) / (10 + int(n)))
        return share * averaged + (1 - share) * weights

    return average


def parameter_groups(backbone: Backbone, config: TrainConfig) -> list[dict[str, Any]]:
    """Parameter groups with learning rate lr * layer_decay ** depth, and no weight decay on biases and norms."""
    depth_of = parameter_stages(backbone)
    groups: dict[tuple[int, bool], list[nn.Parameter]] = {}
    for name, parameter in backbone.model.named_parameters():
        if name in depth_of:
            groups.setdefault((depth_of[name], parameter.ndim > 1), []).append(parameter)
    lr, weight_decay = config.lr or 0.0, config.weight_decay or 0.0
    return [
        {"params": parameters, "lr": lr * config.layer_decay**depth, "weight_decay": weight_decay if decays else 0.0}
        for (depth, decays), parameters in sorted(groups.items(), key=lambda item: item[0])
    ]


def _make_optimizer(config: TrainConfig, groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
    if config.optimizer == "sgd":
        return torch.optim.SGD(groups, lr=config.lr or 0.0, momentum=0.9, nesterov=True)
    optimizer = torch.optim.AdamW if config.optimizer == "adamw" else torch.optim.Adam
    return optimizer(groups, lr=config.lr or 0.0)


def _make_mixer(mix: str, classes: int) -> nn.Module | None:
    """torchvision's MixUp (alpha 0.2) or CutMix (alpha 1), or None."""
    if mix == "none":
        return None
    from torchvision.transforms import v2  # slow to import

    mixer: nn.Module = v2.MixUp(alpha=0.2, num_classes=classes) if mix == "mixup" else v2.CutMix(alpha=1.0, num_classes=classes)
    return mixer


def inverse_size_weights(labels: npt.NDArray[np.int64], classes: int) -> Tensor:
    """(C,) class weights n / (C * n_c), as scikit-learn's 'balanced'; their mean over the images is 1."""
    counts = np.bincount(labels, minlength=classes)
    return torch.from_numpy(len(labels) / (classes * counts)).float()
