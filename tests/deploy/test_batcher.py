"""Test dynamic batching: each client gets its own outputs, bad images fail individually, closing finishes the queue."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from seewhy.deploy.batcher import BATCH, Batcher
from seewhy.inference.onnx_model import load_onnx


@pytest.fixture
def batcher(demo_onnx: Path) -> Iterator[Batcher]:
    found = Batcher(demo_onnx, cores=2, max_pixels=1_000_000)
    yield found
    found.close()


def test_outputs_equal_those_of_the_file(batcher: Batcher, demo_onnx: Path, demo_images: list[Path]) -> None:
    model = load_onnx(demo_onnx)
    futures = [batcher.submit(path.read_bytes()) for path in demo_images * 3]
    for path, future in zip(demo_images * 3, futures, strict=True):
        found, expected = future.result(timeout=60), model.run(model.read(path)[None])
        np.testing.assert_allclose(found["probabilities"], expected["probabilities"][0], atol=1e-5)
        np.testing.assert_allclose(found["heatmaps"], expected["heatmaps"][0], atol=1e-4)
        np.testing.assert_allclose(found["ood_score"], expected["ood_score"][0], atol=1e-5)
        assert found["size"].tolist() == [model.read(path).shape[1], model.read(path).shape[0]]
    assert sum(batcher.sizes) == len(futures)
    assert 1 < max(batcher.sizes) <= BATCH  # queued images were predicted together


def test_heatmaps_are_computed_on_request(batcher: Batcher, demo_images: list[Path]) -> None:
    data = demo_images[0].read_bytes()
    without, with_maps = batcher.submit(data, heatmaps=False).result(timeout=60), batcher.submit(data).result(timeout=60)
    assert with_maps.keys() - without.keys() == {"heatmaps"}
    np.testing.assert_allclose(without["probabilities"], with_maps["probabilities"], atol=1e-6)


def test_bad_images_fail_individually(batcher: Batcher, demo_images: list[Path]) -> None:
    good = demo_images[0].read_bytes()
    futures = [batcher.submit(data) for data in (good, b"", b"no image", good[:2000], good)]
    reasons = [str(future.exception(timeout=60)) for future in futures]
    assert [reasons[0], reasons[4]] == ["None", "None"]
    assert reasons[1:4] == ["empty file", "not an image", "truncated"]


def test_an_error_of_the_session_reaches_its_batch_only(batcher: Batcher, demo_images: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError("out of memory")

    with monkeypatch.context() as patch:
        patch.setattr(batcher, "_all_cores_model", type("Broken", (), {"run": fail})())
        with pytest.raises(RuntimeError, match="out of memory"):
            batcher.submit(demo_images[0].read_bytes()).result(timeout=60)
    assert batcher.submit(demo_images[0].read_bytes()).result(timeout=60)["probabilities"].sum() == pytest.approx(1, abs=1e-5)


def test_closing_finishes_the_queue_and_leaves_no_thread(demo_onnx: Path, demo_images: list[Path]) -> None:
    before = threading.active_count()
    batcher = Batcher(demo_onnx, cores=2, max_pixels=1_000_000)
    futures = [batcher.submit(path.read_bytes()) for path in demo_images]
    batcher.close()
    assert all(future.done() and future.exception() is None for future in futures)
    assert threading.active_count() <= before
