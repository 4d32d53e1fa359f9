"""Two processes train what one would; one that dies ends all with one line, and another number of processes goes on."""

from __future__ import annotations

import csv
import json
import os
import runpy
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import psutil
import pytest
import torch
from safetensors.torch import load_file
from timm.layers import BatchNormAct2d
from torch import nn

import seewhy
from seewhy.api import Run
from seewhy.cli.guard import run_guarded
from seewhy.cli.main import call
from seewhy.config import make_config
from seewhy.core import distributed
from seewhy.errors import ConfigError, RunError
from seewhy.models.backbones import create_backbone
from seewhy.models.feature_store import KEY, FeatureStore, take_rows
from seewhy.models.trunk_tail import split_backbone
from seewhy.training.data_parallel import check_distributed, check_shards, sync_batch_norm
from seewhy.training.launch import EXIT_PEER_LOST, _failure_priority, _to_error, launch

CLASSES = {"red": 31, "green": 33, "blue": 27}  # two processes divide none of the parts
OPTIONS = {"backbone": "convnext_atto", "weights": "none", "size": 64, "group_by": "exact", "views": 1, "batch_size": 16, "lr": 0.0005}


def command(*arguments: str) -> list[str]:
    return [*arguments, *(text for name, value in OPTIONS.items() for text in ("--set", f"{name}={value}"))]


def history(run: Path) -> list[dict[str, str]]:
    with (run / "history.csv").open() as lines:
        return list(csv.DictReader(lines))


def stored(cache: Path) -> dict[bytes, np.ndarray]:
    """Key -> row of the one feature store in a cache."""
    (folder,) = (cache / "features").iterdir()
    store = FeatureStore(folder, (80, 8, 8))
    keys = np.concatenate([np.fromfile(file, dtype=KEY) for file in folder.glob("keys*.bin")])
    return dict(zip(keys.tolist(), take_rows(store.open_rows(), store.find(keys)), strict=True))


