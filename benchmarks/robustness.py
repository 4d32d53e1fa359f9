"""How much accuracy is left on blurred, noisy, badly compressed, lit or turned images?

    python benchmarks/robustness.py --data-root DIR --weights FILE [--images 300]     Caltech-101, into results.json
    python benchmarks/robustness.py --quick                                             demo set, two corruptions, one JSON line

Both named backbones with their classifier trained (`--unfreeze 0`), on test images; what `seewhy robustness RUN` measures.
The figures stand in RESULTS.md.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

from common import record

BACKBONES = ("efficientnet_lite0", "resnet18")


def measure(data: str, name: str, options: dict[str, Any], images: int, names: list[str] | None) -> Any:
    """The table of one backbone."""
    import seewhy
    from seewhy.evaluation.robustness import run_robustness

    with tempfile.TemporaryDirectory() as place:
        run = seewhy.train(data, out=Path(place) / "run", backbone=name, unfreeze=0, **options)
        return run_robustness(run, images, names)[0]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data-root", help="folder that holds caltech101 (or $SEEWHY_DATA)")
    parser.add_argument("--weights", help="weights file for resnet18, where timm's cannot be fetched")
    parser.add_argument("--images", type=int, default=300)
    parser.add_argument("--quick", action="store_true", help="lite0 on the demo set, two corruptions")
    arguments = parser.parse_args()
    if arguments.quick:
        table = measure("scenes", "efficientnet_lite0", {}, 32, ["blur", "jpeg"])
        left = {name: round(float(rows["accuracy"].mean()), 3) for name, rows in table.groupby("corruption")}
        print(json.dumps({"name": "robustness", "mean_accuracy": left, "n": 32}))
        return
    rows, raw = [], {}
    for name in BACKBONES:
        options: dict[str, Any] = {"data_root": arguments.data_root}
        if name == "resnet18" and arguments.weights:
            options["weights"] = arguments.weights
        table = measure("caltech101", name, options, arguments.images, None)
        raw[name] = table.to_dict("records")
        plain = table[table["strength"] == 0].iloc[0]
        for corruption, found in table[table["strength"] > 0].groupby("corruption", sort=False):
            by_strength = {f"strength {row.strength}": f"{100 * row.accuracy:.0f}" for row in found.itertuples()}
            rows.append({"backbone": name, "corruption": corruption, "plain %": f"{100 * plain['accuracy']:.1f}", **by_strength})
    half = 100 * float(table["high"].sub(table["low"]).max()) / 2
    notes = [
        f"Accuracy in % on {arguments.images} test images (seed 0), classifier trained; 95% intervals are ± {half:.0f} points "
        "at most. Strengths are ImageNet-C's (arXiv:1903.12261) for blur, noise, JPEG and brightness, see evaluation/corruptions.py.",
        "resnet18 with the stand-in weights where --weights was given: read its row with care.",
    ]
    command = f"python benchmarks/robustness.py --images {arguments.images}"
    record("robustness", "Corrupted images", {"rows": rows, "raw": raw, "notes": notes, "command": command}, timed=False)
    print(json.dumps({"name": "robustness", "rows": rows}))


if __name__ == "__main__":
    main()
