"""Does an exported file say what its run says?

    python benchmarks/export.py --data-root DIR --weights FILE     Caltech-101, both named backbones, into results.json
    python benchmarks/export.py --quick                            demo images, lite0, one JSON line

Frozen networks are trained, exported as each kind of file, and compared with their runs on all test images, from image files to
answers. Milliseconds: median of an answer on one core, reading and decoding included. The figures stand in RESULTS.md.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

from common import record

KINDS = {"onnx": "ONNX", "pt2": "torch.export, eager PyTorch"}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data-root", help="folder that holds caltech101 (or $SEEWHY_DATA)")
    parser.add_argument("--weights", help="weights file for resnet18, where timm's cannot be fetched")
    parser.add_argument("--quick", action="store_true", help="demo images, efficientnet_lite0")
    arguments = parser.parse_args()
    from seewhy.cli.main import train_from_arguments
    from seewhy.deploy.export import export_file

    data = "scenes" if arguments.quick else "caltech101"
    root = ["--data-root", arguments.data_root] if arguments.data_root else []
    weights = {"efficientnet_lite0": [], "resnet18": ["--weights", arguments.weights] if arguments.weights else []}
    rows: list[dict[str, Any]] = []
    raw: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as place:
        for backbone in ["efficientnet_lite0"] if arguments.quick else list(weights):
            options = ["--backbone", backbone, "--unfreeze", "0", *root, *weights[backbone]]
            run = train_from_arguments([data, *options, "--out", f"{place}/{backbone}"])
            for kind, name in KINDS.items():
                file, parity = export_file(run, Path(place) / f"{backbone}.{kind}", kind, 10_000)
                assert parity is not None
                raw[f"{backbone} {kind}"] = vars(parity)
                rows.append(
                    {
                        "backbone": backbone,
                        "file": name,
                        "MB": f"{file.stat().st_size / 1e6:.1f}",
                        "n": parity.n,
                        "equal top-1 %": f"{100 * parity.same_class:.2f}",
                        "largest probability difference": f"{parity.max_difference:.1e}",
                        "heatmap correlation, mean (least)": f"{parity.correlation_mean:.5f} ({parity.correlation_min:.5f})",
                        "accuracy % (run's)": f"{100 * parity.accuracy:.1f} ({100 * parity.run_accuracy:.1f})",
                        "ms an image, one core": f"{parity.milliseconds:.1f}",
                    }
                )
    ratios = {
        kind: round(raw[f"{rows[0]['backbone']} onnx"]["milliseconds"] / raw[f"{rows[0]['backbone']} {kind}"]["milliseconds"], 2)
        for kind in KINDS
    }
    if not arguments.quick:
        notes = ["Caltech-101, seed 0, frozen backbones. A file is not written by `seewhy export` where it differs by more than 1e-4."]
        command = "python benchmarks/export.py --data-root DIR --weights FILE"
        record("export", "Exported files beside their runs", {"rows": rows, "raw": raw, "notes": notes, "command": command})
    print(json.dumps({"name": "export", "ratios": ratios}))


if __name__ == "__main__":
    main()
