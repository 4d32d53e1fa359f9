"""A run and its evaluation -> report.html: one file with everything inside, readable with no network."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from seewhy.curation.label_issues import ISSUE_LOG_ODDS, rank_label_issues
from seewhy.errors import BackboneError
from seewhy.evaluation.calibration import reliability, risk_coverage
from seewhy.evaluation.evaluate import Evaluation
from seewhy.evaluation.metrics import softmax
from seewhy.explain.cam import METHODS
from seewhy.explain.explainer import Explanation, display_view, explain
from seewhy.explain.method_comparison import sanity_check, score_methods, wide
from seewhy.explain.overlay import overlay_heatmap
from seewhy.models.saved_run import SavedRun
from seewhy.reports.figures import (
    heatmap_gallery,
    reliability_figure,
    risk_coverage_figure,
    save_png,
    training_curves,
)
from seewhy.reports.html import data_url, jpeg_url, render_page, thumbnail_url

GALLERY = 8  # images a gallery
METHOD = "gradcam"
SCORED = 32  # test images whose heatmaps are scored
SCORES = ("average drop", "confidence increase")  # which cost a forward pass a map; `seewhy explain --compare-methods` has the others


def write_report(run: SavedRun, history: Sequence[dict[str, float]], test: Evaluation, folder: Path) -> None:
    """report.html and figures/heatmaps.png in `folder`."""
    examples = pick_examples(test)
    chosen = [n for numbers in examples.values() for n in numbers]
    explained = _explain_examples(run, test, chosen)
    if explained is not None:
        items = [
            (display_view(test.paths[n], run.backbone.preprocessing, 224), explained[0].maps[chosen.index(n)], _caption(test, n))
            for title in ("Confident and correct", "Confident and wrong")
            for n in examples[title][:4]
        ]
        save_png(heatmap_gallery(items), folder / "figures" / "heatmaps.png")
    trust = _trust(run, test) if explained is not None else None
    facts = _facts(run, history, test, explained, examples) | {"trust": trust}
    (folder / "report.html").write_text(render_page("report.html", facts), encoding="utf-8")


def pick_examples(test: Evaluation) -> dict[str, list[int]]:
    """Test images worth a look, by kind: right and surest (one a class), wrong and surest, and least sure of the others."""
    correct = test.correct
    surest = [int(n) for n in np.argsort(-test.confidence, kind="stable")]
    best: list[int] = []
    for n in surest:
        if correct[n] and len(best) < GALLERY and not any(test.labels[n] == test.labels[b] for b in best):
            best.append(n)
    worst = [n for n in surest if not correct[n]][:GALLERY]
    least = [n for n in reversed(surest) if n not in best and n not in worst][:GALLERY]
    return {"Confident and correct": best, "Confident and wrong": worst, "Least confident": least}


def other_class(test: Evaluation, n: int) -> int:
    """The class to hold the predicted one against: the true one or, where that is the predicted one, the second most probable."""
    return int(test.labels[n]) if test.labels[n] != test.predicted[n] else int(np.argsort(-test.logits[n], kind="stable")[1])


def _explain_examples(run: SavedRun, test: Evaluation, chosen: list[int]) -> tuple[Explanation, Explanation] | None:
    """Heatmaps of the chosen images' predicted and other classes; None where the network has no maps."""
    paths = [test.paths[n] for n in chosen]
    try:
        predicted = explain(run, paths, METHOD, [test.classes[test.predicted[n]] for n in chosen])
        return predicted, explain(run, paths, METHOD, [test.classes[other_class(test, n)] for n in chosen])
    except BackboneError:
        return None


