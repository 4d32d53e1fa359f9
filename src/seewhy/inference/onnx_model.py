"""An exported ONNX file x image files -> Predictions, by ONNX Runtime alone: no torch, no SciPy."""

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
from seewhy.inference.predictions import Predictions, answer_files

RANKS = {"logits": 2, "probabilities": 2, "network_input": 4, "ood_score": 1, "heatmaps": 4}  # what a file may answer with
FORMAT = 3  # of the metadata, which deploy/onnx_export.py writes
USUAL_PRECISION = 0.95
WITHOUT_PRECISION = 0.5  # least probability of an answer where val could promise no precision
ASKED_ALONE = onnxruntime.RunOptions()
ASKED_ALONE.only_execute_path_to_fetches = True  # nothing is computed that nobody asks for, heatmaps say


@dataclass(frozen=True)
class OnnxModel:
    """An exported run.

    name: where it comes from, for messages. session: of ONNX Runtime. outputs: names of what the graph gives. facts: its metadata.
    """

    name: str
    session: Any
    outputs: tuple[str, ...]
    facts: dict[str, Any]

    @property
    def classes(self) -> tuple[str, ...]:
        """C names."""
        return tuple(self.facts["classes"])

    @property
    def ood_threshold(self) -> float:
        """The ood_score above which an image looks like nothing known; infinite where the file has none."""
        above = self.facts["ood_threshold"]
        return math.inf if above is None else float(above)

    def ask(self, images: npt.NDArray[np.uint8], wanted: Sequence[str] | None = None) -> dict[str, npt.NDArray[Any]]:
        """Run the file on (N, H, W, 3) uint8 RGB; by name, all outputs or those `wanted`.

        logits (N, C), probabilities (N, C), network_input (N, 3, S, S) uint8; where the file has them ood_score (N,) and
        heatmaps (N, C, h, w).
        """
        names = self.outputs if wanted is None else wanted
        return dict(zip(names, self._run(self.session, list(names), images), strict=True))

    def _run(self, session: Any, names: list[str], images: npt.NDArray[np.uint8]) -> list[npt.NDArray[Any]]:
        try:
            found: list[npt.NDArray[Any]] = session.run(names, {"images": images}, ASKED_ALONE)
        except Exception as error:  # onnxruntime raises types of its own
            raise RunError(f"{self.name}: cannot answer ({reason_of(error, 120)}); export the run again") from error
        return found

    @cached_property
    def _squares(self) -> Any:
        try:
            return _session(self.facts["preprocess_graph"], 1)
        except Exception as error:  # onnxruntime raises types of its own
            raise RunError(f"{self.name}: its first step is no readable graph; export the run again") from error

    def square(self, image: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8]:
        """(H, W, 3) -> (S, S, 3): the first step of the graph alone. Squares of many images can be asked about in one call."""
        squares: npt.NDArray[np.uint8] = self._run(self._squares, ["network_input"], image[None])[0]
        square: npt.NDArray[np.uint8] = squares[0].transpose(1, 2, 0)
        return square

    def read(self, path: Path | str) -> npt.NDArray[np.uint8]:
        """An image file -> (H, W, 3), decoded as for the run: a large JPEG to no more pixels than its square needs."""
        return np.asarray(read_image(path, self.facts["min_decode_side"]))

    def threshold_for(self, precision: float) -> float:
        """The least probability to answer at for one of the precisions that the run has chosen thresholds for; ConfigError for others."""
        known = {row["precision"]: row["threshold"] for row in self.facts["selective"] if row["threshold"] is not None}
        if precision not in known:
            shown = ", ".join(map(str, known)) or "none"
            raise ConfigError(f"{self.name}: knows thresholds for the precisions {shown}; use one of these, or --min-confidence")
        return float(known[precision])


def load_onnx(source: Path | str | bytes, threads: int = 1, spin: bool = True) -> OnnxModel:
    """A file of `seewhy export`, or its bytes -> OnnxModel, each of whose answers takes `threads` cores.

    spin: whether threads that have nothing to do keep their cores for a while, which is quickest where nobody else needs them.

    Raises RunError where it is missing, damaged, of another version, or not from seewhy.
    """
    name = "this model" if isinstance(source, bytes) else str(source)
    if not isinstance(source, bytes):
        try:
            source = Path(source).read_bytes()
        except FileNotFoundError as error:
            raise RunError(f"{name}: no such file; `seewhy export RUN` makes one") from error
        except OSError as error:
            raise RunError(f"{name}: cannot be read ({error.strerror}); name a file of `seewhy export`") from error
    checked = check_graph(source, name, RANKS)
    try:
        session = _session(checked, threads, spin)
    except Exception as error:  # onnxruntime raises types of its own
        raise RunError(f"{name}: not a readable ONNX file ({reason_of(error, 80)}); export the run again") from error
    try:
        facts = {key: json.loads(value) for key, value in session.get_modelmeta().custom_metadata_map.items()}
        if int(facts["seewhy_format"]) != FORMAT:
            raise RunError(f"{name}: format {facts['seewhy_format']!r:.20}, this seewhy reads format {FORMAT}; export the run again")
        facts["preprocess_graph"] = check_graph(_check(facts), name, {"network_input": 4})
    except (KeyError, ValueError, TypeError, AttributeError, OverflowError, RecursionError) as error:
        reason = repr(error)[:80]
        raise RunError(f"{name}: an ONNX file, but not one of `seewhy export` ({reason}); export the run again") from error
    outputs = session.get_outputs()
    classes = {output.name: output.shape[1] for output in outputs if output.name in ("logits", "probabilities", "heatmaps")}
    if "probabilities" not in classes or set(classes.values()) != {len(facts["classes"])}:
        raise RunError(f"{name}: names {len(facts['classes'])} classes and answers for others; export the run again")
    return OnnxModel(name, session, tuple(output.name for output in outputs), facts)


