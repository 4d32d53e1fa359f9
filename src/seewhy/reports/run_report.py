"""Write the report of a run: report.html, one self-contained file, and figures/heatmaps.png."""

from __future__ import annotations

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
from seewhy.explain.method_comparison import pivot_scores, sanity_check, score_methods
from seewhy.explain.overlay import overlay_heatmap
from seewhy.models.saved_run import SavedRun
from seewhy.reports.figures import heatmap_gallery, reliability_figure, risk_coverage_figure, save_png, training_curves
from seewhy.reports.html import jpeg_url, render_page, short_path, themed_urls

GALLERIES = {  # title -> explanation
    "Confident and correct": "The most confident correct prediction of each class.",
    "Confident and wrong": "The most confident errors: wrong labels or similar classes.",
    "Least confident": "The least confident of the other predictions.",
}
GALLERY = 8  # images per gallery
METHOD = "gradcam"
SCORED = 32  # test images whose heatmaps are scored
SCORES = ("average drop", "confidence increase")  # these need forward passes; `seewhy explain --compare-methods` has more


def write_report(run: SavedRun, history: Sequence[dict[str, float]], test: Evaluation, folder: Path) -> None:
    """Write report.html into `folder`, and figures/heatmaps.png if the network has heatmaps."""
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
    facts = {
        "run": run,
        "manifest": run.manifest,
        "config": run.manifest["config"],
        "numbers": run.metrics["test"],
        "warnings": warnings_of(run),
        "galleries": [
            (title, GALLERIES[title], [_card(run, test, n, explained, chosen.index(n), title) for n in numbers])
            for title, numbers in examples.items()
        ],
        "method": METHOD,
        "trust": _heatmap_scores(run, test) if explained is not None else None,
        "reliability": themed_urls(lambda theme: _reliability(test, theme)),
        "coverage": themed_urls(lambda theme: _coverage(run, test, theme)),
        "curves": themed_urls(lambda theme: training_curves(history, int(run.manifest["best_epoch"]), theme)),
        "matrix": _matrix(test),
        "pairs": confused_pairs(test)[:12],
        "numbered": len(run.classes) > 40,
        "label_issues": _label_issues(test)[:12],
    }
    (folder / "report.html").write_text(render_page("report.html", facts), encoding="utf-8")


def pick_examples(test: Evaluation) -> dict[str, list[int]]:
    """Test images of each gallery: most confident and correct (one per class), most confident and wrong, least confident."""
    by_confidence = [int(n) for n in np.argsort(-test.confidence, kind="stable")]
    correct: list[int] = []
    for n in by_confidence:
        if test.correct[n] and len(correct) < GALLERY and not any(test.labels[n] == test.labels[other] for other in correct):
            correct.append(n)
    wrong = [n for n in by_confidence if not test.correct[n]][:GALLERY]
    least = [n for n in reversed(by_confidence) if n not in correct and n not in wrong][:GALLERY]
    return dict(zip(GALLERIES, (correct, wrong, least), strict=True))


def other_class(test: Evaluation, n: int) -> int:
    """The class to compare the predicted one with: the true class or, if the prediction is correct, the second most probable."""
    return int(test.labels[n]) if test.labels[n] != test.predicted[n] else int(np.argsort(-test.logits[n], kind="stable")[1])


def _explain_examples(run: SavedRun, test: Evaluation, chosen: list[int]) -> tuple[Explanation, Explanation] | None:
    """Heatmaps for the predicted and the other class of the chosen images; None if the network has no feature maps."""
    paths = [test.paths[n] for n in chosen]
    try:
        predicted = explain(run, paths, METHOD, [test.classes[test.predicted[n]] for n in chosen])
        return predicted, explain(run, paths, METHOD, [test.classes[other_class(test, n)] for n in chosen])
    except BackboneError:
        return None


def _heatmap_scores(run: SavedRun, test: Evaluation) -> dict[str, Any]:
    """Faithfulness scores of each method on some test images, and rank correlation with the maps of a randomised classifier."""
    drawn = np.sort(np.random.default_rng(0).permutation(len(test.paths))[:SCORED])
    paths = [test.paths[n] for n in drawn]
    methods = tuple(METHODS)
    table = score_methods(run, paths, methods, SCORES)
    sanity = {row["method"]: f"{row['spearman_mean']:.2f}" for row in sanity_check(run, paths, methods, parts=1).to_dict("records")}
    shown = pivot_scores(table, "{mean:.2f}")
    rows = [{"method": name, "scores": shown.loc[name].tolist(), "sanity": sanity.get(name, "")} for name in shown.index]
    return {"n": len(paths), "columns": shown.columns.tolist(), "rows": rows}


def _caption(test: Evaluation, n: int) -> str:
    true, predicted = test.classes[test.labels[n]], test.classes[test.predicted[n]]
    return f"{predicted} {test.confidence[n]:.0%}" + ("" if true == predicted else f" (is {true})")


