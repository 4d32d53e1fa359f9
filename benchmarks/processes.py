"""What do two processes cost that share the cores of one?

    python benchmarks/processes.py --data-root DIR [--images 2000] [--rounds 3]     images of Caltech-101, into results.json
    python benchmarks/processes.py --quick                                            demo images, one JSON line

The same training as one process with all cores, and as two processes (gloo) with half of them each, in turn, each from an empty cache with
the exported network and the record of checked images at hand: what is measured is features and fit. One machine gains nothing by that; what
it takes longer is the overhead of data parallelism. The second network has random weights and LayerNorm, since several processes on CPUs do
not train BatchNorm. The figures stand in RESULTS.md.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import tempfile
from pathlib import Path

from common import measure, record, seewhy
from growth import repeat_images

WAYS = {"efficientnet_lite0, --unfreeze 0": ("efficientnet_lite0", "0"), "convnext_atto, --unfreeze 1": ("convnext_atto", "1")}
STAGES = ("features", "fit", "evaluation")


def train(arguments: list[str], devices: int, cache: Path, out: Path) -> dict[str, float]:
    """Seconds by stage, and in all, of a training without features at hand."""
    shutil.rmtree(cache / "features", ignore_errors=True)
    shutil.rmtree(out, ignore_errors=True)
    found = measure(seewhy("train", *arguments, "--devices", str(devices), "--out", str(out), "--json"), {"SEEWHY_CACHE": str(cache)})
    return {**found["answer"]["seconds"], "whole command": found["seconds"], "accuracy": found["answer"]["metrics"]["test"]["accuracy"]}


def compare(arguments: list[str], rounds: int) -> dict[int, list[dict[str, float]]]:
    """Rounds of one and two processes, A B A B, after one of each that is not counted."""
    with tempfile.TemporaryDirectory() as place:
        found: dict[int, list[dict[str, float]]] = {1: [], 2: []}
        for turn in range(rounds + 1):
            for devices, rows in found.items():
                row = train(arguments, devices, Path(place, f"cache-{devices}"), Path(place, "run"))
                if turn:
                    rows.append(row)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data-root", help="folder that holds caltech101 (or $SEEWHY_DATA)")
    parser.add_argument("--images", type=int, default=2000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=2, help="of the fit where a stage is trained")
    parser.add_argument("--quick", action="store_true", help="demo images, one round")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        folder = "scenes"
        if not arguments.quick:
            from seewhy.data.image_set import open_images

            folder = str(Path(place) / "images")
            repeat_images(open_images("caltech101", arguments.data_root), arguments.images, Path(folder))
        ask(folder, arguments)


def ask(folder: str, arguments: argparse.Namespace) -> None:
    rows, raw = [], {}
    for label, (backbone, unfreeze) in list(WAYS.items())[: 1 if arguments.quick else None]:
        options = ["--backbone", backbone, "--unfreeze", unfreeze, "--views", "1", "--group-by", "exact"]
        options += ["--epochs", str(arguments.epochs), "--weights", "none"] if unfreeze != "0" else []
        found = compare([folder, *options], 1 if arguments.quick else arguments.rounds)
        raw[label] = found
        for name in (*STAGES, "whole command"):
            one, two = ([row[name] for row in found[devices]] for devices in (1, 2))
            more = statistics.median(b / a for a, b in zip(one, two, strict=True)) - 1
            rows.append(
                {
                    "training": label,
                    "stage": name,
                    "1 process, s": round(statistics.median(one), 1),
                    "2 processes, s": round(statistics.median(two), 1),
                    "more": f"{more:+.0%}",
                }
            )
        accuracies = {devices: statistics.median(row["accuracy"] for row in found[devices]) for devices in (1, 2)}
        rows.append(
            {
                "training": label,
                "stage": "test accuracy %",
                **{f"{d} process{'es' * (d > 1)}, s": f"{100 * a:.1f}" for d, a in accuracies.items()},
                "more": "–",
            }
        )
    if not arguments.quick:
        notes = [
            f"{arguments.images:,} images of Caltech-101, seed 0, 1 view, equal files kept together, {arguments.rounds} rounds "
            "A B A B; medians, and the median of the rounds' ratios.",
            "Two processes with a core each against one with two; the whole command has the start of Python and PyTorch in it, for two "
            "processes twice at once.",
            f"Cores: {os.cpu_count()}. On GPUs and several machines: not measured; none were at hand.",
        ]
        command = f"python benchmarks/processes.py --images {arguments.images} --rounds {arguments.rounds} --epochs {arguments.epochs}"
        record("processes", "Two processes on the cores of one", {"rows": rows, "raw": raw, "notes": notes, "command": command})
    print(json.dumps({"name": "processes", "rows": rows}))


if __name__ == "__main__":
    main()