def _session(source: str | bytes, threads: int, spin: bool = True) -> Any:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.add_session_config_entry("session.intra_op.allow_spinning", str(int(spin)))
    options.log_severity_level = 3
    options.add_session_config_entry("session.load_model_format", "ONNX")  # not what the bytes may claim to be
    options.enable_mem_pattern = False  # one would be kept for every size of image
    return onnxruntime.InferenceSession(source, options, providers=["CPUExecutionProvider"])


def _check(facts: dict[str, Any]) -> bytes:
    """The graph of the first step; KeyError, ValueError or TypeError where metadata lacks what is read later."""
    names = facts["classes"]
    if not isinstance(names, list) or not names or not all(isinstance(name, str) for name in names) or len(set(names)) < len(names):
        raise ValueError("classes are no list of names")
    if not MIN_SIDE <= int(facts["min_decode_side"]) <= MAX_SIDE:
        raise ValueError("min_decode_side is no number of pixels")
    numbers = [facts["ood_threshold"] or 0, facts["test_accuracy"], facts["test_images"], facts["preprocessing"]["crop"]]
    numbers += [*(facts["test_accuracy_ci95"] or ()), *(row[key] or 0 for row in facts["selective"] for key in ("precision", "threshold"))]
    if not all(math.isfinite(float(number)) for number in numbers):
        raise ValueError("numbers are not finite")
    str(facts["preprocessing"]["resize"]), str(facts["backbone"]["name"]), str(facts["seewhy_version"])
    return base64.b64decode(facts["preprocess_graph"], validate=True)


def worker_of(model: OnnxModel) -> Worker[Predictions]:
    """What answers by an exported file, which resizes by itself: so each image is asked about alone, in the thread that decodes it."""
    wanted = [name for name in ("probabilities", "ood_score") if name in model.outputs]

    def ask(data: bytes) -> dict[str, npt.NDArray[Any]]:
        return model.ask(np.asarray(decode(data, model.facts["min_decode_side"]))[None], wanted)

    def answer(names: list[str], found: list[dict[str, npt.NDArray[Any]]]) -> Predictions:
        probs = np.concatenate([each["probabilities"] for each in found]).astype(np.float64)
        strange = np.array([float(each["ood_score"][0]) if "ood_score" in each else -math.inf for each in found])
        return Predictions(tuple(names), probs, model.classes, strange > model.ood_threshold)

    return Worker(ask, answer)


def predict_onnx(model: OnnxModel, inputs: Sequence[str | Path], skip_bad: bool = False) -> Iterator[Predictions]:
    """Predictions of files, folders and patterns, a batch at a time; as `predict.predict_blocks` of the run.

    Raises DataError where nothing is found, ImageError with the list of unusable images unless `skip_bad`.
    """
    return answer_files(worker_of(model), model.classes, find_images(inputs), skip_bad, os.cpu_count() or 1)


def is_exported(path: Path) -> bool:
    """Whether a path names a file of `seewhy export`, and no folder of a run."""
    return path.suffix == ".onnx" and not path.is_dir()


# ---------------------------------------------------------------- what a page or a server says of the classifier


def about(model: OnnxModel, precision: float | None = None) -> dict[str, Any]:
    """JSON-ready facts. confidence_threshold: least probability of an answer; precision: what it was chosen for on val, or None.

    crop_fraction: None where heatmaps cover the whole image, else the side of the centred square they cover over the short side.
    Raises ConfigError for a precision that the file does not know.
    """
    facts = model.facts
    if precision is None:  # the usual one, or the highest below it that val could promise
        known = [row["precision"] for row in facts["selective"] if row["threshold"] is not None]
        precision = max((value for value in known if value <= USUAL_PRECISION), default=None)
    preprocessing = facts["preprocessing"]
    return {
        "classes": list(model.classes),
        "backbone": facts["backbone"]["name"],
        "test_accuracy": facts["test_accuracy"],
        "test_accuracy_ci95": facts["test_accuracy_ci95"],
        "test_images": facts["test_images"],
        "heatmaps": "heatmaps" in model.outputs,
        "confidence_threshold": WITHOUT_PRECISION if precision is None else model.threshold_for(precision),
        "precision": precision,
        "ood_threshold": facts["ood_threshold"],
        "min_decode_side": facts["min_decode_side"],
        "crop_fraction": preprocessing["crop"] if preprocessing["resize"] == "crop" else None,
        "version": facts["seewhy_version"],
    }
