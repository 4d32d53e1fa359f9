"""Files of every kind are compared with their run on its test images; what says something else is not written."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest

from seewhy.api import Run
from seewhy.curation.split import read_split
from seewhy.data.image_set import open_images
from seewhy.deploy import export
from seewhy.deploy.onnx_export import build_onnx
from seewhy.errors import ConfigError, OutputError
from seewhy.inference.onnx_model import load_onnx


def test_a_file_says_what_the_run_says_on_all_test_images(demo_run: Run, tmp_path: Path) -> None:
    file, found = export.export_file(demo_run, tmp_path / "new" / "model.onnx")
    assert found is not None
    images = open_images("scenes")
    assert found.n == len(read_split(demo_run.path, images).test)
    assert found.same_class == 1
    assert found.difference < 1e-5
    assert found.correlation_least is not None
    assert found.correlation_least > 0.99999
    assert found.accuracy == found.run_accuracy == pytest.approx(demo_run.metrics["test"]["accuracy"])
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["model.onnx"]
    assert load_onnx(file).classes == demo_run.classes


def test_a_pytorch_program_says_it_too(demo_run: Run, tmp_path: Path) -> None:
    _, found = export.export_file(demo_run, tmp_path / "model.pt2", "pt2", 12)
    assert found is not None
    assert found.holds


def test_a_file_that_says_something_else_is_not_written(demo_run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    other = dataclasses.replace(demo_run, manifest={**demo_run.manifest, "calibration": {"temperature": 9.0, "selective": []}})
    wrong = build_onnx(other)
    monkeypatch.setattr(export, "build_onnx", lambda run: wrong)
    with pytest.raises(OutputError, match="would not say what the run says"):
        export.export_file(demo_run, tmp_path / "model.onnx", images=8)
    assert not list(tmp_path.iterdir())


def test_mistakes(demo_run: Run, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(OutputError, match="cannot be written"):
        export.export_file(demo_run, tmp_path / "file" / "model.onnx", images=1)
    with pytest.raises(ConfigError, match="format 'onx' is none of onnx, pt2"):
        export.export_file(demo_run, tmp_path / "model.onnx", "onx")
    moved = dataclasses.replace(demo_run, config=demo_run.config.model_copy(update={"data": str(tmp_path / "gone")}))
    assert export.export_file(moved, tmp_path / "model.onnx")[1] is None


def test_correlation_by_hand() -> None:
    one = np.array([[0.0, 1.0], [2.0, 3.0]], dtype=np.float32)
    assert export._correlation(one, 2 * one + 1) == pytest.approx(1)
    assert export._correlation(one, -one) == pytest.approx(-1)
    assert export._correlation(np.zeros((2, 2), np.float32), np.zeros((2, 2), np.float32)) == 1
    assert export._correlation(np.zeros((2, 2), np.float32), one) == 0
