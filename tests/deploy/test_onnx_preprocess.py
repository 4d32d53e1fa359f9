"""The graph's squares are those of `transforms.render` to the last bit: any size, cut or squashed, either interpolation."""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from seewhy.deploy.onnx_preprocess import OPSET, square_graph
from seewhy.errors import ConfigError
from seewhy.models.transforms import Preprocessing, eval_view, render


def preprocessing(interpolation: str, resize: str, size: int = 96) -> Preprocessing:
    return Preprocessing(size, (0.5,) * 3, (0.5,) * 3, interpolation, 0.875, resize)


@cache
def session(interpolation: str, resize: str) -> Any:
    graph = square_graph(preprocessing(interpolation, resize))
    onnx.checker.check_model(graph, full_check=True)
    assert [(o.domain, o.version) for o in graph.opset_import if o.domain == ""] == [("", OPSET)]
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    return onnxruntime.InferenceSession(graph.SerializeToString(), options, providers=["CPUExecutionProvider"])


def both(interpolation: str, resize: str, image: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    given = preprocessing(interpolation, resize)
    found = session(interpolation, resize).run(None, {"images": image[None]})[0][0].transpose(1, 2, 0)
    height, width = image.shape[:2]
    return found, render(Image.fromarray(image), eval_view(width, height, given), (given.size, given.size), interpolation)


@settings(max_examples=60, deadline=None)
@given(
    interpolation=st.sampled_from(["bilinear", "bicubic"]),
    resize=st.sampled_from(["squash", "crop"]),
    height=st.integers(8, 400),
    width=st.integers(8, 400),
    kind=st.sampled_from(["noise", "black and white", "smooth"]),
    seed=st.integers(0, 99),
)
def test_equal_to_the_last_bit(interpolation: str, resize: str, height: int, width: int, kind: str, seed: int) -> None:
    noise = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    if kind == "black and white":
        noise = np.where(noise < 128, 0, 255).astype(np.uint8)  # bicubic overshoots here
    if kind == "smooth":
        noise = np.asarray(Image.fromarray(noise[:8, :8]).resize((width, height), Image.Resampling.BICUBIC))
    found, expected = both(interpolation, resize, noise)
    np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize(("height", "width"), [(96, 96), (97, 96), (20, 3000), (1100, 1500)])
def test_squares_and_extremes(height: int, width: int) -> None:
    image = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    found, expected = both("bicubic", "squash", image)
    np.testing.assert_array_equal(found, expected)
    if (height, width) == (96, 96):
        np.testing.assert_array_equal(found, image)


def test_batches() -> None:
    images = np.random.default_rng(0).integers(0, 256, (3, 50, 70, 3), dtype=np.uint8)
    whole = session("bilinear", "squash").run(None, {"images": images})[0]
    for n in range(3):
        np.testing.assert_array_equal(whole[n], session("bilinear", "squash").run(None, {"images": images[n : n + 1]})[0][0])


def test_other_interpolations_are_refused() -> None:
    with pytest.raises(ConfigError, match="interpolation 'lanczos' cannot be part of an ONNX file"):
        square_graph(preprocessing("lanczos", "squash"))
