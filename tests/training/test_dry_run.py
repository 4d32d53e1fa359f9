"""`seewhy train --dry-run`: what it says of data and network is what the training would do, and no file changes anywhere."""

from __future__ import annotations

import functools
import json
import os
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import timm
from PIL import Image

from seewhy.cli.guard import run_guarded
from seewhy.cli.main import call
from seewhy.config import make_config
from seewhy.data.synthetic import draw_scenes
from seewhy.training import dry_run as module
from seewhy.training.dry_run import dry_run

pytestmark = pytest.mark.usefixtures("one_thread")
NETWORK = ["--backbone", "test_resnet.r160_in1k", "--weights", "none"]


def tree(*roots: Path) -> dict[str, tuple[int, bytes]]:
    """Every file and folder below: when it was changed, and its content."""
    found = [path for root in roots for path in [root, *sorted(root.rglob("*"))]]
    return {str(path): (path.stat().st_mtime_ns, path.read_bytes() if path.is_file() else b"") for path in found}


def said(capsys: pytest.CaptureFixture[str], *command: str) -> Any:
    assert run_guarded(lambda: call(["train", *command, *NETWORK, "--dry-run", "--json"])) == 0
    return json.loads(capsys.readouterr().out)


@pytest.fixture
def folder(make_folder: Callable[..., Path], cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)  # where runs/ would be made
    return make_folder({"ant": 10, "bee": 10, "cow": 20})


def test_facts_by_hand_and_nothing_is_written(folder: Path, tmp_path: Path, cache: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "bee" / "torn.png").write_bytes(b"no image")
    before, place = tree(tmp_path), os.environ["SEEWHY_CACHE"]
    found = said(capsys, str(folder), "--unfreeze", "0", "--epochs", "7")
    assert tree(tmp_path) == before
    assert not cache.exists()
    assert os.environ["SEEWHY_CACHE"] == place
    assert found["classes"] == {"ant": 10, "bee": 10, "cow": 20}
    assert found["parts"] == {"train": 28, "val": 4, "test": 8}  # 70, 10 and 20% of each class
    assert found["skipped"] == [[str(folder / "bee" / "torn.png"), "not an image"]]
    assert found["trained_parameters"] == 3 * (96 + 1)  # the classifier of three classes on its 96 inputs
    assert found["parameters"] == sum(p.numel() for p in timm.create_model("test_resnet.r160_in1k", num_classes=3).parameters())
    assert (found["recipe"]["epochs"], found["recipe"]["batch_size"]) == (7, 256)
    assert found["run"] == "runs/images-test_resnet.r160_in1k-unfreeze0-seed0"
    assert 0 < found["seconds"] < 600


def test_a_cache_that_is_there_is_used_and_left_alone(
    folder: Path, tmp_path: Path, cache: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from seewhy.data.image_set import open_images

    open_images(str(folder))  # fills the record of checked images
    before = tree(tmp_path)
    monkeypatch.setattr("seewhy.data.verify.check_file", lambda path: pytest.fail("checked again"))
    assert said(capsys, str(folder), "--unfreeze", "1")["parts"]["train"] == 28
    assert tree(tmp_path) == before


def test_the_demo_set_is_not_drawn_into_the_cache(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("seewhy.data.synthetic.draw_scenes", functools.partial(draw_scenes, per_class=10))
    found = dry_run(make_config(data="scenes", backbone="test_resnet.r160_in1k", unfreeze=0), tmp_path / "run")
    assert len(found["classes"]) == 8
    assert not cache.exists()


def test_what_it_says_to_people(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "bee" / "torn.png").write_bytes(b"no image")
    same = np.asarray(Image.open(folder / "ant" / "0.png"))
    Image.fromarray(same).save(folder / "ant" / "again.bmp")
    assert run_guarded(lambda: call(["train", str(folder), *NETWORK, "--unfreeze", "1", "--dry-run"])) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[:2] == ["data      images: 41 images in 3 classes", "          cow 20, ant 11, bee 10"]
    assert "          1 pairs of near-duplicates by perceptual hash; training compares features too" in lines
    assert f"skipped   {folder}/bee/torn.png (not an image)" in lines
    assert "          1 images are unreadable; without --skip-bad training stops" in lines
    assert any(line.startswith("options   epochs 8, batch_size 32, lr 0.002,") for line in lines)
    assert any(line.startswith("time      about ") and "in PyTorch on this CPU" in line for line in lines)
    assert lines[-1] == "run       runs/images-test_resnet.r160_in1k-unfreeze1-seed0 (not written)"


def test_the_estimate_by_hand(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A clock that advances one second between two looks: each of SAMPLE images takes 1 / SAMPLE s at whatever is timed."""
    ticks = iter(range(1000))
    monkeypatch.setattr(module, "time", SimpleNamespace(perf_counter=lambda: float(next(ticks))))
    options: dict[str, Any] = {"data": str(folder), "backbone": "test_resnet.r160_in1k", "epochs": 3, "tta_flip": False, "workers": 1}
    one = 1 / module.SAMPLE

    def seconds(**more: Any) -> float:
        return float(dry_run(make_config(**options, **more), folder / "run")["seconds"])

    step, answers = one, 12 * one / 3  # val and test once
    fit = 3 * (28 * step + 4 * one / 3)
    cached = 1 + (2 * 28 + 12) * 2 * one + fit + answers  # two views of train, one of the others, through reading and frozen layers
    assert seconds(unfreeze=1, group_by="exact") == pytest.approx(cached, abs=0.06)
    assert seconds(unfreeze=1) == pytest.approx(cached + 40 * 2 * one, abs=0.06)  # and near-duplicates of all
    fresh = 1 + (3 * 32 + 12) * one + fit + answers  # nothing is frozen: each epoch reads
    assert seconds(unfreeze="all", group_by="exact") == pytest.approx(fresh, abs=0.06)


def test_mistakes_are_those_of_train(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def error(*arguments: str) -> str:
        assert run_guarded(lambda: call(["train", *arguments, "--dry-run"])) == 2
        return capsys.readouterr().err

    assert "unknown backbone 'resnet81'" in error(str(folder), "--backbone", "resnet81")
    assert "no such folder or dataset" in error(str(tmp_path / "none"))
    assert "exists already" in error(str(folder), "--out", str(folder))
    assert "has 5 stages" in error(str(folder), *NETWORK, "--unfreeze", "9")
    assert "leave out --devices, --nodes and --repeats" in error(str(folder), "--devices", "2")
    caltech = error("caltech101", "--data-root", str(tmp_path / "empty"))
    assert "a dry run downloads nothing" in caltech
    assert not (tmp_path / "empty").exists()


@pytest.mark.parametrize(
    "options", [["--set", "mixup=cutmix"], ["--views", "0"], ["--no-cache"], ["--unfreeze", "all", "--set", "mixup=mixup"]]
)
def test_every_way_to_train_has_an_estimate(folder: Path, capsys: pytest.CaptureFixture[str], options: list[str]) -> None:
    assert said(capsys, str(folder), *options)["seconds"] > 0
