"""Predict with an exported ONNX file by ONNX Runtime: no torch, no SciPy."""

from __future__ import annotations

import base64
import json
import math
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnxruntime

from seewhy.core.parallel import Worker
from seewhy.data.decode import MAX_SIDE, MIN_SIDE, decode, read_image
from seewhy.data.listing import find_images
from seewhy.errors import ConfigError, RunError, reason_of
from seewhy.inference.onnx_validation import check_graph
from seewhy.inference.predictions import Predictions, predict_files

OUTPUT_RANKS = {"logits": 2, "probabilities": 2, "network_input": 4, "ood_score": 1, "heatmaps": 4}
FORMAT = 3  # of the metadata that deploy/onnx_export.py writes
DEFAULT_PRECISION = 0.95
FALLBACK_THRESHOLD = 0.5  # minimum confidence if no precision could be promised on val
RUN_OPTIONS = onnxruntime.RunOptions()
RUN_OPTIONS.only_execute_path_to_fetches = True  # do not compute outputs that are not fetched, such as heatmaps


@dataclass(frozen=True)
class OnnxModel:
    """An exported run. name: its file, for messages. session: of ONNX Runtime. outputs: names of the graph's outputs."""

    name: str
    session: Any
    outputs: tuple[str, ...]
    metadata: dict[str, Any]

    @property
    def classes(self) -> tuple[str, ...]:
        """The C class names."""
        return tuple(self.metadata["classes"])

    @property
    def ood_threshold(self) -> float:
        """The ood_score above which an image is out-of-distribution; infinite if the file has none."""
        threshold = self.metadata["ood_threshold"]
        return math.inf if threshold is None else float(threshold)

    def run(self, images: npt.NDArray[np.uint8], outputs: Sequence[str] | None = None) -> dict[str, npt.NDArray[Any]]:
        """Run the file on (N, H, W, 3) uint8 RGB; return all outputs, or those named, by name.

        logits (N, C), probabilities (N, C), network_input (N, 3, S, S) uint8; if the file has them ood_score (N,) and
        heatmaps (N, C, h, w).
        """
        names = list(self.outputs if outputs is None else outputs)
        return dict(zip(names, self._run(self.session, names, images), strict=True))

    def _run(self, session: Any, names: list[str], images: npt.NDArray[np.uint8]) -> list[npt.NDArray[Any]]:
        try:
            outputs: list[npt.NDArray[Any]] = session.run(names, {"images": images}, RUN_OPTIONS)
        except Exception as error:  # onnxruntime raises types of its own
            raise RunError(f"{self.name}: cannot be run ({reason_of(error, 120)}); export the run again") from error
        return outputs

    @cached_property
    def _preprocess_session(self) -> Any:
        try:
            return _session(self.metadata["preprocess_graph"], 1)
        except Exception as error:  # onnxruntime raises types of its own
            raise RunError(f"{self.name}: its preprocessing graph cannot be read; export the run again") from error

    def preprocess(self, image: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8]:
        """Resize and crop (H, W, 3) to the network's (S, S, 3); the graph leaves such crops unchanged, so that they can be batched."""
        (crops,) = self._run(self._preprocess_session, ["network_input"], image[None])
        return np.transpose(crops[0], (1, 2, 0))

    def read(self, path: Path | str) -> npt.NDArray[np.uint8]:
        """Decode an image file to (H, W, 3) as the run does: a large JPEG at the smallest scale that suffices."""
        return np.asarray(read_image(path, self.metadata["min_decode_side"]))

    def threshold_for(self, precision: float) -> float:
        """Return the minimum confidence for a target precision; ConfigError if val gave no threshold for it."""
        thresholds = self._thresholds()
        if precision not in thresholds:
            available = ", ".join(map(str, thresholds)) or "none"
            raise ConfigError(f"{self.name}: has no threshold for precision {precision}; use one of {available}, or --min-confidence")
        return thresholds[precision]

    def _thresholds(self) -> dict[float, float]:
        """Return the minimum confidence of each target precision that val could promise."""
        return {row["precision"]: float(row["threshold"]) for row in self.metadata["selective"] if row["threshold"] is not None}


def load_onnx(source: Path | str | bytes, threads: int = 1, spin: bool = True) -> OnnxModel:
    """Load a file of `seewhy export`, or its bytes. threads: cores used by each call.

    spin: let idle threads busy-wait, which is fastest if nothing else needs the cores.
    Raises RunError if the file is missing, damaged, of another version, or not from seewhy.
    """
    name = "this model" if isinstance(source, bytes) else str(source)
    if not isinstance(source, bytes):
        try:
            source = Path(source).read_bytes()
        except FileNotFoundError as error:
            raise RunError(f"{name}: no such file; `seewhy export RUN` makes one") from error
        except OSError as error:
            raise RunError(f"{name}: cannot be read ({error.strerror}); name a file of `seewhy export`") from error
    checked = check_graph(source, name, OUTPUT_RANKS)
    try:
        session = _session(checked, threads, spin)
    except Exception as error:  # onnxruntime raises types of its own
        raise RunError(f"{name}: not a readable ONNX file ({reason_of(error, 80)}); export the run again") from error
    try:
        metadata = {key: json.loads(value) for key, value in session.get_modelmeta().custom_metadata_map.items()}
        if int(metadata["seewhy_format"]) != FORMAT:
            raise RunError(f"{name}: format {metadata['seewhy_format']!r:.20}, this seewhy reads format {FORMAT}; export the run again")
        metadata["preprocess_graph"] = check_graph(_check_metadata(metadata), name, {"network_input": 4})
    except (KeyError, ValueError, TypeError, AttributeError, OverflowError, RecursionError) as error:
        reason = repr(error)[:80]
        raise RunError(f"{name}: an ONNX file, but not one of `seewhy export` ({reason}); export the run again") from error
    outputs = {output.name: output.shape for output in session.get_outputs()}
    counts = {shape[1] for output, shape in outputs.items() if output in ("logits", "probabilities", "heatmaps")}
    if "probabilities" not in outputs or counts != {len(metadata["classes"])}:
        raise RunError(f"{name}: names {len(metadata['classes'])} classes, but its outputs have other numbers; export the run again")
    return OnnxModel(name, session, tuple(outputs), metadata)


