"""Two processes with half a batch each normalise as one process does with all of it: values, gradients, running statistics."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from timm.layers import BatchNormAct2d
from torch import Tensor, multiprocessing, nn
from torch.nn import functional as F

from seewhy import world
from seewhy.nearby import able
from seewhy.norms import whole_batch_norm


def network() -> nn.Module:
    """Every kind of BatchNorm that networks here have: plain, timm's with its activation, without parameters and with a plain mean."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 4, 3, bias=False),
        nn.BatchNorm2d(4),
        BatchNormAct2d(4),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.BatchNorm1d(4, affine=False, momentum=None),
        nn.Linear(4, 3),
    )


def batch() -> tuple[Tensor, Tensor]:
    """7 pictures, of which two processes have 4 and 3; away from 0, where sums of squares cancel."""
    pictures = 3 * torch.randn(7, 3, 8, 8, generator=torch.Generator().manual_seed(1)) + 10
    return pictures, torch.arange(7) % 3


def _process(rank: int, folder: str, nearby: bool) -> None:
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    if nearby:
        assert world.share_memory()
    (pictures, labels), shared, alone = batch(), network(), network()
    mine = pictures[rank::2].clone().requires_grad_()
    for _ in range(2):  # running statistics move twice
        with whole_batch_norm():
            loss = F.cross_entropy(shared(mine), labels[rank::2], reduction="sum") / len(pictures)
    loss.backward()
    whole = pictures.clone().requires_grad_()
    for _ in range(2):
        expected = F.cross_entropy(alone(whole), labels)
    expected.backward()
    assert world.total(loss.item()) == pytest.approx(expected.item(), rel=1e-6)
    torch.testing.assert_close(mine.grad, whole.grad[rank::2], rtol=1e-4, atol=1e-7)
    for ours, theirs in zip(shared.parameters(), alone.parameters(), strict=True):
        torch.testing.assert_close(world.summed(ours.grad), theirs.grad, rtol=1e-4, atol=1e-6)
    for (name, ours), theirs in zip(shared.named_buffers(), alone.buffers(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6, msg=name)
    plain = shared(mine)  # outside, PyTorch's own of the share alone
    assert float((plain - alone(whole)[rank::2]).abs().max()) > 0.01
    shared.eval()
    with whole_batch_norm():  # frozen layers take nothing from the batch
        torch.testing.assert_close(shared(mine[:1]), shared(mine)[:1])
    with world.apart(), whole_batch_norm():
        assert world.size() == 1
        shared.train()(pictures)  # waits for nobody
        assert torch.get_num_threads() == 2  # those of both
    assert torch.get_num_threads() == 1
    if nearby:
        assert world._table is not None
        turn = world._table.turn
        assert turn > 10
        world.total(1.0)
        assert world._table.turn == turn + 1
        mean = world.mean_hook()
        assert mean is not None
        bucket = SimpleNamespace(buffer=lambda: torch.full((70_000,), 1.0 + rank))  # more than go in one piece
        assert torch.equal(mean(None, bucket).value(), torch.full((70_000,), 1.5))
        assert world._table.turn == turn + 3
    else:
        assert world.mean_hook() is None
    torch.distributed.destroy_process_group()  # its threads must not outlive the process
    Path(folder, f"well-{rank}").touch()


@pytest.mark.parametrize("nearby", [False, pytest.param(True, marks=pytest.mark.skipif(not able(), reason="memory is not shared here"))])
def test_shares_are_normalised_as_the_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, nearby: bool) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    multiprocessing.spawn(_process, (str(tmp_path), nearby), nprocs=2)
    assert sorted(path.name for path in tmp_path.glob("well-*")) == ["well-0", "well-1"]


def test_a_process_alone_has_pytorchs_own() -> None:
    (pictures, _), ours, theirs = batch(), network(), network()
    with whole_batch_norm():
        found = ours(pictures)
    assert torch.equal(found, theirs(pictures))