def _trust(run: SavedRun, test: Evaluation) -> dict[str, Any]:
    """How far the heatmaps can be trusted, on some test images: methods x scores, and their likeness to maps of a random classifier."""
    drawn = np.sort(np.random.default_rng(0).permutation(len(test.paths))[:SCORED])
    paths = [test.paths[n] for n in drawn]
    methods = tuple(METHODS)
    table = score_methods(run, paths, methods, SCORES)
    forgotten = {row["method"]: f"{row['spearman_mean']:.2f}" for row in sanity_check(run, paths, methods, parts=1).to_dict("records")}
    shown = wide(table, "{mean:.2f}")
    rows = [{"method": name, "scores": shown.loc[name].tolist(), "forgotten": forgotten.get(name, "")} for name in shown.index]
    return {"n": len(paths), "columns": shown.columns.tolist(), "rows": rows}


def _caption(test: Evaluation, n: int) -> str:
    true, predicted = test.classes[test.labels[n]], test.classes[test.predicted[n]]
    said = f"{predicted} {test.confidence[n]:.0%}"
    return said if true == predicted else f"{said} (is {true})"


def _facts(
    run: SavedRun,
    history: Sequence[dict[str, float]],
    test: Evaluation,
    explained: tuple[Explanation, Explanation] | None,
    examples: dict[str, list[int]],
) -> dict[str, Any]:
    best_epoch = int(run.manifest["best_epoch"])
    places = itertools.count()
    return {
        "run": run,
        "manifest": run.manifest,
        "numbers": run.metrics["test"],
        "curves": {theme: data_url(training_curves(history, best_epoch, theme), "png") for theme in ("light", "dark")},
        "matrix": _matrix(test),
        "reliability": {theme: data_url(_reliability(test, theme), "png") for theme in ("light", "dark")},
        "coverage": {theme: data_url(_coverage(run, test, theme), "png") for theme in ("light", "dark")},
        "warnings": warnings_of(run),
        "label_issues": _label_issues(test)[:12],
        "pairs": [pair | {"images": [thumbnail_url(path, 96) for path in pair["paths"][:3]]} for pair in confused_pairs(test)[:12]],
        "numbered": len(run.classes) > 40,
        "galleries": [
            (title, [_card(run, test, n, explained, next(places), title != "Confident and correct") for n in numbers])
            for title, numbers in examples.items()
        ],
        "method": METHOD,
        "config": run.manifest["config"],
    }


def _label_issues(test: Evaluation) -> list[dict[str, Any]]:
    """Test labels that the network, not trained on them, believes 20 times less than another class; the least believable first."""
    wrong = np.flatnonzero(~test.correct)
    logits = test.logits[wrong].astype(np.float64) / test.temperature
    found = rank_label_issues(test.labels[wrong], logits)  # log-odds are differences of logits
    kept = np.flatnonzero(found.log_odds < ISSUE_LOG_ODDS)
    return [
        {
            "file": "/".join(Path(test.paths[n]).parts[-2:]),
            "label": test.classes[test.labels[n]],
            "suggested": test.classes[found.suggested[place]],
            "odds": float(np.exp(min(-found.log_odds[place], 20))),
        }
        for place, n in ((int(place), int(wrong[found.order[place]])) for place in kept)
    ]


