"""Shards of several processes: disjoint, gathered in order, counted once; a single process is its own world."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import multiprocessing

from seewhy.core import distributed


def test_alone_everything_is_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("TORCHELASTIC_RUN_ID", "SLURM_NTASKS", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    assert (
        distributed.world_size(),
        distributed.rank(),
        distributed.is_main_process(),
        distributed.launched_as_main(),
        distributed.local_world_size(),
    ) == (1, 0, True, True, 1)
    assert distributed.shard([5, 6, 7]) == [5, 6, 7]
    assert distributed.all_gather(np.arange(3), 3).tolist() == [0, 1, 2]
    assert distributed.broadcast("runs/größer") == "runs/größer"
    assert distributed.all_reduce_scalar(2.5) == 2.5
    with distributed.main_process_only():
        assert distributed.world_size() == 1
    with distributed.process_group():
        assert distributed.world_size() == 1


def test_what_started_us_is_read_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "seewhy")
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    assert distributed.is_distributed()
    assert not distributed.launched_as_main()
    monkeypatch.setenv("WORLD_SIZE", "1")
    assert not distributed.is_distributed()
    monkeypatch.delenv("TORCHELASTIC_RUN_ID")
    monkeypatch.setenv("SLURM_NTASKS", "2")
    monkeypatch.setenv("SLURM_JOB_NAME", "training")
    monkeypatch.setenv("SLURM_PROCID", "1")
    monkeypatch.delenv("RANK")
    monkeypatch.delenv("SLURM_STEP_ID", raising=False)
    assert not distributed.is_distributed()  # a batch script of two tasks that srun has not started: nobody else would come
    monkeypatch.setenv("SLURM_STEP_ID", "0")
    assert distributed.is_distributed()
    assert not distributed.launched_as_main()
    monkeypatch.setenv("SLURM_JOB_NAME", "interactive")  # a shell on a cluster's machine is no training of several
    assert not distributed.is_distributed()


def _process(number: int, folder: str) -> None:
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=number, world_size=2)
    assert (distributed.world_size(), distributed.rank(), distributed.is_main_process()) == (2, number, number == 0)
    found = {}
    for count in (0, 1, 4, 5):  # shards have equal lengths only where the world size divides the count
        rows = np.arange(count * 3, dtype=np.float32).reshape(count, 3)
        assert np.array_equal(distributed.all_gather(distributed.shard(rows), count), rows)
        found[count] = len(distributed.shard(rows))
    assert found == ({0: 0, 1: 1, 4: 2, 5: 3} if number == 0 else {0: 0, 1: 0, 4: 2, 5: 2})
    assert distributed.all_reduce_scalar(number + 1.0) == 3.0
    sent = {"path": Path("runs/größer"), "groups": np.array([3, 1, 4])} if number == 0 else None
    received = distributed.broadcast(sent)
    assert received["path"] == Path("runs/größer")
    assert received["groups"].tolist() == [3, 1, 4]
    assert distributed.broadcast(None if number == 0 else "not the main process") is None
    torch.set_num_threads(1)
    with distributed.main_process_only():
        assert (distributed.world_size(), distributed.rank()) == (1, 0)
        assert torch.get_num_threads() == 2  # those of both
        assert distributed.all_reduce_scalar(1.0) == 1.0  # waits for nobody
    assert distributed.world_size() == 2
    assert torch.get_num_threads() == 1
    weights = [torch.full((2, 2, 2, 2), float(number)).to(memory_format=torch.channels_last), torch.tensor(number)]
    distributed.broadcast_tensors(weights)
    assert [float(w.sum()) for w in weights] == [0.0, 0.0]
    distributed.barrier()
    torch.distributed.destroy_process_group()  # its threads must not outlive the process
    Path(folder, f"well-{number}").touch()


def test_two_processes(tmp_path: Path) -> None:
    multiprocessing.spawn(_process, (str(tmp_path),), nprocs=2)
    assert sorted(path.name for path in tmp_path.glob("well-*")) == ["well-0", "well-1"]
