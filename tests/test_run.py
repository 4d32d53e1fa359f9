"""A saved run: whole on disk, the same predictions when loaded elsewhere, one clear line when anything is off."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import seewhy
from seewhy.api import Run, load
from seewhy.errors import RunError

FILES = {"model.safetensors", "run.json", "split.json", "metrics.json", "history.csv", "predictions_test.csv", "report.html"}
FILES |= {"predictions_val.csv", "README.md", "ood_reference.safetensors", "log.txt"}
FIGURES = {"training_curves.png", "confusion_matrix.png", "heatmaps.png"}


@pytest.fixture
def copied(demo_run: Run, tmp_path: Path) -> Path:
    """The demo run moved elsewhere, as to another machine."""
    return Path(shutil.copytree(demo_run.path, tmp_path / "elsewhere"))


@pytest.fixture
def images(demo_set: Path) -> list[str]:
    return [str(path) for path in sorted((demo_set / "images").rglob("00[0-3].jpg"))]


def test_the_folder_is_whole_and_nothing_else_is_left(demo_run: Run) -> None:
    names = {path.name for path in demo_run.path.iterdir()}
    assert names == FILES | {"figures"}
    assert {path.name for path in (demo_run.path / "figures").iterdir()} == FIGURES
    assert not (demo_run.path / "checkpoints").exists()
    assert not (demo_run.path / "config.json").exists()
    assert [path.name for path in demo_run.path.parent.iterdir()] == [demo_run.path.name]  # no work folder, no lock


def test_loaded_elsewhere_it_says_the_same(demo_run: Run, copied: Path, images: list[str]) -> None:
    expected = demo_run.predict(images)
    found = load(copied).predict(images)
    np.testing.assert_allclose(found.probs, expected.probs, atol=1e-5)
    assert found.classes == expected.classes
    assert found.ood.tolist() == expected.ood.tolist()
    assert demo_run.references is not None  # a run fresh from training can tell strangers too
    assert len(images) == 32


def test_manifest_holds_what_repeats_the_run(demo_run: Run) -> None:
    manifest = json.loads((demo_run.path / "run.json").read_text())
    assert manifest["format"] == 2
    assert manifest["config"]["backbone"] == "efficientnet_lite0"
    assert manifest["config"]["lr"] == 1e-3  # what was used, not what was left open
    assert [manifest["split"][part] for part in ("protocol", "train", "val", "test")] == ["ratio", 336, 48, 96]
    assert (manifest["split"]["grouped_images"], manifest["split"]["classes_with_split_groups"]) == (0, [])  # no two scenes are alike
    assert manifest["calibration"]["temperature"] > 0
    assert manifest["calibration"]["n"] == 48
    assert len(manifest["data"]["hash"]) == 64
    assert manifest["versions"]["torch"] == torch.__version__.split("+")[0]
    assert set(manifest["metrics"]) == {"val", "test"}
    assert manifest["preprocessing"]["size"] == 224
    metrics = json.loads((demo_run.path / "metrics.json").read_text())
    assert metrics == manifest["metrics"] == demo_run.metrics
    assert metrics["test"]["n"] == 96
    low, high = metrics["test"]["accuracy_ci95"]
    assert low < metrics["test"]["accuracy"] < high <= 1


def test_split_file_names_every_image_once(demo_run: Run) -> None:
    split = json.loads((demo_run.path / "split.json").read_text())
    hashes = [h for part in ("train", "val", "test") for h in split[part]]
    assert len(hashes) == len(set(hashes)) == 480


def test_public_load_is_the_same_function(demo_run: Run) -> None:
    assert seewhy.load is load
    assert "8 classes" in repr(demo_run)


def check(path: Path, *words: str) -> None:
    with pytest.raises(RunError) as caught:
        load(path)
    text = str(caught.value)
    assert "\n" not in text
    for word in words:
        assert word in text


def test_missing_run(tmp_path: Path) -> None:
    check(tmp_path / "nothing", "nothing", "no such run")


def test_a_file_is_no_run(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    check(tmp_path / "file", "a file, not a run folder")


def test_half_written_run(copied: Path) -> None:
    (copied / "run.json").unlink()
    check(copied, "no run.json")
    work = copied.rename(copied.parent / ".mine.partial")
    check(work, "unfinished", "--resume")


def test_run_of_another_version(copied: Path) -> None:
    manifest = json.loads((copied / "run.json").read_text())
    (copied / "run.json").write_text(json.dumps({**manifest, "format": 99}))
    check(copied, "format 99", "reads 2")


@pytest.mark.parametrize("text", ["", "{", "[]", '{"format": 1}', '{"format": "x"}'])
def test_damaged_manifest(copied: Path, text: str) -> None:
    (copied / "run.json").write_text(text)
    check(copied, "damaged")


def test_manifest_with_a_wrong_field(copied: Path) -> None:
    manifest = json.loads((copied / "run.json").read_text())
    manifest["config"]["unfreeze"] = "seven"
    (copied / "run.json").write_text(json.dumps(manifest))
    check(copied, "unfreeze")


def test_missing_and_damaged_weights(copied: Path) -> None:
    data = (copied / "model.safetensors").read_bytes()
    (copied / "model.safetensors").write_bytes(data[: len(data) // 2])
    check(copied, "model.safetensors", "damaged")
    (copied / "model.safetensors").unlink()
    check(copied, "model.safetensors", "missing")


def test_weights_of_another_architecture(copied: Path) -> None:
    state = load_file(copied / "model.safetensors")
    state.pop("conv_stem.weight")
    save_file(state, copied / "model.safetensors")
    check(copied, "conv_stem.weight", "not the weights of efficientnet_lite0")


def test_temperature_and_threshold_come_from_val(demo_run: Run) -> None:
    """The stored temperature is the one that fits val best; the threshold is that of val's answers; a wish too high is refused."""
    from seewhy.evaluation.calibration import fit_temperature, threshold_for

    val = demo_run.evaluate("val")
    assert demo_run.temperature == pytest.approx(fit_temperature(val.labels, val.logits), rel=1e-3)
    assert val.temperature == demo_run.temperature
    expected = threshold_for(val.confidence, val.correct, 0.8)
    assert expected is not None
    assert demo_run.threshold_for(0.8) == pytest.approx(expected, abs=1e-5)
    with pytest.raises(RunError, match=r"no threshold keeps a precision of 99\.9% on its 48 validation images"):
        demo_run.threshold_for(0.999)


def test_model_card_tells_the_numbers_of_the_run(demo_run: Run) -> None:
    import yaml

    card = (demo_run.path / "README.md").read_text()
    head, body = card.removeprefix("---\n").split("\n---\n", 1)
    meta = yaml.safe_load(head)
    assert meta["pipeline_tag"] == "image-classification"
    metrics = {m["type"]: m["value"] for m in meta["model-index"][0]["results"][0]["metrics"]}
    assert metrics["accuracy"] == pytest.approx(demo_run.metrics["test"]["accuracy"], abs=1e-4)
    assert f"{100 * demo_run.metrics['test']['accuracy']:.1f}%" in body
    assert "boat, car" in body
    assert "fewer than 10" not in body  # 12 test images a class
