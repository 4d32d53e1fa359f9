"""The stages in order: places of runs, resume, locks, nothing left after errors, runs that repeat themselves."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from filelock import FileLock
from PIL import Image

import seewhy
from seewhy.api import Run
from seewhy.config import make_config
from seewhy.errors import DataError, ImageError, OutputError, RunError, SeewhyError, SplitError
from seewhy.training import fit as fit_module
from seewhy.training import pipeline
from seewhy.training.run_dirs import resolve_run_dir

SMALL = {"backbone": "test_resnet.r160_in1k", "weights": "none", "epochs": 2, "batch_size": 8, "workers": 0}


@pytest.fixture
def folder(make_folder: Callable[..., Path], cache: Path) -> Path:
    return make_folder({"ant": 10, "bee": 10, "cow": 12})


def same_weights(one: Run, two: Run) -> bool:
    a, b = one.backbone.model.state_dict(), two.backbone.model.state_dict()
    return all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.usefixtures("without_report")
def test_default_names_do_not_collide(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    first = seewhy.train(folder, **SMALL)
    second = seewhy.train(folder, **SMALL)
    assert first.path == Path("runs/images-test_resnet.r160_in1k-unfreeze1-seed0")
    assert second.path == Path("runs/images-test_resnet.r160_in1k-unfreeze1-seed0-2")
    assert same_weights(first, second)  # same seed, same machine
    assert not same_weights(first, seewhy.train(folder, seed=1, **SMALL))


@pytest.mark.usefixtures("without_report")
def test_a_run_repeats_from_its_own_record(folder: Path, tmp_path: Path) -> None:
    first = seewhy.train(folder, out=tmp_path / "a", views=3, label_smoothing=0.2, **SMALL)
    values = json.loads((tmp_path / "a" / "run.json").read_text())["config"]
    again = pipeline.train_run(make_config(**values), tmp_path / "b")
    assert same_weights(first, again)
    assert again.manifest["split"] == first.manifest["split"]
    assert again.metrics == first.metrics


def test_existing_folder_is_not_overwritten(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "precious.txt").write_text("mine")
    with pytest.raises(OutputError, match="exists already"):
        seewhy.train(folder, out=tmp_path / "out", **SMALL)
    assert (tmp_path / "out" / "precious.txt").read_text() == "mine"
    (tmp_path / "out" / "precious.txt").unlink()
    assert seewhy.train(folder, out=tmp_path / "out", **SMALL).path == tmp_path / "out"  # an empty folder will do


def test_unwritable_output(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(OutputError, match="--out"):
        seewhy.train(folder, out=tmp_path / "file" / "run", **SMALL)


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"backbone": "resnet19"}, SeewhyError),
        ({"weights": "nowhere.safetensors"}, SeewhyError),
        ({"unfreeze": 9}, SeewhyError),
        ({"protocol": "caltech30"}, SplitError),
        ({"data": "no/such/folder"}, DataError),
    ],
)
def test_mistakes_leave_nothing_behind(folder: Path, tmp_path: Path, options: dict[str, object], error: type[SeewhyError]) -> None:
    values = {"data": str(folder), **SMALL, **options}
    with pytest.raises(error) as caught:
        pipeline.train_run(make_config(**values), tmp_path / "runs" / "mine")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "runs").exists()


def test_bad_images_stop_or_are_recorded(folder: Path, tmp_path: Path) -> None:
    data = (folder / "ant" / "0.png").read_bytes()
    (folder / "ant" / "cut.png").write_bytes(data[: len(data) // 2])
    (folder / "bee" / "empty.jpg").write_bytes(b"")
    with pytest.raises(ImageError, match=r"2 of 34 .*--skip-bad") as caught:
        seewhy.train(folder, out=tmp_path / "run", **SMALL)
    assert {Path(path).name for path, _ in caught.value.bad} == {"cut.png", "empty.jpg"}
    assert not (tmp_path / "run").exists()
    run = seewhy.train(folder, out=tmp_path / "run", skip_bad=True, **SMALL)
    assert {Path(item["path"]).name for item in run.manifest["data"]["bad"]} == {"cut.png", "empty.jpg"}
    assert run.manifest["data"]["images"] == 32
    assert "cut.png" in (tmp_path / "run" / "report.html").read_text()


def test_same_image_in_two_classes_is_told(folder: Path, tmp_path: Path) -> None:
    shutil.copy(folder / "ant" / "3.png", folder / "bee" / "copy.png")
    run = seewhy.train(folder, out=tmp_path / "run", **SMALL)
    (paths,) = run.manifest["data"]["conflicting_duplicates"]
    assert {Path(path).name for path in paths} == {"3.png", "copy.png"}
    split = json.loads((tmp_path / "run" / "split.json").read_text())
    assert sum(len(set(split[part])) for part in ("train", "val", "test")) == 32  # one content, one part


def interrupt_after(monkeypatch: pytest.MonkeyPatch, batches: int) -> None:
    original = fit_module.ProgressCallback.on_train_batch_end
    left = [batches]

    def stop(self: fit_module.ProgressCallback, *args: object, **kwargs: object) -> None:
        left[0] -= 1
        if left[0] == 0:
            raise KeyboardInterrupt
        original(self, *args, **kwargs)

    monkeypatch.setattr(fit_module.ProgressCallback, "on_train_batch_end", stop)


@pytest.mark.usefixtures("without_report")
def test_interrupted_then_resumed_is_the_uninterrupted_run(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options = {**SMALL, "epochs": 3}
    whole = seewhy.train(folder, out=tmp_path / "whole", **options)
    with monkeypatch.context() as patch:
        interrupt_after(patch, 5)  # 3 batches an epoch: in the second one
        with pytest.raises(KeyboardInterrupt):
            seewhy.train(folder, out=tmp_path / "mine", **options)
    assert not (tmp_path / "mine").exists()
    with pytest.raises(RunError, match="--resume"):
        seewhy.train(folder, out=tmp_path / "mine", **options)
    with pytest.raises(RunError, match="other options"):
        seewhy.train(folder, out=tmp_path / "mine", resume=True, **{**options, "lr": 0.5})
    resumed = seewhy.train(folder, out=tmp_path / "mine", resume=True, **options)
    assert same_weights(whole, resumed)
    assert (tmp_path / "mine" / "history.csv").read_text().count("\n") == 4
    assert sorted(path.name for path in tmp_path.glob(".*")) == []
    # Once more: it is finished, and nothing is trained again.
    assert same_weights(seewhy.train(folder, out=tmp_path / "mine", resume=True, **options), resumed)
    with pytest.raises(RunError, match="other options"):
        seewhy.train(folder, out=tmp_path / "mine", resume=True, **{**options, "lr": 0.5})


def test_two_trainings_never_share_a_place(folder: Path, tmp_path: Path) -> None:
    with FileLock(tmp_path / ".mine.lock"), pytest.raises(RunError, match="another training"):
        seewhy.train(folder, out=tmp_path / "mine", **SMALL)


@pytest.mark.usefixtures("without_report")
def test_split_from_another_run(folder: Path, tmp_path: Path) -> None:
    first = seewhy.train(folder, out=tmp_path / "a", seed=5, **SMALL)
    second = seewhy.train(folder, out=tmp_path / "b", seed=6, split_from=str(tmp_path / "a"), **SMALL)
    assert first.manifest["split"]["hash"] == second.manifest["split"]["hash"]
    assert not same_weights(first, second)


@pytest.mark.usefixtures("without_report")
@pytest.mark.parametrize("runtime", ["onnx", "torch"])
def test_same_bits_cached_or_not_and_with_any_number_of_workers(folder: Path, tmp_path: Path, cache: Path, runtime: str) -> None:
    options = {**SMALL, "runtime": runtime}
    uncached = seewhy.train(folder, out=tmp_path / "a", cache=False, **options)
    assert not (cache / "features").exists()
    cached = seewhy.train(folder, out=tmp_path / "b", **options)
    assert (cache / "features").exists()
    assert same_weights(uncached, cached)
    assert same_weights(uncached, seewhy.train(folder, out=tmp_path / "c", cache=False, **{**options, "workers": 4}))
    assert same_weights(uncached, seewhy.train(folder, out=tmp_path / "d", **{**options, "workers": 4}))


@pytest.mark.usefixtures("without_report")
def test_evaluate_finds_its_own_split_again(folder: Path, tmp_path: Path) -> None:
    run = seewhy.train(folder, out=tmp_path / "run", **SMALL)
    for part in ("val", "test"):
        found = run.evaluate(part).metrics
        assert found == run.metrics[part]
    moved = folder.rename(folder.with_name("moved"))
    with pytest.raises(DataError, match="no such folder"):
        run.evaluate()
    everything = run.evaluate(data=str(moved))
    assert everything.part == "all"
    assert everything.metrics["n"] == 32


@pytest.mark.usefixtures("without_report")
def test_evaluate_on_fewer_and_on_foreign_classes(folder: Path, tmp_path: Path) -> None:
    run = seewhy.train(folder, out=tmp_path / "run", **SMALL)
    fewer = tmp_path / "fewer"
    for name in ("ant", "cow"):
        shutil.copytree(folder / name, fewer / name)
    evaluation = run.evaluate(data=str(fewer))
    assert evaluation.classes == ("ant", "bee", "cow")
    np.testing.assert_array_equal(evaluation.confusion.sum(axis=1), [10, 0, 12])
    shutil.copytree(folder / "bee", fewer / "wasp")
    with pytest.raises(DataError, match="wasp"):
        run.evaluate(data=str(fewer))


@pytest.mark.usefixtures("without_report")
def test_changed_data_is_noticed(folder: Path, tmp_path: Path) -> None:
    run = seewhy.train(folder, out=tmp_path / "run", **SMALL)
    from PIL import Image

    Image.new("RGB", (30, 30), "red").save(folder / "ant" / "new.png")
    with pytest.raises(SplitError, match=r"new\.png"):
        run.evaluate()


@pytest.mark.usefixtures("without_report")
def test_whole_network_and_no_cache_run_to_the_end(folder: Path, tmp_path: Path) -> None:
    run = seewhy.train(folder, out=tmp_path / "all", **{**SMALL, "unfreeze": "all", "epochs": 1})
    assert run.metrics["test"]["n"] == 6
    assert run.cut.trunk is None
    assert run.evaluate().metrics == run.metrics["test"]


def test_parts_that_leak_are_kept_and_told_of(demo_set: Path, tmp_path: Path, cache: Path) -> None:
    """Folders train/ and test/ with smaller copies of training images in test: trained as given, and said in log, record and report."""
    source = sorted((demo_set / "images").iterdir())[:2]
    for folder in source:
        files = sorted(folder.iterdir())
        for part, chosen in (("train", files[:14]), ("test", files[14:20])):
            (tmp_path / "data" / part / folder.name).mkdir(parents=True)
            for file in chosen:
                shutil.copy(file, tmp_path / "data" / part / folder.name)
    for n in range(5):
        Image.open(files[n]).resize((230, 230)).save(tmp_path / "data" / "test" / folder.name / f"again{n}.jpg", quality=95)
    run = seewhy.train(tmp_path / "data", out=tmp_path / "run", backbone="efficientnet_lite0", unfreeze=0, epochs=2)
    leaked = run.manifest["split"]["leaked_test_images"]
    assert leaked in (3, 4, 5)  # val was cut out of the training folder, and may have taken one or two of the originals
    assert f"{leaked} of the 17 test images have a near-duplicate in training" in (tmp_path / "run" / "report.html").read_text()


def test_a_full_disk_at_the_very_end_loses_nothing(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever fails while the run is written, its checkpoints are still there, and --resume ends it without training."""
    whole = seewhy.train(folder, out=tmp_path / "whole", **SMALL)
    with monkeypatch.context() as patch:
        patch.setattr("seewhy.models.saved_run.move_folder", lambda *folders: (_ for _ in ()).throw(OSError(28, "No space left on device")))
        with pytest.raises(OutputError, match="No space left on device"):
            seewhy.train(folder, out=tmp_path / "mine", **SMALL)
    assert (tmp_path / ".mine.partial" / "checkpoints" / "last.ckpt").exists()
    resumed = seewhy.train(folder, out=tmp_path / "mine", resume=True, **SMALL)
    assert same_weights(whole, resumed)
    assert not (tmp_path / "mine" / "checkpoints").exists()
    assert not (tmp_path / "mine" / "config.json").exists()


