"""Data-parallel training: synchronise BatchNorm, and refuse what several processes cannot train."""

from __future__ import annotations

import copy

import torch
from timm.layers.norm_act import convert_sync_batchnorm
from torch import nn

from seewhy.config import TrainConfig
from seewhy.core import distributed
from seewhy.errors import ConfigError
from seewhy.models.trunk_tail import TrunkTail
from seewhy.training.loaders import trains_on_features


def has_batch_norm(module: nn.Module) -> bool:
    """Whether a layer normalises by batch statistics."""
    return any(isinstance(layer, nn.modules.batchnorm._BatchNorm) for layer in module.modules())


def sync_batch_norm(tail: nn.Module) -> nn.Module:
    """Copy `tail`, with shared parameters, for BatchNorm over all ranks; return `tail` itself for one process or without BatchNorm.

    Uses timm's conversion: PyTorch's, and so Lightning's `sync_batchnorm`, drops the activation of timm's BatchNormAct2d.
    """
    if distributed.world_size() == 1 or not has_batch_norm(tail):
        return tail
    shared = {id(parameter): parameter for parameter in tail.parameters()}
    synchronised: nn.Module = convert_sync_batchnorm(copy.deepcopy(tail, shared))  # type: ignore[no-untyped-call]
    return synchronised


def check_distributed(cut: TrunkTail, config: TrainConfig) -> None:
    """Raise ConfigError if several processes on CPUs would train BatchNorm, which PyTorch synchronises on GPUs only.

    A classifier on stored features is exempt, since only the main process trains it.
    """
    if distributed.world_size() == 1 or torch.cuda.is_available():
        return
    if isinstance(cut.tail, nn.Linear):  # StandardisedLinear has a BatchNorm
        refused, advice = not trains_on_features(cut, config), "fixed views with the cache on"
    else:
        refused, advice = has_batch_norm(cut.tail), "a network without BatchNorm, such as convnext_tiny"
    if refused:
        raise ConfigError(
            f"{config.backbone} --unfreeze {config.unfreeze}: several processes on CPUs cannot train BatchNorm, which PyTorch synchronises "
            f"on GPUs only; train in one process, which uses all cores, or choose {advice}"
        )


def check_shards(batch_size: int, val_images: int) -> None:
    """Raise ConfigError if a process would have fewer than 2 images of a batch, or no validation image."""
    processes = distributed.world_size()
    if processes > 1 and batch_size < 2 * processes:
        raise ConfigError(f"--batch-size {batch_size} is too small for {processes} processes; give each at least 2 images")
    if val_images < processes:
        raise ConfigError(f"{val_images} validation images are too few for {processes} processes; use fewer --devices")
