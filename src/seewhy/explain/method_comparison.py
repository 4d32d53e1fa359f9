"""Compare heatmap methods on a run: a table of faithfulness scores with intervals, next to uninformative baseline maps."""

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
from seewhy.explain.attribution import iter_method_maps
from seewhy.explain.cam import ALL_METHODS, SLOW_METHODS
from seewhy.explain.explainer import check_method
from seewhy.explain.faithfulness import (
    BASELINES,
    DELETION_METRICS,
    FAITHFULNESS_METRICS,
    LOCALIZATION_METRICS,
    MASKING_METRICS,
    STEPS,
    class_probabilities,
    enlarge,
    randomise,
    rank_correlation,
    structural_similarity,
)
from seewhy.explain.masks import object_mask
from seewhy.models.executors import NormalizeInput, float_executor
from seewhy.models.features import load_pixels
from seewhy.models.saved_run import SavedRun
from seewhy.models.weights import classifier_names

BATCH = 16
OBJECT_AREA = "object area (chance level)"
MAP_TOLERANCE = 1e-5  # between maps in 0..1 that count as equal: rounding, far below one grey level
DEFAULT_METHODS = tuple(name for name in ALL_METHODS if name not in SLOW_METHODS)


def score_methods(
    run: SavedRun,
    inputs: Sequence[str | Path],
    methods: Sequence[str] = DEFAULT_METHODS,
    scores: Sequence[str] = tuple(FAITHFULNESS_METRICS),
    layers: Sequence[str] = (),
    smooth: int = 1,
    workers: int = 2,
) -> pd.DataFrame:
    """Return one row per method (and baseline) and score: method, score, better, mean, low, high, n.

    low, high: 95% bootstrap interval of the mean over images. LOCALIZATION_METRICS are added for images whose object mask is known
    (masks.py), and a row of method OBJECT_AREA for the energy-based pointing game: the share of the image that the object covers,
    the score of a flat map.
    Maps are of the predicted class, without flip TTA. Probabilities are the softmax of the network's logits, not divided by the
    run's temperature, as the papers define the scores.
    """
    for method in methods:
        check_method(method)
    if unknown := [score for score in scores if score not in FAITHFULNESS_METRICS]:
        raise ConfigError(f"unknown score {unknown[0]!r}; use one of {', '.join(FAITHFULNESS_METRICS)}")
    paths = find_images(inputs)
    model, preprocessing = run.backbone.model, run.backbone.preprocessing
    normalize, size = NormalizeInput(nn.Identity(), preprocessing), preprocessing.size
    values: dict[tuple[str, str], list[Tensor]] = {}
    map_count = len(paths) * (len(methods) + len(BASELINES))
    forward = float_executor(model, size, map_count * (1 + len(set(scores) & set(DELETION_METRICS)) * STEPS))

    def read(path: Path) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.bool_] | None]:
        return load_pixels(path, preprocessing), object_mask(path, preprocessing)

    def predict_probs(images: Tensor) -> Tensor:
        return torch.from_numpy(forward(images.permute(0, 2, 3, 1).contiguous().numpy())).softmax(dim=1)

    def score_maps(images: Tensor, maps: Tensor, targets: Tensor, probs: Tensor) -> dict[str, Tensor]:
        needs_masked = set(scores) & set(MASKING_METRICS)
        masked = class_probabilities(predict_probs, images * maps[:, None], targets) if needs_masked else probs
        return {
            score: FAITHFULNESS_METRICS[score].of(
                *((probs, masked) if score in MASKING_METRICS else (predict_probs, images, targets, maps))
            )
            for score in scores
        }

    with progress("scoring heatmaps", map_count) as advance:
        for number, batch in enumerate(batched(map_ordered(read, paths, workers), BATCH)):
            images = normalize(torch.from_numpy(np.stack([crop for crop, _ in batch])))
            all_probs = predict_probs(images)
            targets = all_probs.argmax(dim=1)
            probs = all_probs.gather(1, targets[:, None])[:, 0]
            masks = {n: mask for n, (_, mask) in enumerate(batch) if mask is not None}
            mask_batch = torch.from_numpy(np.stack(list(masks.values()))) if masks else None
            method_maps = ((name, enlarge(maps, size)) for name, maps in iter_method_maps(model, images, methods, targets, layers, smooth))
            baseline_maps = ((name, baseline(len(batch), size, number)) for name, baseline in BASELINES.items())
            scored: list[tuple[Tensor, dict[str, Tensor]]] = []  # equal maps of several methods (linear heads) are scored once
            for name, maps in itertools.chain(method_maps, baseline_maps):
                results = next((known for earlier, known in scored if torch.allclose(earlier, maps, rtol=0, atol=MAP_TOLERANCE)), None)
                if results is None:
                    results = score_maps(images, maps, targets, probs)
                    if mask_batch is not None:
                        results |= {score: metric(maps[list(masks)], mask_batch) for score, metric in LOCALIZATION_METRICS.items()}
                    scored.append((maps, results))
                for score, value in results.items():
                    values.setdefault((name, score), []).append(value)
                advance(len(batch))
            if mask_batch is not None:
                values.setdefault((OBJECT_AREA, "energy-based pointing game"), []).append(mask_batch.float().mean(dim=(1, 2)))
    return pd.DataFrame([_row(method, score, torch.cat(batches).double().numpy()) for (method, score), batches in values.items()])


