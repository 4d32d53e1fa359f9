"""A run and its evaluation -> report.html: one file with everything inside, readable with no network."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from jinja2 import Environment, select_autoescape
from PIL import Image

from seewhy.errors import BackboneError
from seewhy.evaluate import Evaluation
from seewhy.explain import Explanation, explain, view_for_people
from seewhy.figures import confusion_figure, heatmap_gallery, overlay_heatmap, save_png, training_curves
from seewhy.run import Run

GALLERY = 8  # pictures a gallery
METHOD = "gradcam++"


def write_report(run: Run, history: Sequence[dict[str, float]], test: Evaluation, folder: Path) -> None:
    """report.html and figures/heatmaps.png in `folder`."""
    best, worst = pick_examples(test)
    explanation = _explain_examples(run, test, best, worst)
    if explanation is not None:
        shown = [*range(min(4, len(best))), *range(len(best), min(len(best) + 4, len(explanation.paths)))]
        pictures = [view_for_people(explanation.paths[n], run.backbone.preprocessing, 224) for n in shown]
        items = [(picture, explanation.maps[n], _caption(test, (best + worst)[n])) for n, picture in zip(shown, pictures, strict=True)]
        save_png(heatmap_gallery(items), folder / "figures" / "heatmaps.png")
    environment = Environment(autoescape=select_autoescape(default=True, default_for_string=True), trim_blocks=True, lstrip_blocks=True)
    template = environment.from_string(files("seewhy").joinpath("templates/report.html").read_text(encoding="utf-8"))
    (folder / "report.html").write_text(template.render(_facts(run, history, test, explanation, len(best), best + worst)), encoding="utf-8")


def pick_examples(test: Evaluation) -> tuple[list[int], list[int]]:
    """Test pictures the network is right and surest about (one a class), and those it is wrong and surest about."""
    sure = test.probs.max(axis=1)
    right = test.labels == test.predicted
    best: list[int] = []
    for n in np.argsort(-sure, kind="stable"):
        if right[n] and len(best) < GALLERY and not any(test.labels[n] == test.labels[b] for b in best):
            best.append(int(n))
    worst = [int(n) for n in np.argsort(-sure, kind="stable") if not right[n]][:GALLERY]
    return best, worst


def _explain_examples(run: Run, test: Evaluation, best: list[int], worst: list[int]) -> Explanation | None:
    """Heatmaps of the chosen pictures' predicted classes; None where the network has no maps."""
    try:
        return explain(run, [test.paths[n] for n in best + worst], METHOD)
    except BackboneError:
        return None


def _caption(test: Evaluation, n: int) -> str:
    true, predicted = test.classes[test.labels[n]], test.classes[test.predicted[n]]
    said = f"{predicted} {test.probs[n].max():.0%}"
    return said if true == predicted else f"{said} (is {true})"


def _facts(
    run: Run, history: Sequence[dict[str, float]], test: Evaluation, explanation: Explanation | None, n_best: int, chosen: list[int]
) -> dict[str, Any]:
    numbers = run.metrics["test"]
    best_epoch = int(run.manifest["best_epoch"])
    cards = [_card(run, test, n, explanation, place) for place, n in enumerate(chosen)]
    return {
        "run": run,
        "manifest": run.manifest,
        "numbers": numbers,
        "curves": {theme: _data_url(training_curves(history, best_epoch, theme), "png") for theme in ("light", "dark")},
        "confusion": {theme: _data_url(confusion_figure(test.confusion, run.classes, theme), "png") for theme in ("light", "dark")},
        "pairs": confused_pairs(test)[:12],
        "numbered": len(run.classes) > 40,
        "galleries": [("Right and sure", cards[:n_best]), ("Wrong and sure", cards[n_best:])],
        "method": METHOD,
        "config": run.manifest["config"],
    }


def confused_pairs(test: Evaluation) -> list[dict[str, Any]]:
    """True class, predicted class and how often, most frequent first."""
    wrong = test.confusion.copy()
    np.fill_diagonal(wrong, 0)
    order = np.argsort(-wrong, axis=None, kind="stable")
    found = []
    for place in order[: int((wrong > 0).sum())]:
        true, predicted = divmod(int(place), wrong.shape[0])
        found.append({"true": test.classes[true], "predicted": test.classes[predicted], "count": int(wrong[true, predicted])})
    return found


def _card(run: Run, test: Evaluation, n: int, explanation: Explanation | None, place: int) -> dict[str, Any]:
    """What a gallery shows of one picture; images of 288 pixels as data URLs."""
    picture = view_for_people(test.paths[n], run.backbone.preprocessing, 288)
    return {
        "picture": _data_url(_jpeg(picture), "jpeg"),
        "overlay": _data_url(_jpeg(overlay_heatmap(picture, explanation.maps[place])), "jpeg") if explanation is not None else None,
        "true": test.classes[test.labels[n]],
        "predicted": test.classes[test.predicted[n]],
        "prob": float(test.probs[n].max()),
        "file": "/".join(Path(test.paths[n]).parts[-2:]),
    }


def _jpeg(picture: npt.NDArray[np.uint8]) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(picture).save(buffer, "JPEG", quality=85)
    return buffer.getvalue()


def _data_url(data: bytes, kind: str) -> str:
    return f"data:image/{kind};base64,{base64.b64encode(data).decode()}"
