"""Draw the figures of reports, each in a light and a dark theme, as PNG."""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import numpy.typing as npt
from matplotlib.figure import Figure  # not pyplot, which changes the caller's backend and figures
from matplotlib.ticker import MaxNLocator

from seewhy.evaluation.metrics import wilson_interval
from seewhy.explain.overlay import overlay_heatmap

THEMES: dict[str, dict[str, Any]] = {
    "light": {"background": "#ffffff", "ink": "#1f2430", "faint": "#d9dde5", "train": "#8a94a6", "val": "#c2410c", "map": "Blues"},
    "dark": {"background": "#171a21", "ink": "#e6e9ef", "faint": "#363c49", "train": "#8a94a6", "val": "#fb923c", "map": "magma"},
}
LABELLED_CLASSES = 40  # maximum for which the confusion matrix shows the class names

Values = Sequence[float] | npt.NDArray[np.float64]


@contextmanager
def _themed(theme: str, width: float, height: float) -> Iterator[tuple[Figure, dict[str, Any]]]:
    """A new figure of this size in inches, and the colours of the theme, with matplotlib's settings changed inside the block."""
    colours = THEMES[theme]
    background, ink, faint = colours["background"], colours["ink"], colours["faint"]
    style: dict[Any, Any] = dict.fromkeys(("figure.facecolor", "axes.facecolor"), background)
    style |= dict.fromkeys(("axes.edgecolor", "grid.color"), faint)
    style |= dict.fromkeys(("text.color", "axes.labelcolor", "xtick.color", "ytick.color"), ink)
    with matplotlib.rc_context({**style, "axes.spines.top": False, "axes.spines.right": False, "font.size": 10}):
        yield Figure(figsize=(width, height), layout="constrained"), colours