def _row(method: str, score: str, values: npt.NDArray[np.float64]) -> dict[str, object]:
    low, high = mean_interval(values)
    better = FAITHFULNESS_METRICS[score].better if score in FAITHFULNESS_METRICS else "higher"
    return {"method": method, "score": score, "better": better, "mean": values.mean(), "low": low, "high": high, "n": len(values)}


def sanity_check(
    run: SavedRun,
    inputs: Sequence[str | Path],
    methods: Sequence[str] = DEFAULT_METHODS,
    layers: Sequence[str] = (),
    parts: int | None = None,
    workers: int = 2,
    seed: int = 0,
) -> pd.DataFrame:
    """Measure how much maps change as the network is randomised from the classifier down; one row per method and stage.

    Columns: method; randomised_to, the last part randomised (the classifier, or the first unit of the deepest stage, the next, ...);
    mean, low and high (95% bootstrap interval over images) of `spearman` and `ssim` between the maps of the trained and of the
    randomised network, of the class that the trained one predicts; n. Near 0 is right: a map that stays explains nothing.
    parts: number of stages to randomise; 1: the classifier alone.
    """
    for method in methods:
        check_method(method)
    model, preprocessing = run.backbone.model, run.backbone.preprocessing
    normalize, size = NormalizeInput(nn.Identity(), preprocessing), preprocessing.size
    cascade = [classifier_names(model), *([*stage] for stage in reversed(run.backbone.stages))][:parts]
    randomised_model = copy.deepcopy(model)
    targets: dict[int, Tensor] = {}  # classes that the trained network predicts, by batch
    trained_maps: dict[tuple[str, int], Tensor] = {}
    values: dict[tuple[str, str], list[tuple[Tensor, Tensor]]] = {}
    paths = find_images(inputs)
    with progress("randomising the network", len(paths) * len(methods) * (len(cascade) + 1)) as advance:
        for randomised in ([], *cascade):
            randomise(randomised_model, randomised, seed)
            for number, batch in enumerate(batched(map_ordered(lambda path: load_pixels(path, preprocessing), paths, workers), BATCH)):
                images = normalize(torch.from_numpy(np.stack(batch)))
                if number not in targets:
                    with torch.no_grad():
                        targets[number] = model(images).argmax(dim=1)
                for method, maps in iter_method_maps(randomised_model, images, methods, targets[number], layers):
                    trained = trained_maps.setdefault((method, number), maps)
                    advance(len(batch))
                    if randomised:
                        similar = rank_correlation(maps, trained), structural_similarity(enlarge(maps, size), enlarge(trained, size))
                        values.setdefault((method, randomised[0]), []).append(similar)
    rows = []
    for (method, part), batches in values.items():
        row: dict[str, object] = {"method": method, "randomised_to": part}
        for name, similarities in zip(("spearman", "ssim"), zip(*batches, strict=True), strict=True):
            numbers = torch.cat(list(similarities)).double().numpy()
            low, high = mean_interval(numbers)
            row |= {f"{name}_mean": numbers.mean(), f"{name}_low": low, f"{name}_high": high, "n": len(numbers)}
        rows.append(row)
    return pd.DataFrame(rows)


def beats_baselines(table: pd.DataFrame) -> dict[tuple[str, str], bool]:
    """Return for each (method, score) whether its interval lies beyond the means of all baselines, on the better side."""
    beats: dict[tuple[str, str], bool] = {}
    for score, rows in table.groupby("score", sort=False):
        is_baseline = rows["method"].isin([*BASELINES, OBJECT_AREA])
        means = rows[is_baseline]["mean"]
        for row in rows[~is_baseline].itertuples():
            beats[str(row.method), str(score)] = bool(row.low > means.max() if row.better == "higher" else row.high < means.min())
    return beats


def pivot_scores(table: pd.DataFrame, cell: str = "{mean:.3f} ({low:.3f} to {high:.3f})") -> pd.DataFrame:
    """Return methods x scores as text, with a star where the method beats all baselines; + higher, - lower is better."""
    beats = beats_baselines(table)
    cells: dict[str, dict[str, str]] = {}
    for row in table.to_dict("records"):
        star = " *" if beats.get((row["method"], row["score"])) else ""
        column = f"{row['score']} {'+' if row['better'] == 'higher' else '-'}"
        cells.setdefault(column, {})[row["method"]] = cell.format_map(row) + star
    return pd.DataFrame(cells, index=list(dict.fromkeys(table["method"]))).fillna("")


def pivot_sanity(sanity: pd.DataFrame) -> pd.DataFrame:
    """Return methods x parts, in the order of randomisation: mean rank correlation."""
    return sanity.pivot(index="method", columns="randomised_to", values="spearman_mean")[list(sanity["randomised_to"].unique())].round(2)
