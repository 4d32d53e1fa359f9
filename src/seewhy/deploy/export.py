"""Run -> a file of one of KINDS, compared with the run on its own test images, and written only if both say the same."""

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
from seewhy.curation.split import Split, read_split
from seewhy.data.decode import read_image
from seewhy.data.image_set import ImageSet, open_images
from seewhy.deploy.onnx_export import AnswerNetwork, build_onnx, build_pt2
from seewhy.errors import ConfigError, OutputError, SeewhyError, reason_of
from seewhy.explain.explainer import explain
from seewhy.inference.onnx_model import load_onnx
from seewhy.inference.predict import predict
from seewhy.models.saved_run import SavedRun

# What a file must keep to, against the run, on real images.
MAX_DIFFERENCE, LEAST_CORRELATION = 1e-4, 0.999
Ask = Callable[[Path], dict[str, npt.NDArray[Any]]]


@dataclass(frozen=True)
class Parity:
    """A file against its run on N test images, from image files to answers.

    same_class: share of equal most probable classes. difference: largest of any probability. correlation_least, correlation_mean:
    Pearson's, of the heatmaps of the predicted class; None where the file has none. accuracy, run_accuracy: of file and run on
    these images. milliseconds: median of an answer on one core, reading and decoding included.
    """

    n: int
    same_class: float
    difference: float
    correlation_least: float | None
    correlation_mean: float | None
    accuracy: float
    run_accuracy: float
    milliseconds: float

    @property
    def holds(self) -> bool:
        return self.difference <= MAX_DIFFERENCE and (self.correlation_least is None or self.correlation_least >= LEAST_CORRELATION)


def measure_parity(run: SavedRun, ask: Ask, paths: Sequence[Path], labels: npt.NDArray[np.int64]) -> Parity:
    """Asks both about the files; heatmaps are compared where the file has them."""
    theirs = predict(run, list(paths)).probs
    expected = explain(run, list(paths), "gradcam") if "heatmaps" in ask(paths[0]) else None
    probs, correlations, seconds = [], [], []
    with progress("comparing", len(paths)) as advance:
        for n, path in enumerate(paths):
            began = time.perf_counter()
            found = ask(path)
            seconds.append(time.perf_counter() - began)
            probs.append(found["probabilities"][0])
            if expected is not None:
                correlations.append(_correlation(found["heatmaps"][0, expected.targets[n]], expected.maps[n]))
            advance(1)
    ours = np.stack(probs)
    return Parity(
        n=len(paths),
        same_class=float((ours.argmax(axis=1) == theirs.argmax(axis=1)).mean()),
        difference=float(np.abs(ours - theirs).max()),
        correlation_least=float(np.min(correlations)) if correlations else None,
        correlation_mean=float(np.mean(correlations)) if correlations else None,
        accuracy=float((ours.argmax(axis=1) == labels).mean()),
        run_accuracy=float((theirs.argmax(axis=1) == labels).mean()),
        milliseconds=1000 * statistics.median(seconds),
    )


def _correlation(one: npt.NDArray[np.float32], other: npt.NDArray[np.float32]) -> float:
    """Pearson's, of two maps; where one is constant, 1 if both are the same and 0 if not."""
    if one.std() == 0 or other.std() == 0:
        return float(np.allclose(one, other, atol=1e-3))
    return float(np.corrcoef(one.ravel(), other.ravel())[0, 1])


# ---------------------------------------------------------------- kinds of files


def _onnx(run: SavedRun) -> tuple[bytes, Ask]:
    model = build_onnx(run).SerializeToString()
    loaded = load_onnx(model)
    return model, lambda path: loaded.ask(loaded.read(path)[None])


def _pt2(run: SavedRun) -> tuple[bytes, Ask]:
    program = build_pt2(run)
    module: Any = torch.export.load(io.BytesIO(program)).module()
    names = AnswerNetwork(run).names
    enough = run.backbone.preprocessing.min_decode_side

    def ask(path: Path) -> dict[str, npt.NDArray[Any]]:
        with torch.inference_mode():
            found = module(torch.from_numpy(np.array(read_image(path, enough)))[None])
        return {name: values.numpy() for name, values in zip(names, found, strict=True)}

    return program, ask


# kind, which is also the suffix -> how it is made
KINDS: dict[str, Callable[[SavedRun], tuple[bytes, Ask]]] = {"onnx": _onnx, "pt2": _pt2}


def export_file(run: SavedRun, path: Path | str | None = None, kind: str = "onnx", images: int = 1000) -> tuple[Path, Parity | None]:
    """Writes the run as a file of one of KINDS, after comparing it with the run on at most `images` of its own test images.

    path: None for `model` and the kind's suffix in the run's folder. The second result is None where the run's data is no longer
    there to compare on. Raises OutputError where file and run do not say the same, or the place cannot be written.
    """
    if kind not in KINDS:
        raise ConfigError(f"format {kind!r} is none of {', '.join(KINDS)}")
    path = run.path / f"model.{kind}" if path is None else Path(path)
    data = _data_of(run)
    LOG.info(f"building {path.name}")
    content, ask = KINDS[kind](run)
    parity = _compare(run, ask, data, images) if data is not None else None
    if parity is not None and not parity.holds:
        maps = "" if parity.correlation_least is None else f", heatmaps correlate at least {parity.correlation_least:.4f}"
        raise OutputError(
            f"{path}: not written, since it would not say what the run says (probabilities differ by up to {parity.difference:.1e}"
            f"{maps}); please report the backbone {run.config.backbone}"
        )
    with atomic_write(path, "choose another place with --out") as work:
        work.write_bytes(content)
    return path, parity


def _data_of(run: SavedRun) -> tuple[ImageSet, Split] | None:
    """The images of a run and their split; None where they cannot be opened any more."""
    config = run.config
    try:
        images = open_images(config.data, config.data_root, config.skip_bad, config.workers)
        return images, read_split(run.path, images)
    except SeewhyError:
        return None


def _compare(run: SavedRun, ask: Ask, data: tuple[ImageSet, Split], most: int) -> Parity:
    images, split = data
    drawn = np.sort(np.random.default_rng(0).permutation(split.test)[:most])
    return measure_parity(run, ask, [images.paths[i] for i in drawn], images.labels[drawn])


def export_state_dict(run: SavedRun, path: Path | str) -> Path:
    """Writes {"state_dict": ..., "classes": [...]} as `torch.load(weights_only=True)` reads it.

    The names are timm's; those of `resnet18` are torchvision's too, so that
    `torchvision.models.resnet18(num_classes=len(classes)).load_state_dict(...)` takes it.
    """
    path = Path(path)
    with atomic_write(path) as work:
        try:
            torch.save({"state_dict": run.backbone.model.state_dict(), "classes": list(run.classes)}, work)
        except RuntimeError as error:  # so torch reports a full disk
            raise OutputError(f"{path}: cannot be written ({reason_of(error)}); choose another place") from error
    return path
