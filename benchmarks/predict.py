"""How fast are answers: `predict` on files, against a plain timm loop?

    python benchmarks/predict.py --data-root DIR [--images 640] [--rounds 5] [--singles 200]     Caltech-101, into results.json
    python benchmarks/predict.py --quick                                                          demo images, one JSON line

Throughput: `run.predict` of a loaded run on many files. Latency: one file a call, the same run. Peer: timm's transform and the eager
network in inference mode, images in batches of 32 (one for latency) read by the same loop. The command row times all of
`seewhy predict RUN FOLDER --out answers.csv`, process start included. Random weights: the work is the same.
The figures stand in RESULTS.md.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import interleave, matrix_limit, measure, rates, ratio, record, seewhy
from torch import Tensor

BACKBONES = {"resnet18": "none", "efficientnet_lite0": None}  # name -> weights
CLASSES = 101


def saved_run(name: str, folder: Path) -> Any:
    """A run of random or package weights, saved and loaded as a trained one would be."""
    from seewhy.api import load
    from seewhy.config import make_config
    from seewhy.models.backbones import create_backbone
    from seewhy.models.saved_run import finish, make_manifest, save_weights

    backbone = create_backbone(name, CLASSES, BACKBONES[name])
    work = folder / f".{name}"
    work.mkdir(parents=True)
    save_weights(backbone, work)
    config = make_config(data="caltech101", backbone=name, weights=BACKBONES[name])
    classes = [f"class {n}" for n in range(CLASSES)]
    facts = {
        "metrics": {"test": {"accuracy": 0.0, "n": 1}},  # nothing was measured
        "data": {"hash": ""},
        "split": {"hash": ""},
        "calibration": {"temperature": 1.0, "selective": []},
    }
    finish(work, folder / name, make_manifest(config, classes, backbone, facts))
    return load(folder / name)


def plain_loop(run: Any, batch: int) -> Callable[[list[Path]], Any]:
    """What a user of timm writes."""
    import timm
    from PIL import Image

    model = timm.create_model(run.backbone.timm_name, num_classes=CLASSES).eval()
    model.load_state_dict(run.backbone.model.state_dict())
    data: Any = timm.data
    transform = data.create_transform(**data.resolve_model_data_config(model))

    @torch.inference_mode()
    def predict(paths: list[Path]) -> Tensor:
        answers = []
        for start in range(0, len(paths), batch):
            images = [transform(Image.open(path).convert("RGB")) for path in paths[start : start + batch]]
            answers.append(model(torch.stack(images)).softmax(dim=1))
        return torch.cat(answers)

    return predict


def latencies(work: dict[str, Callable[[list[Path]], Any]], paths: list[Path]) -> dict[str, list[float]]:
    """Seconds of each single image, the candidates taking turns."""
    seconds: dict[str, list[float]] = {name: [] for name in work}
    for n, path in enumerate([*paths[:5], *paths]):
        for name, call in work.items():
            began = time.perf_counter()
            call([path])
            if n >= 5:
                seconds[name].append(time.perf_counter() - began)
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data-root", help="folder that holds caltech101 (or $SEEWHY_DATA)")
    parser.add_argument("--images", type=int, default=640)
    parser.add_argument("--singles", type=int, default=200)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--quick", action="store_true", help="fewer images of the demo set")
    arguments = parser.parse_args()
    count, singles, rounds = (224, 30, 1) if arguments.quick else (arguments.images, arguments.singles, arguments.rounds)
    from seewhy.data.image_set import open_images

    rows: list[dict[str, Any]] = []
    ratios: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as place:
        os.environ["SEEWHY_CACHE"] = str(Path(place) / "cache")
        images = open_images("scenes" if arguments.quick else "caltech101", arguments.data_root)
        chosen = np.random.default_rng(0).permutation(len(images))[:count]
        paths = [images.paths[i] for i in chosen]
        folder = Path(place) / "images"
        folder.mkdir()
        for n, path in enumerate(paths):
            (folder / f"{n}{path.suffix}").symlink_to(path.resolve())
        for name in BACKBONES:
            run = saved_run(name, Path(place))
            many = {"seewhy": run.predict, "timm eager": plain_loop(run, 32)}
            seconds = interleave({library: partial(call, paths) for library, call in many.items()}, rounds)
            single = latencies({"seewhy": run.predict, "timm eager": plain_loop(run, 1)}, paths[:singles])
            speed = rates(seconds, count)
            command = measure(seewhy("predict", str(run.path), str(folder), "--out", str(Path(place) / f"{name}.csv"), "--json"))
            ratios[f"timm eager {name}"] = ratio(seconds, "timm eager", "seewhy")
            ratios[f"timm eager {name}, latency"] = ratio(single, "timm eager", "seewhy")
            for library in many:
                ours = library == "seewhy"
                p50, p99 = (f"{1000 * float(np.percentile(single[library], q)):.1f}" for q in (50, 99))
                rows.append(
                    {
                        "backbone": name,
                        "library": library,
                        "images/s": speed[library],
                        "p50 ms": p50,
                        "p99 ms": p99,
                        "whole command s": command["seconds"] if ours else "–",
                        "throughput over eager": ratios[f"timm eager {name}"] if ours else "–",
                        "latency: eager over seewhy": ratios[f"timm eager {name}, latency"] if ours else "–",
                    }
                )
        limit = "" if arguments.quick else f"{matrix_limit():.0f}"
    answer = {"name": "predict", "ratios": ratios, "rows": rows, "n": count, "rounds": rounds}
    if not arguments.quick:
        notes = [
            f"Throughput: {count} JPEG files of Caltech-101 a call, {rounds} interleaved rounds, medians. "
            f"Latency: {singles} calls of one file. "
            f"Whole command: the {count} files once, `seewhy predict` with process start, export at hand.",
            f"A large float32 matrix product reached {limit} GFLOP/s in this run (ResNet-18 needs 3.64 GFLOP an image, lite0 0.77).",
            "GPU: not measured.",
        ]
        text = f"python benchmarks/predict.py --images {count} --rounds {rounds} --singles {singles}"
        record(
            "predict",
            "Answers a second, and how long one takes",
            {"rows": rows, "raw": {"ratios": ratios}, "notes": notes, "command": text},
        )
    print(json.dumps(answer))


if __name__ == "__main__":
    main()
