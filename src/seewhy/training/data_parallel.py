"""Data-parallel training: what several processes can train, and BatchNorm synchronised over their shards of a batch."""

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
    """Whether the module normalises by statistics of the batch."""
    return any(isinstance(each, nn.modules.batchnorm._BatchNorm) for each in module.modules())


def sync_batch_norm(tail: nn.Module) -> nn.Module:
    """A copy whose BatchNorm layers use statistics of all ranks' shards; it shares the parameters of `tail`, but no buffers.

    `tail` itself for a single process, and where there is no BatchNorm.
    By timm, since PyTorch's own conversion (and so Lightning's `sync_batchnorm`) drops the activation of timm's BatchNormAct2d.
    """
    if distributed.world_size() == 1 or not has_batch_norm(tail):
        return tail
    shared = {id(parameter): parameter for parameter in tail.parameters()}
    synchronised: nn.Module = convert_sync_batchnorm(copy.deepcopy(tail, shared))  # type: ignore[no-untyped-call]
    return synchronised


def check_distributed(cut: TrunkTail, config: TrainConfig) -> None:
    """ConfigError where several processes on CPUs would train BatchNorm: PyTorch synchronises its statistics on GPUs only.

    Does not concern a classifier on stored features, which the main process trains alone.
    """
    if distributed.world_size() == 1 or torch.cuda.is_available():
        return
    if isinstance(cut.tail, nn.Linear):  # StandardisedLinear has a BatchNorm
        refused, advice = not trains_on_features(cut, config), "fixed views with the cache on"
    else:
        refused, advice = has_batch_norm(cut.tail), "a network without BatchNorm, such as convnext_tiny"
    if refused:
        raise ConfigError(
            f"{config.backbone} --unfreeze {config.unfreeze}: several processes on CPUs cannot train BatchNorm, whose statistics PyTorch "
            f"synchronises on GPUs only; train in one process, which uses all cores, or choose {advice}"
        )


def check_shards(batch_size: int, val_images: int) -> None:
    """ConfigError where some process would have nothing to do."""
    if distributed.world_size() > 1 and batch_size < 2 * distributed.world_size():
        raise ConfigError(f"--batch-size {batch_size} is too small for {distributed.world_size()} processes; give each at least 2 images")
    if val_images < distributed.world_size():
        raise ConfigError(f"{val_images} validation images are too few for {distributed.world_size()} processes; use fewer --devices")