def _session(source: str | bytes, threads: int, spin: bool = True) -> Any:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.add_session_config_entry("session.intra_op.allow_spinning", str(int(spin)))
    options.log_severity_level = 3
    options.add_session_config_entry("session.load_model_format", "ONNX")  # whatever format the bytes claim
    options.enable_mem_pattern = False  # it would keep one for every image size
    return onnxruntime.InferenceSession(source, options, providers=["CPUExecutionProvider"])


def _check_metadata(metadata: dict[str, Any]) -> bytes:
    """Return the preprocessing graph; KeyError, ValueError or TypeError if the metadata lacks anything used later."""
    names = metadata["classes"]
    if not isinstance(names, list) or not names or not all(isinstance(name, str) for name in names) or len(set(names)) < len(names):
        raise ValueError("classes is not a list of unique names")
    if not MIN_SIDE <= int(metadata["min_decode_side"]) <= MAX_SIDE:
        raise ValueError("min_decode_side is out of range")
    numbers = [metadata["ood_threshold"] or 0, metadata["test_accuracy"], metadata["test_images"], metadata["preprocessing"]["crop"]]
    numbers += metadata["test_accuracy_ci95"] or ()
    numbers += [row[key] or 0 for row in metadata["selective"] for key in ("precision", "threshold")]
    if not all(math.isfinite(float(number)) for number in numbers):
        raise ValueError("numbers are not finite")
    str(metadata["preprocessing"]["resize"]), str(metadata["backbone"]["name"]), str(metadata["seewhy_version"])
    return base64.b64decode(metadata["preprocess_graph"], validate=True)


def make_worker(model: OnnxModel) -> Worker[Predictions]:
    """Return the worker that predicts with an exported file; the file resizes, so each image runs alone, in the thread that decodes it."""
    outputs = [name for name in ("probabilities", "ood_score") if name in model.outputs]

    def prepare(data: bytes) -> dict[str, npt.NDArray[Any]]:
        return model.run(np.asarray(decode(data, model.metadata["min_decode_side"]))[None], outputs)

    def answer(names: list[str], results: list[dict[str, npt.NDArray[Any]]]) -> Predictions:
        probs = np.concatenate([result["probabilities"] for result in results]).astype(np.float64)
        scores = np.array([float(result["ood_score"][0]) if "ood_score" in result else -math.inf for result in results])
        return Predictions(tuple(names), probs, model.classes, scores > model.ood_threshold)

    return Worker(prepare, answer)


def predict_onnx(model: OnnxModel, inputs: Sequence[str | Path], skip_bad: bool = False) -> Iterator[Predictions]:
    """Yield Predictions of files, folders and patterns batch by batch, as `predict.predict_batches` does for a run.

    Raises DataError if nothing is found, ImageError with the list of unreadable images unless `skip_bad`.
    """
    return predict_files(make_worker(model), model.classes, find_images(inputs), skip_bad, os.cpu_count() or 1)


def is_exported(path: Path) -> bool:
    """Whether a path names an exported file, not a run folder."""
    return path.suffix == ".onnx" and not path.is_dir()


def describe_model(model: OnnxModel, precision: float | None = None) -> dict[str, Any]:
    """Return JSON-ready facts for a page or a server.

    confidence_threshold: minimum confidence of a decision. precision: the target precision it was chosen for on val, or None.
    crop_fraction: None if heatmaps cover the whole image, else the side of the centred square they cover over the short side.
    Raises ConfigError for a precision without a threshold.
    """
    metadata = model.metadata
    if precision is None:  # the default, or the highest below it that val could promise
        precision = max((value for value in model._thresholds() if value <= DEFAULT_PRECISION), default=None)
    preprocessing = metadata["preprocessing"]
    return {
        "classes": list(model.classes),
        "backbone": metadata["backbone"]["name"],
        **{name: metadata[name] for name in ("test_accuracy", "test_accuracy_ci95", "test_images", "ood_threshold", "min_decode_side")},
        "heatmaps": "heatmaps" in model.outputs,
        "confidence_threshold": FALLBACK_THRESHOLD if precision is None else model.threshold_for(precision),
        "precision": precision,
        "crop_fraction": preprocessing["crop"] if preprocessing["resize"] == "crop" else None,
        "version": metadata["seewhy_version"],
    }