def _label_issues(test: Evaluation) -> list[dict[str, Any]]:
    """Test labels that are issues by the log-odds of the network, the least probable first."""
    wrong = np.flatnonzero(~test.correct)
    logits = test.logits[wrong].astype(np.float64) / test.temperature
    ranked = rank_label_issues(test.labels[wrong], logits)  # log-odds are differences of logits
    return [
        {
            "path": test.paths[n],
            "label": test.classes[test.labels[n]],
            "suggested": test.classes[suggested],
            "odds": float(np.exp(min(-log_odds, 20))),
        }
        for n, log_odds, suggested in zip(wrong[ranked.order], ranked.log_odds, ranked.suggested, strict=True)
        if log_odds < ISSUE_LOG_ODDS
    ]


def _matrix(test: Evaluation) -> dict[str, Any]:
    """The non-empty cells of the confusion matrix; margin: space for the class names, in cells."""
    totals = test.confusion.sum(axis=1)
    cells = [
        {"x": int(x), "y": int(y), "count": int(test.confusion[y, x]), "total": int(totals[y]), "share": test.confusion[y, x] / totals[y]}
        for y, x in np.argwhere(test.confusion)
    ]
    return {"count": len(test.classes), "cells": cells, "margin": min(7, 1 + 2 * max(len(name) for name in test.classes) // 5)}


def _reliability(test: Evaluation, theme: str) -> bytes:
    diagram = reliability(test.confidence, test.correct)
    return reliability_figure(diagram.confidence, diagram.accuracy, diagram.count, theme)


def _coverage(run: SavedRun, test: Evaluation, theme: str) -> bytes:
    """The risk-coverage curve, with marks at the thresholds chosen on val."""
    curve = risk_coverage(test.confidence, test.correct)
    marks = [
        (row["test_answered"], 1 - row["test_right"], f"target {row['precision']:.0%}")
        for row in run.manifest["calibration"]["selective"]
        if row["threshold"] is not None and row.get("test_right") is not None
    ]
    return risk_coverage_figure(curve.coverage, curve.risk, marks, theme)


def warnings_of(run: SavedRun) -> list[str]:
    """Sentences about what limits the metrics: small classes, wide intervals, leaks, unreadable and conflicting images."""
    test, data, split = run.metrics["test"], run.manifest["data"], run.manifest["split"]
    warnings = []
    if small := [row["class"] for row in test["per_class"] if 0 < row["n"] < 10]:
        noun = "class has" if len(small) == 1 else "classes have"
        warnings.append(f"{len(small)} {noun} fewer than 10 test images, so their own metrics are imprecise: {_first_five(small)}.")
    low, high = test["accuracy_ci95"]
    if high - low > 0.06:
        warnings.append(f"With {test['n']} test images the accuracy is known to ± {50 * (high - low):.0f} points only.")
    if leaked := split.get("leaked_test_images"):
        warnings.append(f"{leaked} of the {split['test']} test images have a near-duplicate in training; the accuracy may be too high.")
    if classes := split.get("classes_with_split_groups"):
        warnings.append(f"Classes with too few groups, so only exact duplicates are kept together: {_first_five(classes)}.")
    if run.config.group_by == "exact" and not run.config.split_from:
        warnings.append("Near-duplicates were not kept together (--group-by exact); the accuracy may be too high.")
    if data["bad"]:
        warnings.append(f"{len(data['bad'])} unreadable images were skipped.")
    if data["conflicting_duplicates"]:
        warnings.append(f"{len(data['conflicting_duplicates'])} images are in more than one class.")
    return warnings


def _first_five(names: Sequence[str]) -> str:
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")


def confused_pairs(test: Evaluation) -> list[dict[str, Any]]:
    """Confused classes, the most frequent first: true, predicted, count, paths."""
    wrong = test.confusion.copy()
    np.fill_diagonal(wrong, 0)
    order = np.argsort(-wrong, axis=None, kind="stable")
    pairs = []
    for cell in order[: int((wrong > 0).sum())]:
        true, predicted = divmod(int(cell), wrong.shape[0])
        members = np.flatnonzero((test.labels == true) & (test.predicted == predicted))
        pair = {"true": test.classes[true], "predicted": test.classes[predicted], "count": int(wrong[true, predicted])}
        pairs.append({**pair, "paths": [test.paths[n] for n in members.tolist()]})
    return pairs


def _card(
    run: SavedRun, test: Evaluation, n: int, explained: tuple[Explanation, Explanation] | None, position: int, title: str
) -> dict[str, Any]:
    """One image of a gallery, with overlays as data URLs of 288 pixels a side; position: of its heatmaps in `explained`."""
    image = display_view(test.paths[n], run.backbone.preprocessing, 288)
    predicted, other = int(test.predicted[n]), other_class(test, n)
    classes = [predicted] if title == "Confident and correct" else [predicted, other]
    return {
        "image": jpeg_url(image),
        "overlays": [
            {"class": test.classes[c], "image": jpeg_url(overlay_heatmap(image, explanation.maps[position]))}
            for c, explanation in zip(classes, explained or (), strict=False)
        ],
        "true": test.classes[test.labels[n]],
        "predicted": test.classes[predicted],
        "prob": float(test.confidence[n]),
        "other": test.classes[other],
        "other_prob": float(softmax(test.logits[[n]] / test.temperature)[0, other]),
        "file": short_path(test.paths[n]),
    }
