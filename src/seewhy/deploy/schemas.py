"""Answer of an exported file -> what a server sends about it: the records of its interface, each a JSON object."""

from __future__ import annotations

import base64
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
from pydantic import BaseModel

from seewhy.explain.overlay import heat_png


class ClassProbability(BaseModel):
    class_name: str
    prob: float


class Heatmap(BaseModel):
    """Of one class (or of all, `class_name` null), from 0 to 1.

    png: base64, a transparent image of the given one's proportions to lay over it. rows: h lists of w values.
    bytes: base64 of C x h x w bytes, 255 for 1, classes in the order of /model; shape: C, h, w.
    """

    class_name: str | None = None
    png: str | None = None
    rows: list[list[float]] | None = None
    bytes: str | None = None
    shape: list[int] | None = None


class ImagePrediction(BaseModel):
    """Of one file. error: why there is none, and then nothing else is there.

    decision: the most probable class, null where it is less probable than `/model` says for `confidence_threshold`. ood: looks like
    nothing the classifier was trained on. ood_score: the number behind it, null where the model does not tell.
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
    request_id: str
    answers: list[ImagePrediction]


class ModelInfo(BaseModel):
    """What the served classifier is.

    confidence_threshold: least probability of an answer; precision: the share of right answers it was chosen for on val. ood_threshold: the
    ood_score from which an image looks like nothing known. crop_fraction: null where heatmaps cover the whole image, else the side of
    the centred square that they cover over the short side. min_decode_side: pixels a side beyond which more change no answer.
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
    code: str
    message: str
    request_id: str


class ErrorResponse(BaseModel):
    error: ErrorDetail


class Health(BaseModel):
    status: Literal["ok"]


PROBLEMS: dict[int | str, dict[str, Any]] = {
    400: {"model": ErrorResponse, "description": "the body is no form with files in it"},
    401: {"model": ErrorResponse, "description": "the server wants a key (header X-API-Key), and this is not it"},
    408: {"model": ErrorResponse, "description": "the upload took too long"},
    413: {"model": ErrorResponse, "description": "too many bytes or files"},
    415: {"model": ErrorResponse, "description": "the body is not multipart/form-data"},
    422: {"model": ErrorResponse, "description": "none of the files is a usable image, or an option is wrong"},
    503: {"model": ErrorResponse, "description": "too many images under way; Retry-After says when to come again"},
}
UPLOAD = {
    "requestBody": {
        "required": True,
        "content": {
            "multipart/form-data": {
                "schema": {
                    "type": "object",
                    "required": ["files"],
                    "properties": {"files": {"type": "array", "minItems": 1, "items": {"type": "string", "format": "binary"}}},
                }
            }
        },
    }
}


# ---------------------------------------------------------------- from arrays to records


def answer_of(
    name: str, found: dict[str, npt.NDArray[Any]], classes: tuple[str, ...], ood_threshold: float, confidence_threshold: float, top_k: int
) -> ImagePrediction:
    probs = found["probabilities"]
    order = np.argsort(-probs, kind="stable")[:top_k]
    ood_score = float(found["ood_score"]) if "ood_score" in found else None
    below_threshold = bool(probs[order[0]] < confidence_threshold)
    return ImagePrediction(
        file=name,
        width=int(found["size"][0]),
        height=int(found["size"][1]),
        decision=None if below_threshold else classes[order[0]],
        below_threshold=below_threshold,
        ood=ood_score is not None and ood_score > ood_threshold,
        ood_score=ood_score,
        top=[ClassProbability(class_name=classes[c], prob=float(probs[c])) for c in order],
    )


def heatmap_of(
    found: dict[str, npt.NDArray[Any]], kind: str, classes: tuple[str, ...], target: int | None, crop_fraction: float | None
) -> Heatmap | None:
    if kind == "none":
        return None
    maps = found["heatmaps"]
    if kind == "all":
        data = np.round(255 * maps).astype(np.uint8)
        return Heatmap(bytes=base64.b64encode(data.tobytes()).decode(), shape=list(data.shape))
    number = int(found["probabilities"].argmax()) if target is None else target
    if kind == "array":
        return Heatmap(class_name=classes[number], rows=maps[number].astype(float).round(4).tolist())
    return Heatmap(class_name=classes[number], png=base64.b64encode(heat_png(maps[number], tuple(found["size"]), crop_fraction)).decode())
