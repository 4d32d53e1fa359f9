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
    ones, zeros = values.new_ones(values.shape[1]), values.new_zeros(values.shape[1])
    with torch.no_grad():
        mean, var = torch.batch_norm_update_stats(values, None, None, 0.0)  # PyTorch's kernels, of the share
        mean, var = mean.double(), var.double()
        count = torch.full_like(mean, values.numel() // values.shape[1])
        total, first, second = world.summed(torch.stack([count, count * mean, count * (var + mean**2)]))
        mean, var = first / total, (second / total - (first / total) ** 2).clamp(min=0)
        if running_mean is not None and running_var is not None:
            running_mean.lerp_(mean.to(running_mean), momentum)
            running_var.lerp_((var * total / (total - 1).clamp(min=1)).to(running_var), momentum)
        given = (mean.float(), var.float(), total.float())
    scale, shift = ones if weight is None else weight.float(), zeros if bias is None else bias.float()
    whole: Tensor = _Normalised.apply(values, scale, shift, *given, eps)
    return whole.to(input.dtype)


class _Normalised(torch.autograd.Function):
    """Values by a mean and a variance that all processes made: PyTorch's kernels for fixed ones, and what flows through these two."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, scale: Tensor, shift: Tensor, mean: Tensor, var: Tensor, total: Tensor, eps: float) -> Tensor:
        ctx.save_for_backward(values, scale, mean, var, total)
        ctx.eps = eps
        return F.batch_norm(values, mean, var, scale, shift, False, 0.0, eps)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        values, scale, mean, var, total = ctx.saved_tensors
        _, of_scale, of_shift = torch.ops.aten.native_batch_norm_backward(
            gradient,
            *(values, scale, mean, var, None, None, False, ctx.eps, [False, True, True]),
        )
        # Ioffe & Szegedy 2015, arXiv:1502.03167, the gradients of Algorithm 1, with both sums over all processes.
        all_scale, all_shift = world.summed(torch.stack([of_scale, of_shift])) / total
        inverse = (var + ctx.eps).rsqrt()
        direct = scale * inverse
        slope = -direct * inverse * all_scale
        offset = -direct * all_shift - slope * mean
        shape = [1, -1] + [1] * (values.ndim - 2)
        of_values = torch.addcmul(offset.view(shape), values, slope.view(shape)).addcmul_(gradient, direct.view(shape))
        return of_values, of_scale, of_shift, None, None, None, None
