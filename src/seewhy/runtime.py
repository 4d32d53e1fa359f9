"""An exported ONNX file x picture files -> Predictions, by ONNX Runtime alone: no torch, no SciPy."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnxruntime

from seewhy.errors import ConfigError, ImageError, RunError
from seewhy.images import read_image
from seewhy.predictions import Predictions, find_pictures, refuse_bad
from seewhy.progress import progress
from seewhy.streams import in_batches, in_order

FORMAT = 1  # of the metadata, which portable.py writes
BLOCK = 4096


@dataclass(frozen=True)
class OnnxModel:
    """An exported run.

    classes: C names. unknown_above: the strangeness above which a picture looks like nothing known; infinite where the file has none.
    abstain: rows of precision and threshold, chosen on val. outputs: names of what the graph gives.
    """

    path: Path
    session: Any
    classes: tuple[str, ...]
    unknown_above: float
    abstain: tuple[dict[str, Any], ...]
    outputs: tuple[str, ...]

    def answer(self, picture: npt.NDArray[np.uint8]) -> dict[str, npt.NDArray[np.float32]]:
        """(H, W, 3) uint8 RGB -> logits (C,), probabilities (C,), and where the file has them strangeness () and heatmaps (C, h, w)."""
        found = self.session.run(None, {"pictures": picture[None]})
        return {name: values[0] for name, values in zip(self.outputs, found, strict=True)}

    def threshold_for(self, precision: float) -> float:
        """The least probability to answer at for one of the precisions that the run has chosen thresholds for; ConfigError for others."""
        known = {row["precision"]: row["threshold"] for row in self.abstain if row["threshold"] is not None}
        if precision not in known:
            shown = ", ".join(map(str, known)) or "none"
            raise ConfigError(f"{self.path}: knows thresholds for the precisions {shown}; use one of these, or --abstain-below")
        return float(known[precision])


def load_onnx(path: Path | str) -> OnnxModel:
    """A file of `seewhy export` -> OnnxModel. Raises RunError where it is missing, damaged, of another version, or not from seewhy."""
    path = Path(path)
    if not path.is_file():
        raise RunError(f"{path}: no such file; `seewhy export RUN` makes one")
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1  # pictures are answered side by side, a core each
    options.log_severity_level = 3
    try:
        session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    except Exception as error:  # onnxruntime raises types of its own
        raise RunError(f"{path}: not a readable ONNX file ({' '.join(str(error).split())[:80]}); export the run again") from error
    try:
        meta = {key: json.loads(value) for key, value in session.get_modelmeta().custom_metadata_map.items()}
        if int(meta["seewhy_format"]) != FORMAT:
            raise RunError(f"{path}: format {meta['seewhy_format']}, this seewhy reads format {FORMAT}; export the run again")
        above = meta["unknown_above"]
        return OnnxModel(
            path=path,
            session=session,
            classes=tuple(meta["classes"]),
            unknown_above=math.inf if above is None else float(above),
            abstain=tuple(meta["abstain"]),
            outputs=tuple(output.name for output in session.get_outputs()),
        )
    except (KeyError, ValueError, TypeError) as error:
        raise RunError(f"{path}: an ONNX file, but not one of `seewhy export` ({error!r}); export the run again") from error


def predict_onnx(model: OnnxModel, inputs: Sequence[str | Path], skip_bad: bool = False) -> Iterator[Predictions]:
    """Predictions of files, folders and patterns, at most BLOCK at a time; as `predict.predict_blocks` of the run.

    Raises DataError where nothing is found, ImageError with the list of unusable pictures unless `skip_bad`.
    """
    paths = find_pictures(inputs)
    bad: list[tuple[str, str]] = []
    kept = 0

    def answer(path: Path) -> dict[str, npt.NDArray[np.float32]] | str:
        try:
            return model.answer(np.asarray(read_image(path)))
        except ImageError as error:
            return error.bad[0][1]

    with progress("predicting", len(paths)) as advance:
        answers = in_order(answer, paths, os.cpu_count() or 1)
        for block in in_batches(zip(paths, answers, strict=True), BLOCK):
            names, probs, strange, before = [], [], [], len(bad)
            for path, found in block:
                advance(1)
                if isinstance(found, str):
                    bad.append((str(path), found))
                    continue
                names.append(str(path))
                probs.append(found["probabilities"])
                strange.append(float(found["strangeness"]) if "strangeness" in found else -math.inf)
            kept += len(names)
            if skip_bad or not bad:
                rows = np.stack(probs).astype(np.float64) if probs else np.empty((0, len(model.classes)))
                unknown = np.array(strange, dtype=np.float64) > model.unknown_above
                yield Predictions(tuple(names), rows, model.classes, unknown, tuple(bad[before:]))
    if bad and (not skip_bad or not kept):
        raise refuse_bad(bad, len(paths), kept)
