"""How long does `make demo` take on a machine where everything is installed?

python benchmarks/demo.py [--runs 3]   whole command, each run with an empty cache, into results.json
python benchmarks/demo.py --quick      one run, one JSON line
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
from pathlib import Path

from common import measure, record, seewhy

COMMAND = ["train", "scenes", "--backbone", "efficientnet_lite0", "--unfreeze", "0"]  # what `make demo` runs


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--quick", action="store_true", help="one run")
    arguments = parser.parse_args()
    runs = []
    for _ in range(1 if arguments.quick else arguments.runs):
        with tempfile.TemporaryDirectory() as place:
            command = seewhy(*COMMAND, "--out", str(Path(place) / "demo"), "--json")
            runs.append(measure(command, {"SEEWHY_CACHE": str(Path(place) / "cache")}))
    seconds = [run["seconds"] for run in runs]
    answer = {
        "name": "demo",
        "seconds": round(statistics.median(seconds), 1),
        "test_accuracy": round(runs[0]["answer"]["metrics"]["test"]["accuracy"], 4),
        "n": runs[0]["answer"]["metrics"]["test"]["n"],
    }
    if not arguments.quick:
        row = {
            "what": "draw 480 images, extract, fit, measure, report",
            "median s": answer["seconds"],
            "least to most s": f"{min(seconds)} to {max(seconds)}",
            "runs": len(seconds),
            "peak GB": max(run["peak_gb"] for run in runs),
            "test accuracy %": round(100 * answer["test_accuracy"], 1),
            "test images": answer["n"],
        }
        command_text = f"python benchmarks/demo.py --runs {len(seconds)}"
        record(
            "demo", "Time of `make demo` with everything installed", {"rows": [row], "raw": {"seconds": seconds}, "command": command_text}
        )
    print(json.dumps(answer))


if __name__ == "__main__":
    main()
