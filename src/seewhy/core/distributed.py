"""Distributed helpers: rank and world size, sharding, all-gather, broadcast from the main process."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

TIMEOUT = timedelta(days=2)  # of a collective; the launcher detects a dead process long before

S = TypeVar("S", bound=Any)  # a sequence or array

_single_process = False  # whether this process is inside main_process_only()


def _group() -> Any:
    """torch.distributed if a process group exists, else None; does not import torch."""
    distributed = sys.modules.get("torch.distributed")
    initialised = distributed is not None and distributed.is_available() and distributed.is_initialized()
    return distributed if initialised and not _single_process else None


def world_size() -> int:
    """Number of processes."""
    group = _group()
    return 1 if group is None else int(group.get_world_size())


def rank() -> int:
    """Rank of this process, from 0."""
    group = _group()
    return 0 if group is None else int(group.get_rank())


def local_world_size() -> int:
    """Number of processes on this machine."""
    launched = os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("SLURM_NTASKS_PER_NODE")
    return int(launched) if launched and world_size() > 1 else world_size()


def is_main_process() -> bool:
    """Whether this is rank 0, which writes files and log lines."""
    return rank() == 0


def shard(items: S) -> S:
    """This rank's shard: every world_size()-th item, so that each item belongs to exactly one rank."""
    part: S = items[rank() :: world_size()]
    return part


def barrier() -> None:
    """Block until all processes are here."""
    group = _group()
    if group is not None:
        group.barrier()


def all_gather(rows: npt.NDArray[Any], count: int) -> npt.NDArray[Any]:
    """Gather the (len(shard), *shape) rows of each rank's `shard` into (count, *shape), in the original order, on every rank."""
    group = _group()
    if group is None:
        return rows
    import torch

    longest = -(-count // world_size())  # shards differ by at most one row; padding is dropped below
    padded = torch.zeros((longest, *rows.shape[1:]), dtype=torch.from_numpy(rows[:0]).dtype)
    padded[: len(rows)] = torch.from_numpy(rows)
    shards = [torch.empty_like(padded) for _ in range(world_size())]
    group.all_gather(shards, padded)
    gathered: npt.NDArray[Any] = torch.stack(shards, dim=1).reshape(longest * world_size(), *rows.shape[1:])[:count].numpy()
    return gathered


def broadcast(value: Any) -> Any:
    """Return the main process's `value`, any picklable object, on every process."""
    group = _group()
    values = [value]
    if group is not None:
        group.broadcast_object_list(values, src=0)
    return values[0]


def broadcast_tensors(tensors: Sequence[Any]) -> None:
    """Overwrite tensors in place with the main process's values."""
    group = _group()
    if group is not None:
        for tensor in tensors:
            contiguous = tensor.contiguous()
            group.broadcast(contiguous, 0)
            tensor.copy_(contiguous)


def all_reduce_scalar(value: float) -> float:
    """Sum of a number over all processes."""
    return float(all_gather(np.array([value], dtype=np.float64), world_size()).sum())


@contextmanager
def main_process_only() -> Iterator[None]:
    """Work as a single process while the other ranks wait, with the CPU threads of all ranks on this machine."""
    global _single_process
    if world_size() == 1:
        yield
        return
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(threads * local_world_size())
    _single_process = True
    try:
        yield
    finally:
        _single_process = False
        torch.set_num_threads(threads)


def is_distributed() -> bool:
    """Whether torchrun, `seewhy train --devices` or SLURM started this process as one of several."""
    if "TORCHELASTIC_RUN_ID" in os.environ:
        return int(os.environ.get("WORLD_SIZE", "1")) > 1
    if int(os.environ.get("SLURM_NTASKS", "1") or 1) < 2 or "SLURM_STEP_ID" not in os.environ:  # batch script without srun
        return False
    from lightning.fabric.plugins.environments.slurm import SLURMEnvironment

    return bool(SLURMEnvironment.detect())


def launched_as_main() -> bool:
    """Whether the environment makes this process rank 0, with or without a process group."""
    if not is_distributed():
        return True
    return int(os.environ.get("RANK") or os.environ.get("SLURM_PROCID") or 0) == 0


@contextmanager
def process_group() -> Iterator[None]:
    """Create the process group that the environment describes (gloo, with NCCL on GPUs) and destroy it at the end."""
    if _group() is not None or not is_distributed():
        yield
        return
    import torch
    from lightning.fabric.plugins.environments.slurm import SLURMEnvironment
    from lightning.fabric.plugins.environments.torchelastic import TorchElasticEnvironment

    environment = TorchElasticEnvironment() if TorchElasticEnvironment.detect() else SLURMEnvironment()
    os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"] = environment.main_address, str(environment.main_port)
    backend = "gloo"
    if torch.cuda.is_available():
        torch.cuda.set_device(environment.local_rank())
        backend = "cpu:gloo,cuda:nccl"
    torch.distributed.init_process_group(backend, rank=environment.global_rank(), world_size=environment.world_size(), timeout=TIMEOUT)
    yield
    torch.distributed.destroy_process_group()  # not after an error: peers may have exited


def is_peer_failure(error: RuntimeError) -> bool:
    """Whether the error comes from a lost connection to another process."""
    from torch.distributed import DistError

    return isinstance(error, DistError) or "gloo" in str(error)
