"""Histories, confusion matrices, heatmaps -> images, each in a light and a dark theme."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import numpy.typing as npt
from matplotlib.figure import Figure  # never pyplot, whose backend and open figures are the caller's
from matplotlib.ticker import MaxNLocator

from seewhy.evaluation.metrics import wilson_interval
from seewhy.explain.overlay import overlay_heatmap

THEMES: dict[str, dict[str, Any]] = {
    "light": {"background": "#ffffff", "ink": "#1f2430", "faint": "#d9dde5", "train": "#8a94a6", "val": "#c2410c", "map": "Blues"},
    "dark": {"background": "#171a21", "ink": "#e6e9ef", "faint": "#363c49", "train": "#8a94a6", "val": "#fb923c", "map": "magma"},
}
LABELLED_CLASSES = 40  # up to so many classes the confusion matrix carries their names


def _style(theme: str) -> Any:
    colours = THEMES[theme]
    return {
        "figure.facecolor": colours["background"],
        "axes.facecolor": colours["background"],
        "savefig.facecolor": colours["background"],
        "text.color": colours["ink"],
        "axes.labelcolor": colours["ink"],
        "axes.edgecolor": colours["faint"],
        "xtick.color": colours["ink"],
        "ytick.color": colours["ink"],
        "grid.color": colours["faint"],
        "axes.spines.top": False,
        "axes.spines.right": False,
        "font.size": 10,
    }


def png_of(figure: Figure) -> bytes:
    """PNG bytes of a figure."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=140, bbox_inches="tight")
    return buffer.getvalue()


def training_curves(history: Sequence[dict[str, float]], best_epoch: int, theme: str = "light") -> bytes:
    """Loss and accuracy of training and validation by epoch, the best epoch marked; PNG."""
    colours = THEMES[theme]
    epochs = [row["epoch"] for row in history]
    with matplotlib.rc_context(_style(theme)):
        figure = Figure(figsize=(9, 3.2), layout="constrained")
        axes = figure.subplots(1, 2)
        for axis, name, label in zip(axes, ("loss", "accuracy"), ("cross-entropy loss (nats)", "accuracy (%)"), strict=True):
            factor = 100 if name == "accuracy" else 1
            marker = "o" if len(epochs) < 15 else None
            for part in ("train", "val"):
                values = [factor * row[f"{part}_{name}"] for row in history]
                text = "training" if part == "train" else "validation"
                axis.plot(epochs, values, color=colours[part], marker=marker, markersize=4, label=text, linewidth=1.8)
            axis.axvline(best_epoch, color=colours["ink"], linewidth=0.8, linestyle=":", label=f"best epoch ({best_epoch})")
            axis.set_xlabel("epoch")
            axis.set_ylabel(label)
            axis.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
            axis.grid(axis="y", linewidth=0.6)
        axes[0].legend(frameon=False)
    return png_of(figure)


def confusion_figure(confusion: npt.NDArray[np.int64], classes: Sequence[str], theme: str = "light") -> bytes:
    """Rows of true classes, columns of predicted ones, each row as shares of its images; PNG."""
    colours = THEMES[theme]
    totals = confusion.sum(axis=1, keepdims=True)
    shares = 100 * np.divide(confusion, totals, out=np.zeros(confusion.shape), where=totals > 0)
    count = len(classes)
    side = float(np.clip(0.42 * count + 2.2, 4.2, 9.5))
    with matplotlib.rc_context(_style(theme)):
        figure = Figure(figsize=(side + 1.0, side), layout="constrained")
        axis = figure.subplots()
        image = axis.imshow(shares, cmap=colours["map"], vmin=0, vmax=100, interpolation="nearest")
        axis.set_xlabel("predicted class" if count <= LABELLED_CLASSES else "predicted class (number in alphabetical order)")
        axis.set_ylabel("true class" if count <= LABELLED_CLASSES else "true class (number in alphabetical order)")
        if count <= LABELLED_CLASSES:
            axis.set_xticks(range(count), classes, rotation=45, ha="right", rotation_mode="anchor")
            axis.set_yticks(range(count), classes)
        if count <= 15:
            for row, column in np.argwhere(confusion > 0):
                dark_cell = (shares[row, column] > 65) == (theme == "light")  # where both inks stand out alike
                ink = "#ffffff" if dark_cell else "#1f2430"
                axis.text(column, row, str(confusion[row, column]), ha="center", va="center", fontsize=9, color=ink)
        bar = figure.colorbar(image, ax=axis, shrink=0.75, label="share of the true class (%)")
        bar.outline.set_visible(False)
    return png_of(figure)


