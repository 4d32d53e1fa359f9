"""Shares of several processes: dealt out, brought back in order, counted once; a process alone needs none of it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import multiprocessing

from seewhy import world


def test_alone_everything_is_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("TORCHELASTIC_RUN_ID", "SLURM_NTASKS", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    assert (world.size(), world.rank(), world.leads(), world.leading(), world.local_size()) == (1, 0, True, True, 1)
    assert world.share([5, 6, 7]) == [5, 6, 7]
    assert world.gathered(np.arange(3), 3).tolist() == [0, 1, 2]
    assert world.of_leader(lambda: None) is None
    assert world.total(2.5) == 2.5
    assert world.text_of_leader("runs/größer") == "runs/größer"
    with world.joined():
        assert world.size() == 1


def test_what_started_us_is_read_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "seewhy")
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    assert world.started_together()
    assert not world.leading()
    monkeypatch.setenv("WORLD_SIZE", "1")
    assert not world.started_together()
    monkeypatch.delenv("TORCHELASTIC_RUN_ID")
    monkeypatch.setenv("SLURM_NTASKS", "2")
    monkeypatch.setenv("SLURM_JOB_NAME", "training")
    monkeypatch.setenv("SLURM_PROCID", "1")
    monkeypatch.delenv("RANK")
    monkeypatch.delenv("SLURM_STEP_ID", raising=False)
    assert not world.started_together()  # a batch script of two tasks that srun has not started: nobody else would come
    monkeypatch.setenv("SLURM_STEP_ID", "0")
    assert world.started_together()
    assert not world.leading()
    monkeypatch.setenv("SLURM_JOB_NAME", "interactive")  # a shell on a cluster's machine is no training of several
    assert not world.started_together()


def _process(number: int, folder: str) -> None:
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=number, world_size=2)
    assert (world.size(), world.rank(), world.leads()) == (2, number, number == 0)
    found = {}
    for count in (0, 1, 4, 5):  # shares are of the same length only where the processes divide the count
        rows = np.arange(count * 3, dtype=np.float32).reshape(count, 3)
        assert np.array_equal(world.gathered(world.share(rows), count), rows)
        found[count] = len(world.share(rows))
    assert found == ({0: 0, 1: 1, 4: 2, 5: 3} if number == 0 else {0: 0, 1: 0, 4: 2, 5: 2})
    assert world.total(number + 1.0) == 3.0
    told = world.of_leader(lambda: np.array([3, 1, 4]) if number == 0 else pytest.fail("only the leader works"))
    assert told is not None
    assert told.tolist() == [3, 1, 4]
    assert world.of_leader(lambda: None) is None
    assert world.text_of_leader(f"from {number}") == "from 0"
    weights = [torch.full((2, 2, 2, 2), float(number)).to(memory_format=torch.channels_last), torch.tensor(number)]
    world.share_weights(weights)
    assert [float(w.sum()) for w in weights] == [0.0, 0.0]
    world.wait()
    torch.distributed.destroy_process_group()  # its threads must not outlive the process
    Path(folder, f"well-{number}").touch()


def test_two_processes(tmp_path: Path) -> None:
    multiprocessing.spawn(_process, (str(tmp_path),), nprocs=2)
    assert sorted(path.name for path in tmp_path.glob("well-*")) == ["well-0", "well-1"]
