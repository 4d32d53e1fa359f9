"""What does it cost to keep frozen features in half precision?

    python benchmarks/precision.py --data-root DIR [--seeds 0 1 2]     Caltech-101, into results.json
    python benchmarks/precision.py --quick                             demo images, one JSON line

`efficientnet_lite0 --unfreeze 0` trained on the same images, splits and seeds with its features (vectors of 1,280 numbers) kept as
float32, the default, and as float16. The figures stand in RESULTS.md.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from common import record

KINDS = ("float32", "float16")


def trained(data: str, data_root: str | None, kind: str, seed: int, out: Path) -> dict[str, Any]:
    """Test logits and accuracies of one training, and the bytes an image and view takes in the store."""
    import seewhy

    options: dict[str, Any] = {"backbone": "efficientnet_lite0", "unfreeze": 0, "data_root": data_root, "seed": seed, "feature_dtype": kind}
    run = seewhy.train(data, out=out, **options)
    evaluation = run.evaluate()
    return {
        "accuracy": run.metrics["test"]["accuracy"],
        "mean per-class": run.metrics["test"]["mean_per_class_accuracy"],
        "predicted": evaluation.predicted,
        "probs": evaluation.probs,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data-root", help="folder that holds caltech101 (or $SEEWHY_DATA)")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--quick", action="store_true", help="demo images, one seed")
    arguments = parser.parse_args()
    data, seeds = ("scenes", [0]) if arguments.quick else ("caltech101", arguments.seeds)
    found: dict[str, list[dict[str, Any]]] = {kind: [] for kind in KINDS}
    with tempfile.TemporaryDirectory() as place:
        for seed in seeds:
            for kind, rows in found.items():
                rows.append(trained(data, arguments.data_root, kind, seed, Path(place, f"{kind}-{seed}")))
    pairs = list(zip(*found.values(), strict=True))
    same = statistics.mean(float(np.mean(a["predicted"] == b["predicted"])) for a, b in pairs)
    largest = max(float(np.abs(a["probs"] - b["probs"]).max()) for a, b in pairs)
    rows = [
        {
            "kept as": kind,
            "bytes an image and view": 1280 * np.dtype(kind).itemsize,
            "test accuracy %": _shown([row["accuracy"] for row in found[kind]]),
            "mean per-class %": _shown([row["mean per-class"] for row in found[kind]]),
        }
        for kind in KINDS
    ]
    if not arguments.quick:
        notes = [
            f"Caltech-101, efficientnet_lite0, classifier trained, seeds {' '.join(map(str, seeds))}, "
            f"{len(pairs[0][0]['predicted']):,} test images each; mean ± sample standard deviation. Of the answers {100 * same:.2f}% are "
            f"the same in both; no probability differs by more than {largest:.1e}.",
        ]
        command = f"python benchmarks/precision.py --seeds {' '.join(map(str, seeds))}"
        record("precision", "Frozen features in half precision", {"rows": rows, "notes": notes, "command": command}, timed=False)
    print(json.dumps({"name": "precision", "same": same, "largest": largest, "rows": rows}))


def _shown(values: list[float]) -> str:
    mean = f"{100 * statistics.mean(values):.2f}"
    return f"{mean} ± {100 * statistics.stdev(values):.2f}" if len(values) > 1 else mean


if __name__ == "__main__":
    main()