def test_two_processes_train_what_one_does(make_folder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = make_folder(CLASSES)
    environment = {**os.environ, "SEEWHY_CACHE": str(tmp_path / "two"), "OMP_NUM_THREADS": "1"}
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "-m", "seewhy.cli"]
    options = command("train", str(folder), "--epochs", "3", "--set", "unfreeze=2", "--out", str(tmp_path / "b"), "--json")
    done = subprocess.run([*torchrun, *options], env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout)  # one process speaks for both
    assert Path(said["run"]).resolve() == (tmp_path / "b").resolve()
    monkeypatch.setenv("SEEWHY_CACHE", str(tmp_path / "one"))
    a = seewhy.train(folder, out=tmp_path / "a", epochs=3, unfreeze=2, **OPTIONS)
    b = seewhy.load(tmp_path / "b")
    assert b.manifest["hardware"]["processes"] == 2
    assert a.manifest["split"]["hash"] == b.manifest["split"]["hash"]

    # Each image's features were computed once, by one of the two, and are those that one process computes.
    ours, theirs = stored(tmp_path / "two"), stored(tmp_path / "one")
    assert ours.keys() == theirs.keys()
    assert sorted(path.name for path in (tmp_path / "two").rglob("keys*.bin")) == ["keys-1.bin", "keys.bin"]
    sizes = [path.stat().st_size // 32 for path in (tmp_path / "two").rglob("keys*.bin")]
    assert sum(sizes) == len(ours)
    assert abs(sizes[0] - sizes[1]) <= 2
    for key, row in ours.items():
        np.testing.assert_allclose(row, theirs[key], atol=2e-3, rtol=2e-3)

    # On the same weights both count the same, each image once, though two processes do not divide them.
    assert b.metrics["val"]["n"] % 2 == 1
    for part in ("val", "test"):
        assert b.metrics[part]["n"] == a.metrics[part]["n"]
        again = b.evaluate(part).metrics
        for name in ("accuracy", "mean_per_class_accuracy", "macro_f1", "negative_log_likelihood"):
            assert again[name] == pytest.approx(b.metrics[part][name], abs=1e-5), name
    assert len(history(b.path)) == len(history(a.path)) == 3

    # Gradients are those of whole batches, so both make the same steps up to rounding.
    for ours_row, theirs_row in zip(history(b.path), history(a.path), strict=True):
        for name in ("train_loss", "val_loss", "train_accuracy", "val_accuracy", "lr"):
            assert float(ours_row[name]) == pytest.approx(float(theirs_row[name]), rel=1e-4), name
    began = create_backbone("convnext_atto", 3, "none", 0).model.state_dict()
    alone, together = (load_file(run.path / "model.safetensors") for run in (a, b))
    trained = [name for name in alone if name.startswith(("stages.2.", "stages.3.", "head."))]
    assert len(trained) > 40
    for name in trained:
        assert (together[name] - alone[name]).norm() < 1e-3 * (alone[name] - began[name]).norm(), name


def test_a_classifier_on_vectors_is_trained_once_for_all(make_folder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the main process with all cores: the numbers of one process, up to what another number of threads rounds."""
    monkeypatch.setenv("SEEWHY_CACHE", str(tmp_path / "cache"))
    options = {**OPTIONS, "unfreeze": 0, "epochs": 5}
    folder = make_folder(CLASSES)
    a = seewhy.train(folder, out=tmp_path / "a", **options)
    b = seewhy.train(folder, out=tmp_path / "b", devices=2, **options)
    for ours_row, theirs_row in zip(history(b.path), history(a.path), strict=True):
        for name in ("epoch", "train_loss", "val_loss", "train_accuracy", "val_accuracy", "lr"):
            assert float(ours_row[name]) == pytest.approx(float(theirs_row[name]), rel=1e-5), name
    alone, together = (load_file(run.path / "model.safetensors") for run in (a, b))
    for name in alone:
        torch.testing.assert_close(together[name], alone[name], rtol=1e-4, atol=1e-5)
    assert b.manifest["hardware"]["processes"] == 2


def test_a_process_that_dies_ends_all_and_another_number_goes_on(make_folder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = make_folder(CLASSES)
    monkeypatch.setenv("SEEWHY_CACHE", str(tmp_path / "cache"))
    options = command("train", str(folder), "--epochs", "8", "--set", "unfreeze=1", "--set", "patience=8", "--out", str(tmp_path / "run"))
    started = [sys.executable, "-m", "seewhy.cli", *options, "--devices", "2"]
    process = subprocess.Popen(started, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    last = tmp_path / ".run.partial" / "checkpoints" / "last.ckpt"
    try:
        until = time.monotonic() + 240
        while not last.exists():
            assert process.poll() is None, process.communicate()
            assert time.monotonic() < until
            time.sleep(0.05)
        children = psutil.Process(process.pid).children(recursive=True)
        workers = [child for child in children if "seewhy.training.launch" in " ".join(child.cmdline())]
        assert len(workers) == 2
        workers[1].send_signal(signal.SIGKILL)
        _, said = process.communicate(timeout=120)
    finally:
        process.kill()
    assert process.returncode == 2
    lines = [line for line in said.splitlines() if line.startswith("seewhy: ")]
    assert len(lines) == 1, said
    assert "was killed by SIGKILL" in lines[0]
    assert "--resume" in lines[0]
    assert said.splitlines()[-1] == lines[0]
    assert psutil.wait_procs(workers, timeout=30)[1] == []
    assert not (tmp_path / "run").exists()

    assert len(history_of(last)) >= 1
    # One process, where there were two.
    run = seewhy.train(folder, out=tmp_path / "run", resume=True, epochs=8, unfreeze=1, patience=8, **OPTIONS)
    assert [float(row["epoch"]) for row in history(run.path)] == [float(n) for n in range(1, 9)]


def history_of(checkpoint: Path) -> list[dict[str, float]]:
    import torch

    states = torch.load(checkpoint, map_location="cpu", weights_only=True)["callbacks"]
    return next(state["rows"] for state in states.values() if "rows" in state)


def test_what_cannot_be_shared_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(distributed, "world_size", lambda: 3)
    check_shards(6, 3)
    with pytest.raises(ConfigError, match="--batch-size 5 is too small for 3 processes"):
        check_shards(5, 3)
    with pytest.raises(ConfigError, match="2 validation images are too few for 3 processes"):
        check_shards(32, 2)
    with pytest.raises(ConfigError, match="--nodes needs --rendezvous"):
        launch(make_config(data="scenes"), tmp_path / "run", nodes=2)


def test_batch_norm_is_trained_by_one_process_on_cpus(make_folder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SEEWHY_CACHE", str(tmp_path / "cache"))
    with pytest.raises(RunError, match=r"^resnet18 --unfreeze 1: several processes on CPUs cannot train BatchNorm.*train in one process"):
        seewhy.train(make_folder(CLASSES), out=tmp_path / "run", devices=2, unfreeze=1, **{**OPTIONS, "backbone": "resnet18"})
    assert sorted(path.name for path in tmp_path.iterdir() if "run" in path.name) == []
    assert not (tmp_path / "cache" / "features").exists()  # refused before the features are computed


@pytest.mark.parametrize(
    ("backbone", "options", "refused"),
    [
        ("resnet18", {"unfreeze": 1}, True),
        ("resnet18", {"unfreeze": 0}, False),  # the main process trains a classifier on vectors alone
        ("resnet18", {"unfreeze": 0, "cache": False}, True),  # StandardisedLinear has a BatchNorm
        ("convnext_atto", {"unfreeze": 1}, False),
        ("convnext_atto", {"unfreeze": 0, "cache": False}, True),
        ("vit_tiny_patch16_224", {"unfreeze": "all"}, False),
    ],
)
def test_what_several_processes_on_cpus_can_train(
    backbone: str, options: dict[str, object], refused: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = make_config(data="scenes", backbone=backbone, **options).resolved()
    cut = split_backbone(create_backbone(backbone, 3, "none", 0), config.unfreeze)
    check_distributed(cut, config)  # a single process trains anything
    monkeypatch.setattr(distributed, "world_size", lambda: 2)
    with pytest.raises(ConfigError, match="BatchNorm") if refused else nullcontext():
        check_distributed(cut, config)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    check_distributed(cut, config)


def test_batch_norm_is_synchronised_on_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    """A copy with timm's layers, since PyTorch's conversion drops the activation of BatchNormAct2d; the network itself is left alone."""
    torch.manual_seed(0)
    tail = nn.Sequential(nn.Conv2d(3, 4, 3), BatchNormAct2d(4), nn.BatchNorm2d(4)).eval()
    assert sync_batch_norm(tail) is tail
    monkeypatch.setattr(distributed, "world_size", lambda: 2)
    found = sync_batch_norm(tail)
    assert [isinstance(layer, nn.SyncBatchNorm) for layer in found] == [False, True, True]
    assert [isinstance(layer, nn.SyncBatchNorm) for layer in tail] == [False, False, False]
    images = torch.randn(2, 3, 8, 8)
    assert torch.equal(found(images), tail(images))
    assert list(found.state_dict()) == list(tail.state_dict())
    for ours, theirs in zip(found.parameters(), tail.parameters(), strict=True):
        assert ours is theirs
    for ours, theirs in zip(found.buffers(), tail.buffers(), strict=True):
        assert ours is not theirs
    without = nn.Sequential(nn.Conv2d(3, 4, 3), nn.GroupNorm(2, 4))
    assert sync_batch_norm(without) is without


def test_the_line_of_the_process_that_failed_first() -> None:
    def failure(exitcode: int, timestamp: int, **data: str) -> SimpleNamespace:
        return SimpleNamespace(exitcode=exitcode, timestamp=timestamp, error_file_data=data, signal_name=lambda: "SIGKILL")

    told, killed = failure(2, 9, seewhy="images: no such folder"), failure(-9, 8)
    lost, ended = failure(EXIT_PEER_LOST, 5), failure(-15, 4)
    assert sorted([ended, lost, killed, told], key=_failure_priority) == [told, killed, ended, lost]
    assert str(_to_error(1, 2, told, Path("r"))) == "images: no such folder (process 1 of 2; the others were stopped)"
    found = _to_error(0, 4, killed, Path("r"))
    assert isinstance(found, RunError)
    assert str(found).startswith("r: process 0 of 4 was killed by SIGKILL (out of memory?); ")


@pytest.mark.parametrize("error", [torch.distributed.DistBackendError("gone"), RuntimeError("[gloo/tcp/pair.cc] Connection closed")])
def test_a_process_that_is_left_alone_says_so_in_a_line(
    error: RuntimeError, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Under torchrun or SLURM, where nobody sums up what all of them said."""

    def left_alone(*_: object) -> None:
        raise error

    monkeypatch.setattr("seewhy.training.pipeline.train_run", left_alone)
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "seewhy")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert run_guarded(lambda: call(["train", "scenes"])) == 2
    said = capsys.readouterr().err
    assert said.startswith("seewhy: another process of this training failed")
    assert said.count("\n") == 1
    monkeypatch.setenv("WORLD_SIZE", "1")
    with pytest.raises(RuntimeError, match=r"gone|gloo"):  # alone it is a mistake of ours
        run_guarded(lambda: call(["train", "scenes"]))


def test_repeats_of_several_processes_are_refused(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("seewhy.training.repeats.repeat", lambda *_: pytest.fail("trains"))
    assert run_guarded(lambda: call(["train", "scenes", "--repeats", "2", "--devices", "2"])) == 2
    assert "--repeats trains one run after another in one process" in capsys.readouterr().err
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "torchrun")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert run_guarded(lambda: call(["train", "scenes", "--repeats", "2"])) == 2
    assert "--repeats trains one run after another in one process" in capsys.readouterr().err


@pytest.fixture
def train_script(demo_run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """train.py in an empty folder; instead of training, `launch` and `train_run` give the demo run."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("seewhy.training.launch.launch", lambda *_: demo_run.path)
    monkeypatch.setattr("seewhy.training.pipeline.train_run", lambda *_: demo_run)
    main = runpy.run_path(str(Path(__file__).parents[2] / "train.py"))["main"]

    def run(*arguments: str) -> None:
        monkeypatch.setattr(sys, "argv", ["train.py", *arguments])
        main()

    return run


@pytest.mark.parametrize("arguments", [(), ("--devices", "2")])
def test_the_classic_script_exports_what_any_number_of_processes_trained(
    arguments: tuple[str, ...], train_script: Callable[..., None], demo_run: Run
) -> None:
    train_script(*arguments)
    assert Path("models/run.txt").read_text() == f"{demo_run.path}\n"
    saved = torch.load("models/best_model.pth", weights_only=True)
    for name, tensor in demo_run.backbone.model.state_dict().items():
        assert torch.equal(saved["state_dict"][name], tensor), name
    figures = sorted(path.stem for path in Path("results").glob("*.png"))
    assert figures == ["confusion_matrix", "gradcam_examples", "training_curves"]


def test_one_process_of_torchrun_exports(train_script: Callable[..., None], monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"TORCHELASTIC_RUN_ID": "torchrun", "WORLD_SIZE": "2", "RANK": "1"}.items():
        monkeypatch.setenv(name, value)
    train_script()
    assert list(Path().iterdir()) == []
    monkeypatch.setenv("RANK", "0")
    train_script()
    assert Path("models/best_model.pth").is_file()


def test_the_classic_script_refuses_repeats_before_it_trains(train_script: Callable[..., None], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("seewhy.training.repeats.repeat", lambda *_: pytest.fail("trains"))
    for arguments in (["--repeats", "2"], ["--repeats=2"]):
        with pytest.raises(ConfigError, match="this script needs one"):
            train_script(*arguments)
