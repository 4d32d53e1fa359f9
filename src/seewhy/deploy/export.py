"""Export a run as one file, and write it only if its predictions and heatmaps equal the run's on test images."""

from __future__ import annotations

import io
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from seewhy.core.files import atomic_write
from seewhy.core.progress import LOG, progress
from seewhy.curation.split import read_split
from seewhy.data.decode import read_image
from seewhy.data.image_set import open_images
from seewhy.deploy.onnx_export import ExportNetwork, build_onnx, build_pt2
from seewhy.errors import ConfigError, OutputError, SeewhyError, reason_of
from seewhy.explain.explainer import explain
from seewhy.inference.onnx_model import load_onnx
from seewhy.inference.predict import predict
from seewhy.models.saved_run import SavedRun

MAX_DIFFERENCE, MIN_CORRELATION = 1e-4, 0.999  # between file and run, on test images
Predictor = Callable[[Path], dict[str, npt.NDArray[Any]]]  # image file -> outputs of a batch of one


@dataclass(frozen=True)
class Parity:
    """Compare an exported file with its run on N test images, from image files to predictions.

    same_class: share of images with the same predicted class. max_difference: of any probability. correlation_min, correlation_mean:
    Pearson's r between the heatmaps of the predicted class; None if the file has none. accuracy, run_accuracy: of file and run on
    these images. milliseconds: median per image on one core, reading and decoding included.
    """

    n: int
    same_class: float
    max_difference: float
    correlation_min: float | None
    correlation_mean: float | None
    accuracy: float
    run_accuracy: float
    milliseconds: float

    @property
    def holds(self) -> bool:
        """Whether the file may be written."""
        return self.max_difference <= MAX_DIFFERENCE and (self.correlation_min is None or self.correlation_min >= MIN_CORRELATION)


def measure_parity(run: SavedRun, predictor: Predictor, paths: Sequence[Path], labels: npt.NDArray[np.int64]) -> Parity:
    """Run both on N image files; labels: (N,). Heatmaps are compared if the file has them."""
    run_probs = predict(run, list(paths)).probs
    explanation = explain(run, list(paths), "gradcam") if "heatmaps" in predictor(paths[0]) else None
    rows, correlations, seconds = [], [], []
    with progress("comparing", len(paths)) as advance:
        for n, path in enumerate(paths):
            began = time.perf_counter()
            outputs = predictor(path)
            seconds.append(time.perf_counter() - began)
            rows.append(outputs["probabilities"][0])
            if explanation is not None:
                correlations.append(_correlation(outputs["heatmaps"][0, explanation.targets[n]], explanation.maps[n]))
            advance(1)
    probs = np.stack(rows)
    return Parity(
        n=len(paths),
        same_class=float((probs.argmax(axis=1) == run_probs.argmax(axis=1)).mean()),
        max_difference=float(np.abs(probs - run_probs).max()),
        correlation_min=float(np.min(correlations)) if correlations else None,
        correlation_mean=float(np.mean(correlations)) if correlations else None,
        accuracy=float((probs.argmax(axis=1) == labels).mean()),
        run_accuracy=float((run_probs.argmax(axis=1) == labels).mean()),
        milliseconds=1000 * statistics.median(seconds),
    )


def _correlation(a: npt.NDArray[np.float32], b: npt.NDArray[np.float32]) -> float:
    """Return Pearson's r of two maps; if one is constant, 1 if they are equal and 0 if not."""
    if a.std() == 0 or b.std() == 0:
        return float(np.allclose(a, b, atol=1e-3))
    return float(np.corrcoef(a.ravel(), b.ravel())[0, 1])


def _onnx(run: SavedRun) -> tuple[bytes, Predictor]:
    content = build_onnx(run).SerializeToString()
    model = load_onnx(content)
    return content, lambda path: model.run(model.read(path)[None])


def _pt2(run: SavedRun) -> tuple[bytes, Predictor]:
    content = build_pt2(run)
    module: Any = torch.export.load(io.BytesIO(content)).module()
    names = ExportNetwork(run).names
    min_side = run.backbone.preprocessing.min_decode_side

    def predictor(path: Path) -> dict[str, npt.NDArray[Any]]:
        with torch.inference_mode():
            outputs = module(torch.from_numpy(np.array(read_image(path, min_side)))[None])
        return {name: values.numpy() for name, values in zip(names, outputs, strict=True)}

    return content, predictor


FORMATS: dict[str, Callable[[SavedRun], tuple[bytes, Predictor]]] = {"onnx": _onnx, "pt2": _pt2}  # by suffix


def export_file(run: SavedRun, path: Path | str | None = None, kind: str = "onnx", images: int = 1000) -> tuple[Path, Parity | None]:
    """Write the run as a file of one of FORMATS after comparing it with the run on at most `images` of its own test images.

    path: default `model.onnx` or `model.pt2` in the run's folder. Returns the path and the comparison, None if the run's data has moved.
    Raises ConfigError for an unknown format, OutputError if file and run differ or the file cannot be written.
    """
    if kind not in FORMATS:
        raise ConfigError(f"unknown format {kind!r}; use {' or '.join(FORMATS)}")
    path = run.path / f"model.{kind}" if path is None else Path(path)
    test = _test_images(run, images)
    LOG.info(f"building {path.name}")
    content, predictor = FORMATS[kind](run)
    parity = measure_parity(run, predictor, *test) if test is not None else None
    if parity is not None and not parity.holds:
        maps = "" if parity.correlation_min is None else f", heatmap correlation down to {parity.correlation_min:.4f}"
        raise OutputError(
            f"{path}: not written, its predictions differ from the run's (probabilities by up to {parity.max_difference:.1e}{maps}); "
            f"please report the backbone {run.config.backbone}"
        )
    with atomic_write(path, "choose another --out") as work:
        work.write_bytes(content)
    return path, parity


def _test_images(run: SavedRun, most: int) -> tuple[list[Path], npt.NDArray[np.int64]] | None:
    """Draw at most `most` test images and their labels; None if the run's data cannot be opened any more."""
    config = run.config
    try:
        images = open_images(config.data, config.data_root, config.skip_bad, config.workers)
        split = read_split(run.path, images)
    except SeewhyError:
        return None
    drawn = np.sort(np.random.default_rng(0).permutation(split.test)[:most])
    return [images.paths[i] for i in drawn], images.labels[drawn]


def export_state_dict(run: SavedRun, path: Path | str) -> Path:
    """Write {"state_dict": ..., "classes": [...]} for `torch.load(path, weights_only=True)`, and return the path.

    Parameter names are timm's; for `resnet18` they are also torchvision's, so
    `torchvision.models.resnet18(num_classes=len(classes)).load_state_dict(...)` loads it.
    Raises OutputError if the file cannot be written.
    """
    path = Path(path)
    with atomic_write(path) as work:
        try:
            torch.save({"state_dict": run.backbone.model.state_dict(), "classes": list(run.classes)}, work)
        except RuntimeError as error:  # torch's error for a full disk
            raise OutputError(f"{path}: cannot be written ({reason_of(error)}); choose another path") from error
    return path
