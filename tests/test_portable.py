"""The ONNX file says what the run says: on files, on pictures of any size, cut or squashed; with maps, metadata and a refusal."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch

from seewhy import portable
from seewhy.attribution import all_class_maps, feature_maps
from seewhy.errors import OutputError
from seewhy.features import square_of
from seewhy.images import read_image
from seewhy.run import Run
from seewhy.scenes import draw_scenes
from seewhy.transforms import Preprocessing


def session_of(model: bytes) -> Any:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    return onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])


@pytest.fixture(scope="module")
def model(demo_run: Run) -> bytes:
    return portable.build_onnx(demo_run).SerializeToString()


@pytest.fixture
def pictures(session_cache: Path) -> list[Path]:
    return sorted((draw_scenes(session_cache / "scenes") / "pictures").rglob("00[01].jpg"))


def test_it_says_what_the_run_says(demo_run: Run, model: bytes, pictures: list[Path]) -> None:
    parity = portable.measure_parity(demo_run, model, pictures)
    assert parity.n == 16
    assert parity.same_class == 1
    assert parity.difference < 0.01  # resizing rounds a few pixels in a thousand to the next grey level
    assert parity.correlation_least > 0.999


def test_all_outputs_by_the_run_s_own_network(demo_run: Run, model: bytes, pictures: list[Path]) -> None:
    """From the picture that the graph itself resized, so that only the network counts: maps of all classes, strangeness, logits."""
    session, run = session_of(model), demo_run
    whole = onnx.load_from_string(model)
    whole.graph.output.append(onnx.helper.make_tensor_value_info("squares", onnx.TensorProto.UINT8, None))
    squares = session_of(whole.SerializeToString()).run(["squares"], {"pictures": np.asarray(read_image(pictures[0]))[None]})[0]
    own = square_of(pictures[0], run.backbone.preprocessing).transpose(2, 0, 1)[None].astype(int)
    assert np.abs(squares.astype(int) - own).max() <= 2
    assert (squares != own).mean() < 0.01
    names = [output.name for output in session.get_outputs()]
    assert names == ["logits", "probabilities", "strangeness", "heatmaps"]
    found = dict(zip(names, session.run(None, {"pictures": np.asarray(read_image(pictures[0]))[None]}), strict=True))
    preprocessing = run.backbone.preprocessing
    mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in (preprocessing.mean, preprocessing.std))
    with torch.no_grad():
        features = feature_maps(run.backbone.model.eval(), (torch.from_numpy(squares).float() / 255 - mean) / std)
        vector = run.backbone.model.forward_head(features, pre_logits=True)
    maps, logits = all_class_maps(run.backbone.model, features, "gradcam")
    np.testing.assert_allclose(found["logits"], logits.numpy(), atol=1e-3)
    np.testing.assert_allclose(found["probabilities"], (logits / run.temperature).softmax(dim=1).numpy(), atol=1e-4)
    scaled = maps / maps.amax(dim=(2, 3), keepdim=True).clamp(min=1e-12)
    np.testing.assert_allclose(found["heatmaps"], scaled.numpy(), atol=1e-3)
    assert run.references is not None
    np.testing.assert_allclose(found["strangeness"], run.references.strangeness(vector.numpy()), atol=1e-3)


@pytest.mark.parametrize("shape", [(1, 40, 300, 3), (3, 224, 224, 3), (2, 901, 507, 3)])
def test_any_size_and_batch(model: bytes, shape: tuple[int, ...]) -> None:
    pictures = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    session = session_of(model)
    probs = session.run(["probabilities"], {"pictures": pictures})[0]
    np.testing.assert_allclose(probs.sum(axis=1), 1, rtol=1e-5)
    one = session.run(["probabilities"], {"pictures": pictures[-1:]})[0]
    np.testing.assert_allclose(probs[-1:], one, atol=1e-5)


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
@pytest.mark.parametrize("resize", ["crop", "squash"])
@pytest.mark.parametrize("size", [(300, 201), (123, 480), (90, 64)])
def test_squares_are_those_of_the_run(interpolation: str, resize: str, size: tuple[int, int], tmp_path: Path) -> None:
    from PIL import Image

    noise = Image.fromarray(np.random.default_rng(1).integers(0, 256, (12, 16, 3), dtype=np.uint8)).resize(size, Image.Resampling.BICUBIC)
    noise.save(tmp_path / "a.png")
    preprocessing = Preprocessing(96, (0.5,) * 3, (0.5,) * 3, interpolation, 0.875, resize)
    graph = portable._resizing_graph(preprocessing)
    onnx.checker.check_model(graph, full_check=True)
    found = session_of(graph.SerializeToString()).run(None, {"pictures": np.asarray(read_image(tmp_path / "a.png"))[None]})[0][0]
    own = square_of(tmp_path / "a.png", preprocessing).transpose(2, 0, 1)
    difference = np.abs(found.astype(int) - own.astype(int))
    assert difference.max() <= 3
    assert (difference > 0).mean() < 0.06


def test_metadata_names_everything_a_user_of_the_file_needs(demo_run: Run, model: bytes) -> None:
    meta = {prop.key: json.loads(prop.value) for prop in onnx.load_from_string(model).metadata_props}
    assert tuple(meta["classes"]) == demo_run.classes
    assert meta["temperature"] == demo_run.temperature
    assert Preprocessing.from_dict(meta["preprocessing"]) == demo_run.backbone.preprocessing
    assert meta["data_sha256"] == demo_run.manifest["data"]["hash"]
    assert meta["unknown_above"] == demo_run.unknown_above
    assert meta["opset"] == portable.OPSET


def test_a_file_that_says_something_else_is_not_written(demo_run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    other = dataclasses.replace(demo_run, manifest={**demo_run.manifest, "calibration": {"temperature": 9.0}})
    wrong = portable.build_onnx(other)
    monkeypatch.setattr(portable, "build_onnx", lambda run: wrong)
    with pytest.raises(OutputError, match="would not say what the run says"):
        portable.export_onnx(demo_run, tmp_path / "model.onnx", 8)
    assert not list(tmp_path.iterdir())


def test_written_whole_and_compared(demo_run: Run, tmp_path: Path) -> None:
    parity = portable.export_onnx(demo_run, tmp_path / "new" / "model.onnx", 8)
    assert parity is not None
    assert parity.n == 8
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["model.onnx"]
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(OutputError, match="cannot be written"):
        portable.export_onnx(demo_run, tmp_path / "file" / "model.onnx", 1)