def method_scores(table: Sequence[dict[Any, Any]], baselines: Sequence[str], theme: str = "light") -> bytes:
    """A panel a score: each method's mean and 95% interval, the baselines as dashed lines; PNG.

    table: rows with method, score, better ('higher' or 'lower'), mean, low, high and n.
    """
    colours = THEMES[theme]
    scores = list(dict.fromkeys(str(row["score"]) for row in table))
    methods = list(dict.fromkeys(str(row["method"]) for row in table if row["method"] not in baselines))
    places = {name: len(methods) - 1 - n for n, name in enumerate(methods)}
    with matplotlib.rc_context(_style(theme)):
        size = (2.3 * len(scores) + 1.2, 0.34 * len(methods) + 1.5)
        figure = Figure(figsize=size, layout="constrained")
        axes = figure.subplots(1, len(scores), sharey=True, squeeze=False)
        for axis, score in zip(axes[0], scores, strict=True):
            rows = [row for row in table if row["score"] == score]
            for row in (row for row in rows if row["method"] in places):
                place = places[row["method"]]
                axis.plot([row["low"], row["high"]], [place, place], color=colours["val"], linewidth=1.8, solid_capstyle="round")
                axis.plot(row["mean"], place, "o", color=colours["val"], markersize=5)
            for row, style in zip((row for row in rows if row["method"] in baselines), ("--", ":", "-."), strict=False):
                axis.axvline(row["mean"], color=colours["train"], linestyle=style, linewidth=1.2, label=row["method"])
            axis.set_title(f"{score}\n{rows[0]['better']} is better, n = {rows[0]['n']:,}", fontsize=9)
            axis.set_ylim(-0.6, len(methods) - 0.4)
            axis.grid(axis="x", linewidth=0.6)
        axes[0][0].set_yticks(list(places.values()), list(places))
        lines = {label: handle for axis in axes[0] for handle, label in zip(*axis.get_legend_handles_labels(), strict=True)}
        figure.legend(list(lines.values()), list(lines), loc="outside lower center", ncols=len(lines), frameon=False, fontsize=9)
    return png_of(figure)


def leak_figure(plain: Sequence[float], grouped: Sequence[float], theme: str = "light") -> bytes:
    """Test accuracy of each split, at random and with near-duplicates kept together, the two of a seed joined; PNG."""
    colours = THEMES[theme]
    with matplotlib.rc_context(_style(theme)):
        figure = Figure(figsize=(5.2, 3.0), layout="constrained")
        axis = figure.subplots()
        for one, other in zip(plain, grouped, strict=True):
            axis.plot([0, 1], [100 * one, 100 * other], color=colours["faint"], linewidth=1.2, zorder=1)
        for place, values in ((0, plain), (1, grouped)):
            axis.scatter([place] * len(values), [100 * value for value in values], color=colours["val"], s=28, zorder=2)
            axis.plot([place - 0.12, place + 0.12], [100 * float(np.mean(values))] * 2, color=colours["ink"], linewidth=2, zorder=3)
        axis.set_xticks([0, 1], ["split at random", "near-duplicates\nkept together"])
        axis.set_xlim(-0.5, 1.5)
        axis.set_ylabel("test accuracy (%)")
        axis.grid(axis="y", linewidth=0.6)
    return png_of(figure)


def reliability_figure(confidence: Sequence[float], accuracy: Sequence[float], count: Sequence[int], theme: str = "light") -> bytes:
    """How often answers of each confidence are right, against the diagonal of perfect calibration, with a histogram below; PNG.

    Each point has its 95% Wilson interval, and is the larger the more images it stands for.
    """
    colours = THEMES[theme]
    with matplotlib.rc_context(_style(theme)):
        figure = Figure(figsize=(4.6, 4.8), layout="constrained")
        top, bottom = figure.subplots(2, 1, height_ratios=(3, 1), sharex=True)
        top.plot([0, 100], [0, 100], color=colours["train"], linestyle="--", linewidth=1.2, label="perfectly calibrated")
        limits = np.array([wilson_interval(round(a * n), n) for a, n in zip(accuracy, count, strict=True)])
        top.vlines([100 * c for c in confidence], 100 * limits[:, 0], 100 * limits[:, 1], color=colours["val"], linewidth=1.2, alpha=0.5)
        top.scatter(
            [100 * c for c in confidence],
            [100 * a for a in accuracy],
            s=[14 + 60 * n / max(count) for n in count],
            color=colours["val"],
            zorder=3,
            label="test, with 95% interval",
        )
        top.set_ylabel("right answers (%)")
        top.set_ylim(0, 102)
        top.legend(frameon=False, loc="lower right")
        top.grid(linewidth=0.6)
        bottom.bar([100 * c for c in confidence], count, width=4, color=colours["train"])
        bottom.set_yscale("log")
        bottom.set_ylabel("images")
        bottom.set_xlabel("confidence: probability of the answer (%)")
        bottom.set_xlim(0, 102)
    return png_of(figure)


