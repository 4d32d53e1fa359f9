"""What do near-duplicates leak, what is that worth, and are wrong labels found?

    python benchmarks/trust.py --data-root DIR [--seeds 0 1 2 3 4]     Caltech-101, into results.json
    python benchmarks/trust.py --quick                                 demo set, one JSON line

Leak: `seewhy train --backbone efficientnet_lite0 --unfreeze 0` with `--group-by exact` and with near-duplicates kept together, a split
each with every seed. Labels: 5% of them given another class at random; the share of these among the first 5% of the audit's ranking, and of
the ranking by margin (Northcutt 2021, arXiv:1911.00068) of the same probabilities. The figures stand in RESULTS.md.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from common import record

SHARE = 0.05  # of the labels, flipped


def accuracies(data: str, data_root: str | None, seeds: list[int], group_by: str, place: Path) -> dict[str, list[float]]:
    """Test numbers of one run a seed."""
    import seewhy

    found: dict[str, list[float]] = {}
    for seed in seeds:
        run = seewhy.train(
            data,
            out=place / f"{group_by}-{seed}",
            data_root=data_root,
            backbone="efficientnet_lite0",
            unfreeze=0,
            seed=seed,
            group_by=group_by,
        )
        test, calibration = run.metrics["test"], run.manifest["calibration"]
        row = {name: test[name] for name in ("accuracy", "mean_per_class_accuracy")}
        row["ece"] = test["expected_calibration_error"]
        row["ece_before"] = test["expected_calibration_error_uncalibrated"]
        row |= {f"{name}_at_{a['precision']}": a.get(f"test_{name}") for a in calibration["selective"] for name in ("answered", "right")}
        row["unknown_flagged"] = run.manifest["ood"]["test_flagged"]
        for name, value in row.items():
            found.setdefault(name, []).append(value)
    return found


def with_label_noise(labels: Any, share: float, seed: int) -> tuple[Any, Any]:
    """Give a random share of (N,) labels another class; the labels, and (N,) which were changed."""
    rng = np.random.default_rng(seed)
    wrong = np.zeros(len(labels), dtype=bool)
    wrong[rng.permutation(len(labels))[: round(share * len(labels))]] = True
    classes = int(labels.max()) + 1
    return np.where(wrong, (labels + rng.integers(1, classes, len(labels))) % classes, labels), wrong


def flips_found(vectors: Any, labels: Any, groups: Any, seed: int) -> tuple[float, float]:
    """Share of the flipped labels among as many first places: by log-odds, and by margin."""
    from seewhy.curation.label_issues import out_of_fold, rank_label_issues

    moved, wrong = with_label_noise(labels, SHARE, seed)
    log_probs = out_of_fold(vectors, moved, groups)
    first = int(wrong.sum())
    by_odds = wrong[rank_label_issues(moved, log_probs).order[:first]].mean()
    probs = np.exp(log_probs)
    own = probs[np.arange(len(moved)), moved]
    probs[np.arange(len(moved)), moved] = -1
    by_margin = wrong[np.argsort(own - probs.max(axis=1), kind="stable")[:first]].mean()
    return float(by_odds), float(by_margin)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data-root", help="folder that holds caltech101 (or $SEEWHY_DATA)")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--quick", action="store_true", help="the demo set, one seed")
    arguments = parser.parse_args()
    from seewhy.curation.near_duplicates import label_groups, near_pairs
    from seewhy.curation.split import split_images
    from seewhy.data.image_set import open_images
    from seewhy.models.features import embed

    data = "scenes" if arguments.quick else "caltech101"
    seeds = [0] if arguments.quick else arguments.seeds
    images = open_images(data, arguments.data_root)
    vectors = embed(images)
    began = time.perf_counter()
    near = near_pairs(images, vectors)
    seconds = time.perf_counter() - began
    groups = label_groups(len(images), near.pairs)
    splits = [split_images(images, seed=seed) for seed in seeds]
    leaked = [float(np.isin(groups[split.test], groups[split.train]).mean()) for split in splits]
    flips = [flips_found(vectors, images.labels, groups, seed) for seed in seeds]
    with tempfile.TemporaryDirectory() as place:
        found = {how: accuracies(data, arguments.data_root, seeds, how, Path(place)) for how in ("exact", "duplicates")}
    odds, margins = (statistics.mean(f[k] for f in flips) for k in (0, 1))
    answer = {
        "name": "trust",
        "leaked": round(statistics.mean(leaked), 4),
        "accuracy": {how: round(statistics.mean(row["accuracy"]), 4) for how, row in found.items()},
        "flips_found": {"log-odds": round(odds, 3), "margin": round(margins, 3)},
    }
    if not arguments.quick:

        def shown(how: str, name: str) -> str:
            values = [100 * value for value in found[how][name] if value is not None]
            if not values:
                return "–"
            return f"{statistics.mean(values):.1f}" + (f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else "")

        titles = {"exact": "equal files alone kept together", "duplicates": "near-duplicates kept together (default)"}
        rows = [
            {
                "split": title,
                "test accuracy %": shown(how, "accuracy"),
                "mean per-class %": shown(how, "mean_per_class_accuracy"),
                "calibration error %, before": shown(how, "ece_before"),
                "after temperature": shown(how, "ece"),
                "98% wanted: answered %": shown(how, "answered_at_0.98"),
                "of these right %": shown(how, "right_at_0.98"),
                "flagged unknown %": shown(how, "unknown_flagged"),
            }
            for how, title in titles.items()
        ]
        sizes = np.bincount(groups)
        kinds = {kind: int((near.kinds == kind).sum()) for kind in ("exact", "hash", "features")}
        most = np.unique(np.array(images.classes)[images.labels[near.pairs[:, 0]]], return_counts=True)
        nests = ", ".join(f"{name} {count}" for count, name in sorted(zip(most[1], most[0], strict=True), reverse=True)[:6])
        notes = [
            f"efficientnet_lite0, classifier trained, 70/10/20, means ± sample standard deviation over seeds {' '.join(map(str, seeds))}; "
            f"{len(splits[0].test):,} test images a seed.",
            f"Near-duplicates: {len(near):,} pairs ({kinds['exact']} equal files, {kinds['hash']} by perceptual hash and features, "
            f"{kinds['features']} by features alone), {int(sizes[sizes > 1].sum())} images in {int((sizes > 1).sum())} groups; pairs by "
            f"class: {nests}. Across labels: {int((images.labels[near.pairs[:, 0]] != images.labels[near.pairs[:, 1]]).sum())}. Found in "
            f"{seconds:.1f} s once the features are there. Of a random split's test images {100 * statistics.mean(leaked):.1f}% have "
            "a near-duplicate in training.",
            f"Wrong labels: of 5% flipped at random, the first 5% of the ranking by log-odds hold {100 * odds:.1f}%, by margin "
            f"{100 * margins:.1f}% (mean of {len(seeds)} seeds).",
        ]
        raw = {"seeds": seeds, "found": found, "leaked": leaked, "flips": flips}
        command = f"python benchmarks/trust.py --seeds {' '.join(map(str, seeds))}"
        record("trust", "Leaks, calibration and wrong labels", {"rows": rows, "raw": raw, "notes": notes, "command": command}, timed=False)
    print(json.dumps(answer))


if __name__ == "__main__":
    main()
