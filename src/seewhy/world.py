"""Processes that train together -> which of them does what: shares dealt out and brought back together, and one that speaks for all."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

from seewhy import nearby

WAIT = timedelta(days=2)  # for each other; a process that died is told of by what started them, long before

S = TypeVar("S", bound=Any)  # what can be cut: a list, an array

_apart = False  # whether this process works by itself for a while
_table: nearby.Table | None = None  # what processes of one machine add up on


def _group() -> Any:
    """torch.distributed where processes have joined; None in a process of its own, where torch need not even be there."""
    distributed = sys.modules.get("torch.distributed")
    joined = distributed is not None and distributed.is_available() and distributed.is_initialized()
    return distributed if joined and not _apart else None


def size() -> int:
    """How many processes there are."""
    group = _group()
    return 1 if group is None else int(group.get_world_size())


def rank() -> int:
    """The number of this one, from 0."""
    group = _group()
    return 0 if group is None else int(group.get_rank())


def leads() -> bool:
    """Whether this process is the one that writes and speaks."""
    return rank() == 0


def share(items: S) -> S:
    """This process's part of what all of them have: every size()-th item, so that each item is somebody's, and nobody else's."""
    part: S = items[rank() :: size()]
    return part


def wait() -> None:
    """Until all processes are here."""
    group = _group()
    if group is not None:
        group.barrier()


def gathered(rows: npt.NDArray[Any], count: int) -> npt.NDArray[Any]:
    """(share of count, *shape) rows of each process's `share` -> (count, *shape), in order, for every process.

    Shares differ by one row where the processes do not divide count; what fills the shorter ones up is dropped again.
    """
    group = _group()
    if group is None:
        return rows
    import torch

    longest = -(-count // size())
    mine = torch.zeros((longest, *rows.shape[1:]), dtype=torch.from_numpy(rows[:0]).dtype)
    mine[: len(rows)] = torch.from_numpy(rows)
    parts = [torch.empty_like(mine) for _ in range(size())]
    group.all_gather(parts, mine)
    return torch.stack(parts, dim=1).reshape(longest * size(), *rows.shape[1:])[:count].numpy()


def of_leader(work: Callable[[], npt.NDArray[np.int64] | None]) -> npt.NDArray[np.int64] | None:
    """What `work` gives in the leading process, for all of them; the others do not work at it."""
    group = _group()
    if group is None:
        return work()
    import torch

    found = work() if leads() else None
    head = torch.tensor([-1 if found is None else len(found)])
    group.broadcast(head, 0)
    if head.item() < 0:
        return None
    values = torch.from_numpy(np.ascontiguousarray(found)) if found is not None else torch.empty(int(head.item()), dtype=torch.int64)
    group.broadcast(values, 0)
    told: npt.NDArray[np.int64] = values.numpy()
    return told


def text_of_leader(text: str) -> str:
    """The leader's text, for all."""
    told = of_leader(lambda: np.frombuffer(text.encode(), dtype=np.uint8).astype(np.int64))
    assert told is not None
    return told.astype(np.uint8).tobytes().decode()


def share_weights(tensors: Sequence[Any]) -> None:
    """The leader's values into these tensors of every process."""
    group = _group()
    if group is not None:
        for tensor in tensors:
            whole = tensor.contiguous()
            group.broadcast(whole, 0)
            tensor.copy_(whole)


def total(value: float) -> float:
    """The sum over all processes."""
    group = _group()
    if group is None:
        return value
    import torch

    return float(summed(torch.tensor(value, dtype=torch.float64)))


def summed(values: Any) -> Any:
    """A tensor's sum over all processes, place by place, as a new one."""
    group = _group()
    if group is not None and _table is not None and values.device.type == "cpu":
        import torch

        given = values if values.dtype == torch.float64 else values.float()  # NumPy has no bfloat16
        try:
            total = _table.summed(given.numpy().ravel())
        except nearby.Gone as error:
            raise torch.distributed.DistError(str(error)) from error
        return torch.from_numpy(total).view(values.shape).to(values.dtype)
    whole = values.clone()
    if group is not None:
        group.all_reduce(whole)
    return whole


def share_memory() -> bool:
    """From here on sums go over memory that processes of one machine share; False where they cannot. All of them have to call it."""
    global _table
    _table = nearby.lay_table(rank(), size(), text_of_leader, lambda well: total(float(well)) == size())
    return _table is not None


def mean_hook() -> Callable[[Any, Any], Any] | None:
    """How DistributedDataParallel makes the mean of a bucket of gradients, where all processes are on one machine; None for its own way."""
    import torch

    if _table is None or torch.cuda.is_available():
        return None

    def mean(_: Any, bucket: Any) -> Any:
        gradients = bucket.buffer()
        gradients.copy_(summed(gradients)).div_(size())
        found: Any = torch.futures.Future()
        found.set_result(gradients)
        return found

    mean.__annotations__ = {}  # PyTorch wants classes there, or nothing, and no names of classes
    return mean


@contextmanager
def apart() -> Iterator[None]:
    """One process works as if there were no others, who wait, and computes on the cores of all of them that are on this machine."""
    global _apart
    if size() == 1:
        yield
        return
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(threads * local_size())
    _apart = True
    try:
        yield
    finally:
        _apart = False
        torch.set_num_threads(threads)


# ---------------------------------------------------------------- joining


def started_together() -> bool:
    """Whether torchrun, `seewhy train --devices` or SLURM started this process beside others of the same work."""
    if "TORCHELASTIC_RUN_ID" in os.environ:
        return int(os.environ.get("WORLD_SIZE", "1")) > 1
    if int(os.environ.get("SLURM_NTASKS", "1") or 1) < 2 or "SLURM_STEP_ID" not in os.environ:  # a batch script without srun is alone
        return False
    from lightning.fabric.plugins.environments.slurm import SLURMEnvironment

    return bool(SLURMEnvironment.detect())


@contextmanager
def joined() -> Iterator[None]:
    """Joins the processes that were started with this one, as Lightning reads the environment, and leaves them again."""
    global _table
    if _group() is not None or not started_together():
        yield
        return
    import torch
    from lightning.fabric.plugins.environments.slurm import SLURMEnvironment
    from lightning.fabric.plugins.environments.torchelastic import TorchElasticEnvironment

    place = TorchElasticEnvironment() if TorchElasticEnvironment.detect() else SLURMEnvironment()
    os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"] = place.main_address, str(place.main_port)
    backend = "gloo"
    if torch.cuda.is_available():
        torch.cuda.set_device(place.local_rank())
        backend = "cpu:gloo,cuda:nccl"
    torch.distributed.init_process_group(backend, rank=place.global_rank(), world_size=place.world_size(), timeout=WAIT)
    if local_size() == size():
        share_memory()
    yield
    _table = None
    torch.distributed.destroy_process_group()  # not after an error, when others may not answer any more


def lost(error: RuntimeError) -> bool:
    """Whether it says no more than that another process does not answer."""
    from torch.distributed import DistError

    return isinstance(error, DistError) or "gloo" in str(error)


def leading() -> bool:
    """Whether this process is, or was until the others had left, the one that speaks for those that were started together."""
    if not started_together():
        return True
    return int(os.environ.get("RANK") or os.environ.get("SLURM_PROCID") or 0) == 0


def local_size() -> int:
    """How many of the processes run on this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("SLURM_NTASKS_PER_NODE") or size()) if size() > 1 else 1