def png_of(figure: Figure) -> bytes:
    """PNG bytes of a figure."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=140, bbox_inches="tight")
    return buffer.getvalue()


def training_curves(history: Sequence[dict[str, float]], best_epoch: int, theme: str = "light") -> bytes:
    """Training and validation loss and accuracy by epoch, with the best epoch marked; PNG."""
    epochs = [row["epoch"] for row in history]
    with _themed(theme, 9, 3.2) as (figure, colours):
        axes = figure.subplots(1, 2)
        for axis, name, label in zip(axes, ("loss", "accuracy"), ("cross-entropy loss (nats)", "accuracy (%)"), strict=True):
            factor = 100 if name == "accuracy" else 1
            marker = "o" if len(epochs) < 15 else None
            for part, text in (("train", "training"), ("val", "validation")):
                values = [factor * row[f"{part}_{name}"] for row in history]
                axis.plot(epochs, values, color=colours[part], marker=marker, markersize=4, label=text, linewidth=1.8)
            axis.axvline(best_epoch, color=colours["ink"], linewidth=0.8, linestyle=":", label=f"best epoch ({best_epoch})")
            axis.set_xlabel("epoch")
            axis.set_ylabel(label)
            axis.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
            axis.grid(axis="y", linewidth=0.6)
        axes[0].legend(frameon=False)
    return png_of(figure)


def confusion_figure(confusion: npt.NDArray[np.int64], classes: Sequence[str], theme: str = "light") -> bytes:
    """Confusion matrix (C, C), rows of true classes in percent of their images; PNG."""
    totals = confusion.sum(axis=1, keepdims=True)
    shares = 100 * np.divide(confusion, totals, out=np.zeros(confusion.shape), where=totals > 0)
    count = len(classes)
    side = float(np.clip(0.42 * count + 2.2, 4.2, 9.5))
    with _themed(theme, side + 1.0, side) as (figure, colours):
        axis = figure.subplots()
        image = axis.imshow(shares, cmap=colours["map"], vmin=0, vmax=100, interpolation="nearest")
        suffix = "" if count <= LABELLED_CLASSES else " (number in alphabetical order)"
        axis.set_xlabel(f"predicted class{suffix}")
        axis.set_ylabel(f"true class{suffix}")
        if count <= LABELLED_CLASSES:
            axis.set_xticks(range(count), classes, rotation=45, ha="right", rotation_mode="anchor")
            axis.set_yticks(range(count), classes)
        if count <= 15:
            for row, column in np.argwhere(confusion > 0):
                dark_cell = (shares[row, column] > 65) == (theme == "light")  # where both inks have equal contrast
                ink = "#ffffff" if dark_cell else "#1f2430"
                axis.text(column, row, str(confusion[row, column]), ha="center", va="center", fontsize=9, color=ink)
        bar = figure.colorbar(image, ax=axis, shrink=0.75, label="share of the true class (%)")
        bar.outline.set_visible(False)
    return png_of(figure)


def method_scores(table: Sequence[dict[Any, Any]], baselines: Sequence[str], theme: str = "light") -> bytes:
    """One panel per score: mean and 95% interval of each method, baselines as dashed lines; PNG.

    table: rows with method, score, better ('higher' or 'lower'), mean, low, high and n.
    """
    scores = list(dict.fromkeys(str(row["score"]) for row in table))
    methods = list(dict.fromkeys(str(row["method"]) for row in table if row["method"] not in baselines))
    heights = {name: len(methods) - 1 - n for n, name in enumerate(methods)}
    with _themed(theme, 2.3 * len(scores) + 1.2, 0.34 * len(methods) + 1.5) as (figure, colours):
        axes = figure.subplots(1, len(scores), sharey=True, squeeze=False)
        for axis, score in zip(axes[0], scores, strict=True):
            rows = [row for row in table if row["score"] == score]
            for row in (row for row in rows if row["method"] in heights):
                y = heights[row["method"]]
                axis.plot([row["low"], row["high"]], [y, y], color=colours["val"], linewidth=1.8, solid_capstyle="round")
                axis.plot(row["mean"], y, "o", color=colours["val"], markersize=5)
            for row, style in zip((row for row in rows if row["method"] in baselines), ("--", ":", "-."), strict=False):
                axis.axvline(row["mean"], color=colours["train"], linestyle=style, linewidth=1.2, label=row["method"])
            axis.set_title(f"{score}\n{rows[0]['better']} is better, n = {rows[0]['n']:,}", fontsize=9)
            axis.set_ylim(-0.6, len(methods) - 0.4)
            axis.grid(axis="x", linewidth=0.6)
        axes[0][0].set_yticks(list(heights.values()), list(heights))
        lines = {label: handle for axis in axes[0] for handle, label in zip(*axis.get_legend_handles_labels(), strict=True)}
        figure.legend(list(lines.values()), list(lines), loc="outside lower center", ncols=len(lines), frameon=False, fontsize=9)
    return png_of(figure)


def leak_figure(plain: Values, grouped: Values, theme: str = "light") -> bytes:
    """Test accuracy of random and grouped splits, with a line between the two of each seed; PNG."""
    with _themed(theme, 5.2, 3.0) as (figure, colours):
        axis = figure.subplots()
        for one, other in zip(plain, grouped, strict=True):
            axis.plot([0, 1], [100 * one, 100 * other], color=colours["faint"], linewidth=1.2, zorder=1)
        for x, values in ((0, plain), (1, grouped)):
            axis.scatter([x] * len(values), 100 * np.asarray(values), color=colours["val"], s=28, zorder=2)
            axis.plot([x - 0.12, x + 0.12], [100 * float(np.mean(values))] * 2, color=colours["ink"], linewidth=2, zorder=3)
        axis.set_xticks([0, 1], ["random split", "near-duplicates\nkept together"])
        axis.set_xlim(-0.5, 1.5)
        axis.set_ylabel("test accuracy (%)")
        axis.grid(axis="y", linewidth=0.6)
    return png_of(figure)


def reliability_figure(confidence: Values, accuracy: Values, count: npt.NDArray[np.int64], theme: str = "light") -> bytes:
    """Reliability diagram of (B,) bins with 95% Wilson intervals, larger points for more images, and a histogram below; PNG."""
    limits = 100 * np.array([wilson_interval(round(a * n), n) for a, n in zip(accuracy, count.tolist(), strict=True)])
    x, y = 100 * np.asarray(confidence), 100 * np.asarray(accuracy)
    with _themed(theme, 4.6, 4.8) as (figure, colours):
        top, bottom = figure.subplots(2, 1, height_ratios=(3, 1), sharex=True)
        top.plot([0, 100], [0, 100], color=colours["train"], linestyle="--", linewidth=1.2, label="perfectly calibrated")
        top.vlines(x, limits[:, 0], limits[:, 1], color=colours["val"], linewidth=1.2, alpha=0.5)
        top.scatter(x, y, s=14 + 60 * count / count.max(), color=colours["val"], zorder=3, label="test, with 95% interval")
        top.set_ylabel("accuracy (%)")
        top.set_ylim(0, 102)
        top.legend(frameon=False)
        top.grid(linewidth=0.6)
        bottom.bar(x, count, width=4, color=colours["train"])
        bottom.set_yscale("log")
        bottom.set_ylabel("images")
        bottom.set_xlabel("confidence (%)")
        bottom.set_xlim(0, 102)
    return png_of(figure)


def risk_coverage_figure(coverage: Values, risk: Values, marks: Sequence[tuple[float, float, str]] = (), theme: str = "light") -> bytes:
    """Error rate against coverage, the most confident images first; marks: (coverage, risk, text). PNG."""
    with _themed(theme, 4.6, 3.4) as (figure, colours):
        axis = figure.subplots()
        axis.step(100 * np.asarray(coverage), 100 * np.asarray(risk), where="post", color=colours["val"], linewidth=1.8)
        for share, error, text in marks:
            axis.plot(100 * share, 100 * error, "o", color=colours["ink"], markersize=5)
            axis.annotate(text, (100 * share, 100 * error), (-4, 8), textcoords="offset points", ha="right", fontsize=8)
        axis.set_xlabel("coverage: share of the images with a decision (%)")
        axis.set_ylabel("error rate (%)")
        axis.set_xlim(0, 102)
        axis.set_ylim(bottom=0)
        axis.grid(linewidth=0.6)
    return png_of(figure)


def robustness_figure(table: Sequence[dict[Any, Any]], theme: str = "light") -> bytes:
    """Accuracy against strength, one panel per corruption, with shaded 95% intervals; PNG. table: rows of `robustness`."""
    names = list(dict.fromkeys(str(row["corruption"]) for row in table if row["strength"]))
    with _themed(theme, 1.9 * len(names) + 1, 2.8) as (figure, colours):
        axes = figure.subplots(1, len(names), sharey=True, squeeze=False)
        for axis, name in zip(axes[0], names, strict=True):
            rows = [row for row in table if not row["strength"] or row["corruption"] == name]
            strengths = [row["strength"] for row in rows]
            accuracy, low, high = (100 * np.array([row[key] for row in rows]) for key in ("accuracy", "low", "high"))
            axis.fill_between(strengths, low, high, color=colours["val"], alpha=0.2)
            axis.plot(strengths, accuracy, "o-", color=colours["val"], markersize=4, linewidth=1.8)
            axis.set_title(name, fontsize=10)
            axis.set_xticks(range(6))
            axis.set_xlabel("strength")
            axis.grid(axis="y", linewidth=0.6)
        axes[0][0].set_ylabel("accuracy (%)")
        axes[0][0].set_ylim(0, 102)
    return png_of(figure)


def heatmap_gallery(items: Sequence[tuple[npt.NDArray[np.uint8], npt.NDArray[np.float32], str]], theme: str = "light") -> bytes:
    """Image, heatmap and caption -> image and overlay side by side, up to 4 pairs per row; PNG."""
    pairs = min(4, max(1, len(items)))
    rows = -(-len(items) // pairs)
    with _themed(theme, 3.1 * pairs, 1.95 * rows) as (figure, _):
        axes = figure.subplots(rows, 2 * pairs, squeeze=False)
        for axis in axes.flat:
            axis.axis("off")
        for (image, heatmap, caption), left, right in zip(items, axes.flat[::2], axes.flat[1::2], strict=False):
            left.imshow(image)
            right.imshow(overlay_heatmap(image, heatmap))
            left.set_title(caption, fontsize=8, loc="left")
    return png_of(figure)


def save_png(data: bytes, path: Path) -> None:
    """Write PNG bytes, and create the folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