def _matrix(test: Evaluation) -> dict[str, Any]:
    """The cells of the confusion matrix that are not empty, in units of a cell; margin: room for names."""
    totals = test.confusion.sum(axis=1)
    cells = [
        {"x": int(x), "y": int(y), "count": int(test.confusion[y, x]), "total": int(totals[y]), "share": test.confusion[y, x] / totals[y]}
        for y, x in np.argwhere(test.confusion)
    ]
    return {"count": len(test.classes), "cells": cells, "margin": min(7, 1 + 2 * max(len(name) for name in test.classes) // 5)}


def _reliability(test: Evaluation, theme: str) -> bytes:
    found = reliability(test.confidence, test.correct)
    return reliability_figure(found.confidence.tolist(), found.accuracy.tolist(), found.count.tolist(), theme)


def _coverage(run: SavedRun, test: Evaluation, theme: str) -> bytes:
    """The risk-coverage curve, marked where the thresholds chosen on val lie."""
    curve = risk_coverage(test.confidence, test.correct)
    marks = [
        (row["test_answered"], 1 - row["test_right"], f"{row['precision']:.0%} wanted")
        for row in run.manifest["calibration"]["selective"]
        if row["threshold"] is not None and row.get("test_right") is not None
    ]
    return risk_coverage_figure(curve.coverage.tolist(), curve.risk.tolist(), marks, theme)


def warnings_of(run: SavedRun) -> list[str]:
    """What a reader should know before believing the numbers, in sentences."""
    test, data, split = run.metrics["test"], run.manifest["data"], run.manifest["split"]
    found = []
    small = [row["class"] for row in test["per_class"] if 0 < row["n"] < 10]
    if small:
        shown = ", ".join(small[:5]) + (f" and {len(small) - 5} more" if len(small) > 5 else "")
        noun = "class has" if len(small) == 1 else "classes have"
        found.append(f"{len(small)} {noun} fewer than 10 test images, so their own numbers are rough: {shown}.")
    low, high = test["accuracy_ci95"]
    if high - low > 0.06:
        found.append(f"With {test['n']} test images the accuracy is known to ± {50 * (high - low):.0f} points only.")
    if leaked := split.get("leaked_test_images"):
        found.append(f"{leaked} of the {split['test']} test images have a near-duplicate in training; the accuracy may be too good.")
    if torn := split.get("classes_with_split_groups"):
        shown = ", ".join(torn[:5]) + (f" and {len(torn) - 5} more" if len(torn) > 5 else "")
        found.append(f"Near-duplicates could not be kept in one part of the split, having too few groups: {shown}.")
    if run.config.group_by == "exact" and not run.config.split_from:
        found.append("Near-duplicates were not kept together (--group-by exact); the accuracy may be too good.")
    if data["bad"]:
        found.append(f"{len(data['bad'])} images could not be used and were left out.")
    if data["conflicting_duplicates"]:
        found.append(f"{len(data['conflicting_duplicates'])} images lie under more than one class.")
    return found


def confused_pairs(test: Evaluation) -> list[dict[str, Any]]:
    """True class, predicted class, how often, and the files; most frequent first."""
    wrong = test.confusion.copy()
    np.fill_diagonal(wrong, 0)
    order = np.argsort(-wrong, axis=None, kind="stable")
    found = []
    for place in order[: int((wrong > 0).sum())]:
        true, predicted = divmod(int(place), wrong.shape[0])
        members = np.flatnonzero((test.labels == true) & (test.predicted == predicted))
        pair = {"true": test.classes[true], "predicted": test.classes[predicted], "count": int(wrong[true, predicted])}
        found.append({**pair, "paths": [test.paths[n] for n in members.tolist()]})
    return found


def _card(
    run: SavedRun, test: Evaluation, n: int, explained: tuple[Explanation, Explanation] | None, place: int, both: bool
) -> dict[str, Any]:
    """What a gallery shows of one image; images of 288 pixels as data URLs. both: the other class's heatmap too."""
    image = display_view(test.paths[n], run.backbone.preprocessing, 288)
    shown = [(int(test.predicted[n]), 0), *([(other_class(test, n), 1)] if both else [])] if explained is not None else []
    return {
        "image": jpeg_url(image),
        "overlays": [
            {"class": test.classes[c], "image": jpeg_url(overlay_heatmap(image, explained[which].maps[place]))}
            for c, which in shown
            if explained is not None
        ],
        "true": test.classes[test.labels[n]],
        "predicted": test.classes[test.predicted[n]],
        "prob": float(test.confidence[n]),
        "other": test.classes[other_class(test, n)],
        "other_prob": float(softmax(test.logits[[n]] / test.temperature)[0, other_class(test, n)]),
        "file": "/".join(Path(test.paths[n]).parts[-2:]),
    }
