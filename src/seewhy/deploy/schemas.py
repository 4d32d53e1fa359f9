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
    bytes: base64 of C x h x w bytes, 255 for 1, classes in the order of /classes; shape: C, h, w.
    """

    class_name: str | None = None
    png: str | None = None
    rows: list[list[float]] | None = None
    bytes: str | None = None
    shape: list[int] | None = None


class ImagePrediction(BaseModel):
    """Of one file. error: why there is none, and then nothing else is there.

    answer: the most probable class, null where it is less probable than `/classes` says for `unsure_below`. unknown: looks like
    nothing the classifier was trained on. strangeness: the number behind it, null where the model does not tell.
    """

    file: str
    error: str | None = None
    width: int | None = None
    height: int | None = None
    answer: str | None = None
    unsure: bool | None = None
    unknown: bool | None = None
    strangeness: float | None = None
    top: list[ClassProbability] | None = None
    heatmap: Heatmap | None = None


class PredictResponse(BaseModel):
    request_id: str
    answers: list[ImagePrediction]


class Model(BaseModel):
    """What the served classifier is.

    unsure_below: least probability of an answer; precision: the share of right answers it was chosen for on val. unknown_above: the
    strangeness from which an image looks like nothing known. box_share: null where heatmaps cover the whole image, else the side of
    the centred square that they cover over the short side. enough: pixels a side beyond which more change no answer.
    """

    classes: list[str]
    backbone: str
    test_accuracy: float
    test_accuracy_ci95: list[float] | None
    test_images: int
    heatmaps: bool
    unsure_below: float
    precision: float | None
    unknown_above: float | None
    box_share: float | None
    enough: int
    version: str


class Problem(BaseModel):
    code: str
    message: str
    request_id: str


class Error(BaseModel):
    error: Problem


class Health(BaseModel):
    status: Literal["ok"]


PROBLEMS: dict[int | str, dict[str, Any]] = {
    400: {"model": Error, "description": "the body is no form with files in it"},
    401: {"model": Error, "description": "the server wants a key (header X-API-Key), and this is not it"},
    408: {"model": Error, "description": "the upload took too long"},
    413: {"model": Error, "description": "too many bytes or files"},
    415: {"model": Error, "description": "the body is not multipart/form-data"},
    422: {"model": Error, "description": "none of the files is a usable image, or an option is wrong"},
    503: {"model": Error, "description": "too many images under way; Retry-After says when to come again"},
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
    name: str, found: dict[str, npt.NDArray[Any]], classes: tuple[str, ...], unknown_above: float, unsure_below: float, top_k: int
) -> ImagePrediction:
    probs = found["probabilities"]
    order = np.argsort(-probs, kind="stable")[:top_k]
    strangeness = float(found["strangeness"]) if "strangeness" in found else None
    unsure = bool(probs[order[0]] < unsure_below)
    return ImagePrediction(
        file=name,
        width=int(found["size"][0]),
        height=int(found["size"][1]),
        answer=None if unsure else classes[order[0]],
        unsure=unsure,
        unknown=strangeness is not None and strangeness > unknown_above,
        strangeness=strangeness,
        top=[ClassProbability(class_name=classes[c], prob=float(probs[c])) for c in order],
    )


def heatmap_of(
    found: dict[str, npt.NDArray[Any]], kind: str, classes: tuple[str, ...], target: int | None, box_share: float | None
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
    return Heatmap(class_name=classes[number], png=base64.b64encode(heat_png(maps[number], tuple(found["size"]), box_share)).decode())
