"""Test the exported graphs against the run's own network: outputs, heatmaps, metadata, ONNX and torch.export."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch

from seewhy.api import Run
from seewhy.data.decode import read_image
from seewhy.deploy import onnx_export
from seewhy.errors import ConfigError
from seewhy.explain.attribution import feature_maps, maps_from_features
from seewhy.models.features import load_pixels
from seewhy.models.transforms import Preprocessing


def session_of(model: bytes) -> Any:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    return onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])


@pytest.fixture
def model(demo_onnx: Path) -> bytes:
    return demo_onnx.read_bytes()


def test_all_outputs_by_the_run_s_own_network(demo_run: Run, model: bytes, demo_images: list[Path]) -> None:
    """By the run's own network in PyTorch: the square, logits, maps of all classes, ood_score."""
    session, run = session_of(model), demo_run
    names = [output.name for output in session.get_outputs()]
    assert names == ["logits", "probabilities", "ood_score", "heatmaps", "network_input"]
    found = dict(zip(names, session.run(None, {"images": np.asarray(read_image(demo_images[0]))[None]}), strict=True))
    squares, preprocessing = found["network_input"], run.backbone.preprocessing
    np.testing.assert_array_equal(squares[0], load_pixels(demo_images[0], preprocessing).transpose(2, 0, 1))
    mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in (preprocessing.mean, preprocessing.std))
    with torch.no_grad():
        features = feature_maps(run.backbone.model.eval(), (torch.from_numpy(squares).float() / 255 - mean) / std)
        vector = run.backbone.model.forward_head(features, pre_logits=True)
    each = [maps_from_features(run.backbone.model, features, "gradcam", torch.tensor([c])) for c in range(len(run.classes))]
    maps, logits = torch.stack([of_class for of_class, _, _ in each], dim=1), each[0][1]
    np.testing.assert_allclose(found["logits"], logits.numpy(), atol=1e-4)
    np.testing.assert_allclose(found["probabilities"], (logits / run.temperature).softmax(dim=1).numpy(), atol=1e-5)
    scaled = maps / maps.amax(dim=(2, 3), keepdim=True).clamp(min=1e-12)
    np.testing.assert_allclose(found["heatmaps"], scaled.numpy(), atol=1e-4)
    assert run.references is not None
    np.testing.assert_allclose(found["ood_score"], run.references.ood_score(vector.numpy()), atol=1e-3)


@pytest.mark.parametrize("shape", [(1, 40, 300, 3), (3, 224, 224, 3), (2, 901, 507, 3)])
def test_any_size_and_batch(model: bytes, shape: tuple[int, ...]) -> None:
    images = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    session = session_of(model)
    probs = session.run(["probabilities"], {"images": images})[0]
    np.testing.assert_allclose(probs.sum(axis=1), 1, rtol=1e-5)
    one = session.run(["probabilities"], {"images": images[-1:]})[0]
    np.testing.assert_allclose(probs[-1:], one, atol=1e-5)


def test_metadata_names_everything_a_user_of_the_file_needs(demo_run: Run, model: bytes) -> None:
    meta = {prop.key: json.loads(prop.value) for prop in onnx.load_from_string(model).metadata_props}
    assert tuple(meta["classes"]) == demo_run.classes
    assert meta["temperature"] == demo_run.temperature
    assert Preprocessing.from_dict(meta["preprocessing"]) == demo_run.backbone.preprocessing
    assert meta["data_sha256"] == demo_run.manifest["data"]["hash"]
    assert meta["ood_threshold"] == demo_run.ood_threshold
    assert meta["opset"] == onnx_export.OPSET


def test_a_pytorch_program_needs_no_seewhy(demo_run: Run, model: bytes, demo_images: list[Path]) -> None:
    program = torch.export.load(io.BytesIO(onnx_export.build_pt2(demo_run)), extra_files=(facts := {"seewhy.json": ""})).module()
    assert json.loads(facts["seewhy.json"])["classes"] == list(demo_run.classes)
    session = session_of(model)
    for shape in [(1, 120, 333, 3), (2, 400, 64, 3)]:
        given = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
        for name, found in zip(("logits", "probabilities", "ood_score", "heatmaps"), program(torch.from_numpy(given)), strict=True):
            np.testing.assert_allclose(found.detach().numpy(), session.run([name], {"images": given})[0], atol=1e-4)


def test_a_program_of_centred_squares_is_refused() -> None:
    from tests.cheap_run import cheap_run

    with pytest.raises(ConfigError, match="use --format onnx"):
        onnx_export.build_pt2(cheap_run(resize="crop"))
