"""Define the server's JSON records and build them from the outputs of an exported file."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
from pydantic import BaseModel

from seewhy.explain.overlay import heatmap_png
from seewhy.inference.onnx_model import OnnxModel

Outputs = dict[str, npt.NDArray[Any]]  # of one image


class ClassProbability(BaseModel):
    """A class and its calibrated probability, 0 to 1."""

    class_name: str
    prob: float


class Heatmap(BaseModel):
    """Evidence for one class, or for all (`class_name` null): values from 0 to 1.

    png: base64 of a transparent overlay with the image's proportions. rows: h lists of w values.
    bytes: base64 of C x h x w bytes (255 is 1), classes in the order of `/model`; shape: [C, h, w].
    """

    class_name: str | None = None
    png: str | None = None
    rows: list[list[float]] | None = None
    bytes: str | None = None
    shape: list[int] | None = None


class ImagePrediction(BaseModel):
    """The prediction for one file, or the `error` that prevented it (all other fields are then missing).

    decision: the most probable class; missing if its probability is below `confidence_threshold` of `/model` (`below_threshold`).
    ood: whether the image is out-of-distribution: its `ood_score` (missing if the model has none) exceeds `ood_threshold` of `/model`.
    """

    file: str
    error: str | None = None
    width: int | None = None
    height: int | None = None
    decision: str | None = None
    below_threshold: bool | None = None
    ood: bool | None = None
    ood_score: float | None = None
    top: list[ClassProbability] | None = None
    heatmap: Heatmap | None = None


class PredictResponse(BaseModel):
    """Predictions for all files of a request, in their order."""

    request_id: str
    answers: list[ImagePrediction]


class ModelInfo(BaseModel):
    """The served classifier.

    confidence_threshold: minimum probability for a decision; precision: the share of correct decisions it was chosen for on val.
    ood_threshold: the `ood_score` above which an image is out-of-distribution. crop_fraction: side of the centred square that heatmaps
    cover, as a share of the image's short side; null if they cover the whole image. min_decode_side: pixels a side from which a larger
    image changes no prediction.
    """

    classes: list[str]
    backbone: str
    test_accuracy: float
    test_accuracy_ci95: list[float] | None
    test_images: int
    heatmaps: bool
    confidence_threshold: float
    precision: float | None
    ood_threshold: float | None
    crop_fraction: float | None
    min_decode_side: int
    version: str


class ErrorDetail(BaseModel):
    """A stable `code`, a `message` of one line, and the request's number in the server's log."""

    code: str
    message: str
    request_id: str


class ErrorResponse(BaseModel):
    """The body of every response with a status of 400 or above."""

    error: ErrorDetail


class Health(BaseModel):
    """The server is up."""

    status: Literal["ok"]


ERROR_RESPONSES: dict[int | str, dict[str, Any]] = {
    status: {"model": ErrorResponse, "description": text}
    for status, text in {
        400: "the body is not a form with files",
        401: "the header X-API-Key is missing or wrong",
        408: "the upload took too long",
        413: "too many bytes or files",
        415: "the body is not multipart/form-data",
        422: "no usable image, or an invalid parameter",
        503: "too many images in flight; retry after the seconds in Retry-After",
    }.items()
}
_FILES = {"type": "array", "minItems": 1, "items": {"type": "string", "format": "binary"}}
_FORM = {"schema": {"type": "object", "required": ["files"], "properties": {"files": _FILES}}}
UPLOAD_FORM = {"requestBody": {"required": True, "content": {"multipart/form-data": _FORM}}}


# ---------------------------------------------------------------- from arrays to records


def to_prediction(name: str, outputs: Outputs, model: OnnxModel, confidence_threshold: float, top_k: int) -> ImagePrediction:
    """Build the record of one image from its outputs: probabilities (C,), size (2,) and, where the file has it, ood_score ()."""
    probs = outputs["probabilities"]
    order = np.argsort(-probs, kind="stable")[:top_k]
    ood_score = float(outputs["ood_score"]) if "ood_score" in outputs else None
    below_threshold = bool(probs[order[0]] < confidence_threshold)
    return ImagePrediction(
        file=name,
        width=int(outputs["size"][0]),
        height=int(outputs["size"][1]),
        decision=None if below_threshold else model.classes[order[0]],
        below_threshold=below_threshold,
        ood=ood_score is not None and ood_score > model.ood_threshold,
        ood_score=ood_score,
        top=[ClassProbability(class_name=model.classes[c], prob=float(probs[c])) for c in order],
    )


def to_heatmap(outputs: Outputs, kind: str, classes: Sequence[str], target: int | None, crop_fraction: float | None) -> Heatmap | None:
    """Build the record of a heatmap from heatmaps (C, h, w); target: index of the class, None for the predicted one."""
    if kind == "none":
        return None
    maps = outputs["heatmaps"]
    if kind == "all":
        data = np.round(255 * maps).astype(np.uint8)
        return Heatmap(bytes=base64.b64encode(data.tobytes()).decode(), shape=list(data.shape))
    c = int(outputs["probabilities"].argmax()) if target is None else target
    if kind == "array":
        return Heatmap(class_name=classes[c], rows=maps[c].astype(float).round(4).tolist())
    return Heatmap(class_name=classes[c], png=base64.b64encode(heatmap_png(maps[c], tuple(outputs["size"]), crop_fraction)).decode())