def risk_coverage_figure(
    coverage: Sequence[float], risk: Sequence[float], marks: Sequence[tuple[float, float, str]] = (), theme: str = "light"
) -> bytes:
    """Share of wrong answers against the share of images answered, the surest first; marks: (coverage, risk, text). PNG."""
    colours = THEMES[theme]
    with matplotlib.rc_context(_style(theme)):
        figure = Figure(figsize=(4.6, 3.4), layout="constrained")
        axis = figure.subplots()
        axis.step([100 * c for c in coverage], [100 * r for r in risk], where="post", color=colours["val"], linewidth=1.8)
        for share, wrong, text in marks:
            axis.plot(100 * share, 100 * wrong, "o", color=colours["ink"], markersize=5)
            axis.annotate(text, (100 * share, 100 * wrong), (-4, 8), textcoords="offset points", ha="right", fontsize=8)
        axis.set_xlabel("images answered, the surest first (%)")
        axis.set_ylabel("wrong answers among them (%)")
        axis.set_xlim(0, 102)
        axis.set_ylim(bottom=0)
        axis.grid(linewidth=0.6)
    return png_of(figure)


def robustness_figure(table: Sequence[dict[Any, Any]], theme: str = "light") -> bytes:
    """Accuracy against strength, a panel a corruption, its 95% interval shaded; PNG. table: rows of `robustness`."""
    colours = THEMES[theme]
    names = list(dict.fromkeys(str(row["corruption"]) for row in table if row["strength"]))
    plain = [row for row in table if not row["strength"]]
    with matplotlib.rc_context(_style(theme)):
        figure = Figure(figsize=(1.9 * len(names) + 1, 2.8), layout="constrained")
        axes = figure.subplots(1, len(names), sharey=True, squeeze=False)
        for axis, name in zip(axes[0], names, strict=True):
            rows = plain + [row for row in table if row["corruption"] == name]
            strengths = [row["strength"] for row in rows]
            axis.fill_between(
                strengths, [100 * row["low"] for row in rows], [100 * row["high"] for row in rows], color=colours["val"], alpha=0.2
            )
            axis.plot(strengths, [100 * row["accuracy"] for row in rows], "o-", color=colours["val"], markersize=4, linewidth=1.8)
            axis.set_title(name, fontsize=10)
            axis.set_xticks(range(6))
            axis.set_xlabel("strength")
            axis.grid(axis="y", linewidth=0.6)
        axes[0][0].set_ylabel("accuracy (%)")
        axes[0][0].set_ylim(0, 102)
    return png_of(figure)


def heatmap_gallery(items: Sequence[tuple[npt.NDArray[np.uint8], npt.NDArray[np.float32], str]], theme: str = "light") -> bytes:
    """Pairs of image and overlay with a caption each, up to 4 pairs a row; PNG."""
    pairs = min(4, max(1, len(items)))
    rows = -(-len(items) // pairs)
    with matplotlib.rc_context(_style(theme)):
        figure = Figure(figsize=(3.1 * pairs, 1.95 * rows), layout="constrained")
        axes = figure.subplots(rows, 2 * pairs, squeeze=False)
        for axis in axes.flat:
            axis.axis("off")
        for n, (square, heatmap, caption) in enumerate(items):
            left, right = axes[n // pairs, 2 * (n % pairs)], axes[n // pairs, 2 * (n % pairs) + 1]
            left.imshow(square)
            right.imshow(overlay_heatmap(square, heatmap))
            left.set_title(caption, fontsize=8, loc="left")
    return png_of(figure)


def save_png(data: bytes, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
