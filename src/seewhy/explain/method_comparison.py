"""Run x images -> a table of heatmap methods x scores, each with an interval and beside maps that know nothing."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pandas as pd
import torch
from torch import Tensor, nn

from seewhy.core.parallel import batched, map_ordered
from seewhy.core.progress import progress
from seewhy.data.listing import find_images
from seewhy.errors import ConfigError
from seewhy.evaluation.metrics import mean_interval
from seewhy.explain.attribution import maps_of_methods
from seewhy.explain.cam import ALL_METHODS, SLOW
from seewhy.explain.explainer import check_method
from seewhy.explain.faithfulness import (
    BASELINES,
    DELETION_METRICS,
    LOCALIZATION_METRICS,
    MASKING_METRICS,
    QUALITY,
    STEPS,
    class_probabilities,
    enlarge,
    randomise,
    rank_correlation,
    structural_similarity,
)
from seewhy.explain.masks import outline_of
from seewhy.models.executors import NormalizeInput, float_executor
from seewhy.models.features import load_pixels
from seewhy.models.saved_run import SavedRun
from seewhy.models.weights import classifier_names

BATCH = 16


AREA = "object area (chance level)"


SAME = 1e-5  # of maps from 0 to 1: rounding, and far less than a grey level of the image that they cover


COMPARED = tuple(name for name in ALL_METHODS if name not in SLOW)


def score_methods(
    run: SavedRun,
    inputs: Sequence[str | Path],
    methods: Sequence[str] = COMPARED,
    scores: Sequence[str] = tuple(QUALITY),
    layers: Sequence[str] = (),
    smooth: int = 1,
    workers: int = 2,
) -> pd.DataFrame:
    """One row a method (and baseline) and score: method, score, better, mean, low, high, n.

    low, high: 95% bootstrap interval of the mean over images.
    LOCALIZATION_METRICS are there where outlines are known (outlines.py), over those images; so is a row of method AREA for the
    energy-based pointing game: the share of the image that the object covers, which a flat map would score.
    Maps are of the predicted class, in the plain direction. Probabilities are the softmax of the network's own logits, not divided by
    the run's temperature as its answers are: the papers' scores are defined so, and published numbers can be compared.
    """
    for method in methods:
        check_method(method)
    if unknown := [score for score in scores if score not in QUALITY]:
        raise ConfigError(f"unknown score {unknown[0]!r}; use one of {', '.join(QUALITY)}")
    paths = find_images(inputs)
    model, preprocessing = run.backbone.model, run.backbone.preprocessing
    below, size = NormalizeInput(nn.Identity(), preprocessing), preprocessing.size
    values: dict[tuple[str, str], list[Tensor]] = {}

    def read(path: Path) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.bool_] | None]:
        return load_pixels(path, preprocessing), outline_of(path, preprocessing)

    asked = len(paths) * (len(methods) + len(BASELINES)) * (1 + len(set(scores) & set(DELETION_METRICS)) * STEPS)
    runtime = float_executor(model, size, asked)

    def answer(images: Tensor) -> Tensor:
        return torch.from_numpy(runtime(images.permute(0, 2, 3, 1).contiguous().numpy())).softmax(dim=1)

    with progress("scoring heatmaps", len(paths) * (len(methods) + len(BASELINES))) as advance:
        for number, batch in enumerate(batched(map_ordered(read, paths, workers), BATCH)):
            images = below(torch.from_numpy(np.stack([square for square, _ in batch])))
            probs = answer(images)
            targets = probs.argmax(dim=1)
            whole = probs.gather(1, targets[:, None])[:, 0]
            outlines = {n: outline for n, (_, outline) in enumerate(batch) if outline is not None}
            masks = torch.from_numpy(np.stack(list(outlines.values()))) if outlines else None
            method_maps = ((name, enlarge(maps, size)) for name, maps in maps_of_methods(model, images, methods, targets, layers, smooth))
            baseline_maps = ((name, baseline(len(batch), size, number)) for name, baseline in BASELINES.items())
            known: list[tuple[Tensor, dict[str, Tensor]]] = []  # with a linear head several methods give one map: it is scored once
            for name, maps in itertools.chain(method_maps, baseline_maps):
                found = next((scored for earlier, scored in known if torch.allclose(earlier, maps, rtol=0, atol=SAME)), None)
                if found is None:
                    masked = class_probabilities(answer, images * maps[:, None], targets) if set(scores) & set(MASKING_METRICS) else whole
                    found = {
                        score: QUALITY[score].of(*((whole, masked) if score in MASKING_METRICS else (answer, images, targets, maps)))
                        for score in scores
                    }
                    if masks is not None:
                        found |= {score: function(maps[list(outlines)], masks) for score, function in LOCALIZATION_METRICS.items()}
                    known.append((maps, found))
                for score, value in found.items():
                    values.setdefault((name, score), []).append(value)
                advance(len(batch))
            if masks is not None:
                values.setdefault((AREA, "energy-based pointing game"), []).append(masks.float().mean(dim=(1, 2)))
    return pd.DataFrame([_row(method, score, torch.cat(found).double().numpy()) for (method, score), found in values.items()])


def sanity_check(
    run: SavedRun,
    inputs: Sequence[str | Path],
    methods: Sequence[str] = COMPARED,
    layers: Sequence[str] = (),
    parts: int | None = None,
    workers: int = 2,
    seed: int = 0,
) -> pd.DataFrame:
    """How alike each method's maps stay as the network forgets, from the classifier down: a row a method and stage.

    Columns: method, randomised_to (the classifier, or the first unit of the deepest stage, the next, ...; all above it too),
    then mean, low and high (95% bootstrap interval over images) of `spearman` and `ssim` between the maps of the trained and of
    the randomised network, of the class the trained one predicts; n. Near 0 is as it should be; a map that stays explains nothing.
    parts: only so many of them; 1: the classifier alone.
    """
    for method in methods:
        check_method(method)
    model, preprocessing = run.backbone.model, run.backbone.preprocessing
    below, size = NormalizeInput(nn.Identity(), preprocessing), preprocessing.size
    cascade = [classifier_names(model), *([*stage] for stage in reversed(run.backbone.stages))][:parts]
    randomised_model = copy.deepcopy(model)
    targets: dict[int, Tensor] = {}  # of each batch: what the trained network predicts
    trained: dict[tuple[str, int], Tensor] = {}
    values: dict[tuple[str, str], list[tuple[Tensor, Tensor]]] = {}
    paths = find_images(inputs)
    with progress("randomising the network", len(paths) * len(methods) * (len(cascade) + 1)) as advance:
        for randomised in ([], *cascade):
            randomise(randomised_model, randomised, seed)
            for number, batch in enumerate(batched(map_ordered(lambda path: load_pixels(path, preprocessing), paths, workers), BATCH)):
                images = below(torch.from_numpy(np.stack(batch)))
                if number not in targets:
                    with torch.no_grad():
                        targets[number] = model(images).argmax(dim=1)
                for method, maps in maps_of_methods(randomised_model, images, methods, targets[number], layers):
                    before = trained.setdefault((method, number), maps)
                    advance(len(batch))
                    if randomised:
                        similar = rank_correlation(maps, before), structural_similarity(enlarge(maps, size), enlarge(before, size))
                        values.setdefault((method, randomised[0]), []).append(similar)
    rows = []
    for (method, part), found in values.items():
        row: dict[str, object] = {"method": method, "randomised_to": part}
        for name, parts_of in zip(("spearman", "ssim"), zip(*found, strict=True), strict=True):
            numbers = torch.cat(list(parts_of)).double().numpy()
            low, high = mean_interval(numbers)
            row |= {f"{name}_mean": numbers.mean(), f"{name}_low": low, f"{name}_high": high, "n": len(numbers)}
        rows.append(row)
    return pd.DataFrame(rows)


def _row(method: str, score: str, values: npt.NDArray[np.float64]) -> dict[str, object]:
    low, high = mean_interval(values)
    better = QUALITY[score].better if score in QUALITY else "higher"
    return {"method": method, "score": score, "better": better, "mean": values.mean(), "low": low, "high": high, "n": len(values)}


def beats_baselines(table: pd.DataFrame) -> dict[tuple[str, str], bool]:
    """(method, score) -> whether its interval lies beyond both baselines' means, on the better side."""
    found: dict[tuple[str, str], bool] = {}
    for score, rows in table.groupby("score", sort=False):
        baseline_means = rows[rows["method"].isin([*BASELINES, AREA])]["mean"]
        for row in rows.itertuples():
            if row.method not in BASELINES and row.method != AREA:
                better = row.low > baseline_means.max() if row.better == "higher" else row.high < baseline_means.min()
                found[str(row.method), str(score)] = bool(better)
    return found


def wide(table: pd.DataFrame, cell: str = "{mean:.3f} ({low:.3f} to {high:.3f})") -> pd.DataFrame:
    """Methods x scores as text: mean and interval, with a star where the method beats both baselines; + higher, - lower is better."""
    beaten = beats_baselines(table)
    cells: dict[str, dict[str, str]] = {}
    for row in table.to_dict("records"):
        star = " *" if beaten.get((row["method"], row["score"])) else ""
        column = f"{row['score']} {'+' if row['better'] == 'higher' else '-'}"
        cells.setdefault(column, {})[row["method"]] = cell.format_map(row) + star
    return pd.DataFrame(cells, index=list(dict.fromkeys(table["method"]))).fillna("")


def wide_sanity(sanity: pd.DataFrame) -> pd.DataFrame:
    """Methods x parts, in the order they were randomised: mean rank correlation."""
    return sanity.pivot(index="method", columns="randomised_to", values="spearman_mean")[list(sanity["randomised_to"].unique())].round(2)
