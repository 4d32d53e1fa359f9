"""How many images a second become features, from JPEG files on disk, against timm with a DataLoader?

    python benchmarks/extraction.py --data-root DIR [--images 640] [--rounds 5]     Caltech-101, into results.json
    python benchmarks/extraction.py --quick                                           demo images, one JSON line

seewhy: `extract_features` with an empty cache, rows written to disk, one view and two. Peer: timm's own transform, a DataLoader with
two workers, the eager network in inference mode, features kept in memory. Limits: the engine on one batch in memory, all cores on
a batch after another, or as seewhy runs it, several batches side by side; and the images decoded and resized only.
Pooled features (what --unfreeze 0 needs). Weights are random or the package's: the work is the same. The figures stand in RESULTS.md.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import Files, interleave, matrix_limit, rates, ratio, record
from torch import Tensor
from torch.utils.data import DataLoader

BACKBONES = {"resnet18": "none", "efficientnet_lite0": None}  # name -> weights
LONGER = {"resnet18": 1, "efficientnet_lite0": 3}  # times as many images for the faster network, so that its start counts as little
ONE_BY_ONE = "limit: the engine alone, a batch after another"
GFLOP = {"resnet18": 3.64, "efficientnet_lite0": 0.77}  # of one forward pass at 224 pixels


def eager_peer(timm_name: str, paths: list[Path]) -> Callable[[], Any]:
    import timm

    model = timm.create_model(timm_name, num_classes=0).eval()
    data: Any = timm.data
    transform = data.create_transform(**data.resolve_model_data_config(model))
    loader = DataLoader(Files(paths, [0] * len(paths), transform), 32, num_workers=2)

    @torch.inference_mode()
    def run() -> Tensor:
        return torch.cat([model(batch) for batch, _ in loader])

    return run


def candidates_of(name: str, images: Any, indices: Any, count: int, cache: Path) -> dict[str, Callable[[], Any]]:
    """seewhy and the limits on all of `indices`, the peer on the first `count`."""
    from seewhy.core.parallel import map_ordered
    from seewhy.data.decode import read_image
    from seewhy.models.backbones import create_backbone
    from seewhy.models.executors import Executor, make_executor
    from seewhy.models.features import FeatureSpec, extract_features, render_view
    from seewhy.models.trunk_tail import split_backbone

    backbone = create_backbone(name, 2, BACKBONES[name])
    cut = split_backbone(backbone, 0)
    assert cut.trunk is not None
    one_by_one, side_by_side = (make_executor(cut.trunk, backbone.preprocessing, number, "onnx") for number in (1, 1000))
    size = backbone.preprocessing.size
    squares = np.random.default_rng(0).integers(0, 256, (32, size, size, 3), dtype=np.uint8)

    def extract(views: int) -> Callable[[], Any]:
        def run() -> None:
            shutil.rmtree(cache / "features", ignore_errors=True)
            extract_features(images, indices[: len(indices) // views], views, cut, backbone.preprocessing, FeatureSpec("onnx"))

        return run

    def decode(i: int) -> Any:
        return render_view(read_image(images.paths[i], backbone.preprocessing.min_decode_side), 0, images.hashes[i], backbone.preprocessing)

    def limit(engine: Executor) -> Callable[[], Any]:
        return lambda: list(map_ordered(engine, [squares] * (len(indices) // 32), engine.max_parallel_batches))

    return {
        f"{name} | timm eager, DataLoader": eager_peer(backbone.timm_name, [images.paths[i] for i in indices[:count]]),
        f"{name} | seewhy, 1 view": extract(1),
        f"{name} | seewhy, 2 views": extract(2),
        f"{name} | {ONE_BY_ONE}": limit(one_by_one),
        f"{name} | limit: the engine alone, batches side by side": limit(side_by_side),
        f"{name} | limit: decoding and resizing alone": lambda: list(map_ordered(decode, indices, 2)),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data-root", help="folder that holds caltech101 (or $SEEWHY_DATA)")
    parser.add_argument("--images", type=int, default=640)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--quick", action="store_true", help="fewer images of the demo set")
    arguments = parser.parse_args()
    count, rounds = (64, 2) if arguments.quick else (arguments.images // 64 * 64, arguments.rounds)
    from seewhy.data.image_set import open_images

    with tempfile.TemporaryDirectory() as cache:
        os.environ["SEEWHY_CACHE"] = cache
        images = open_images("scenes" if arguments.quick else "caltech101", arguments.data_root)
        chosen = np.random.default_rng(0).permutation(len(images))
        candidates: dict[str, Callable[[], Any]] = {}
        for name, times in LONGER.items():
            candidates |= candidates_of(name, images, chosen[: times * count], count, Path(cache))
        seconds = interleave(candidates, rounds)
    for key, taken in seconds.items():  # for `count` images
        seconds[key] = [t / (1 if "timm" in key else LONGER[key.split(" | ")[0]]) for t in taken]
    speed = rates(seconds, count)
    ratios: dict[str, float] = {}
    rows = []
    for key in candidates:
        name, what = key.split(" | ")
        eager, limit = f"{name} | timm eager, DataLoader", f"{name} | {ONE_BY_ONE}"
        row = {"backbone": name, "what": what, "images/s": speed[key], "over eager": "–", "over the engine, a batch after another": "–"}
        if "seewhy" in what:
            row["over eager"] = ratios[f"timm eager {name}, {what}"] = ratio(seconds, eager, key)
            row["over the engine, a batch after another"] = ratios[f"engine alone {name}, {what}"] = ratio(seconds, limit, key)
        rows.append(row)
    answer = {"name": "extraction", "ratios": ratios, "images_per_s": speed, "n": count, "rounds": rounds}
    if not arguments.quick:
        product = matrix_limit()
        at_most = ", ".join(f"{product / flop:.0f} {name}" for name, flop in GFLOP.items())
        notes = [
            f"{count} JPEG files of Caltech-101 (lite0: {LONGER['efficientnet_lite0']} times as many, but for the peer; 2 views: half as "
            f"many files, as many images), batch 32, {rounds} interleaved rounds; medians, and the median of the rounds' ratios.",
            f"A large float32 matrix product reached {product:.0f} GFLOP/s in this run: at that rate {at_most} forward passes a second.",
            "GPU: not measured.",
        ]
        command = f"python benchmarks/extraction.py --images {count} --rounds {rounds}"
        record("extraction", "From image files to features", {"rows": rows, "raw": {"ratios": ratios}, "notes": notes, "command": command})
    print(json.dumps(answer))


if __name__ == "__main__":
    main()