@pytest.mark.usefixtures("without_report")
def test_a_place_taken_meanwhile_is_not_touched(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        interrupt_after(patch, 5)
        with pytest.raises(KeyboardInterrupt):
            seewhy.train(folder, out=tmp_path / "mine", **{**SMALL, "epochs": 3})
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "precious.txt").write_text("mine")
    with pytest.raises(OutputError, match="exists already"):
        seewhy.train(folder, out=tmp_path / "mine", resume=True, **{**SMALL, "epochs": 3})
    assert (tmp_path / "mine" / "precious.txt").read_text() == "mine"
    assert (tmp_path / ".mine.partial" / "checkpoints").exists()


def test_a_spoiled_record_of_an_unfinished_run_is_one_line(folder: Path, tmp_path: Path) -> None:
    (tmp_path / ".mine.partial").mkdir()
    (tmp_path / ".mine.partial" / "config.json").write_text("")
    with pytest.raises(RunError, match=r"config\.json: damaged"):
        seewhy.train(folder, out=tmp_path / "mine", resume=True, **SMALL)


def test_names_that_are_all_taken_are_one_clear_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    config = make_config(data="scenes", seed=3)
    first = resolve_run_dir(config, None, False).final
    for name in [first.name, *(f"{first.name}-{number}" for number in range(2, 999))]:
        (tmp_path / "runs" / name).mkdir(parents=True)
    assert resolve_run_dir(config, None, False).final == first.with_name(f"{first.name}-999")
    (tmp_path / "runs" / f"{first.name}-999").mkdir()
    with pytest.raises(OutputError, match=r"999 runs of this name exist already; choose another name with --out$"):
        resolve_run_dir(config, None, False)
