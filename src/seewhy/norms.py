"""Shares of a batch in several processes -> batch normalisation by mean and variance of the whole batch, as one process has it."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from seewhy import world


@contextmanager
def whole_batch_norm() -> Iterator[None]:
    """Every BatchNorm that trains here, of whatever class, counts the pictures of all processes. A process of its own is left as it is.

    PyTorch's SyncBatchNorm does this for GPUs alone, and by another class of layer.
    """
    if world.size() == 1:
        yield
        return
    with _WholeBatchNorm():
        yield


class _WholeBatchNorm(TorchFunctionMode):
    """Stands in for F.batch_norm where it would take the statistics of the batch."""

    def __torch_function__(self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is F.batch_norm:
            given = _SIGNATURE.bind(*args, **kwargs)
            given.apply_defaults()
            if given.arguments["training"]:
                return normalised(**{name: value for name, value in given.arguments.items() if name != "training"})
        return func(*args, **kwargs)


_SIGNATURE = inspect.signature(F.batch_norm)


def normalised(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    momentum: float,
    eps: float,
) -> Tensor:
    """F.batch_norm(..., training=True) of the batch whose share `input` (N, K, ...) is; arguments are those of F.batch_norm.

    The variance is that of Chan et al.'s sums, in float64, so that nothing cancels. Gradients flow to all shares.
    """
    values = input.float()
    places = [0, *range(2, input.ndim)]
    var, mean = torch.var_mean(values, places, correction=0)
    count = torch.full_like(mean, values.numel() // values.shape[1], dtype=torch.float64)
    mean, var = mean.double(), var.double()
    total, first, second = _SumOfAll.apply(torch.stack([count, count * mean, count * (var + mean**2)]))
    mean, var = first / total, second / total - (first / total) ** 2
    if running_mean is not None and running_var is not None:
        with torch.no_grad():
            unbiased = var * total / (total - 1).clamp(min=1)
            running_mean.lerp_(mean.to(running_mean), momentum)
            running_var.lerp_(unbiased.to(running_var), momentum)
    scale = (var + eps).rsqrt() if weight is None else weight * (var + eps).rsqrt()
    shift = -mean * scale if bias is None else bias - mean * scale
    shape = [1, -1] + [1] * (input.ndim - 2)
    whole: Tensor = torch.addcmul(shift.float().view(shape), values, scale.float().view(shape))
    return whole.to(input.dtype)


class _SumOfAll(torch.autograd.Function):
    """The sum over all processes; a value's gradient is the sum of what all of them made of it."""

    @staticmethod
    def forward(ctx: Any, values: Tensor) -> Any:
        return world.summed(values)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        return world.summed(gradient)
