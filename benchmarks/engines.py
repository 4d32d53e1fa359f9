"""What runs a frozen trunk fastest on this CPU?

    python benchmarks/engines.py [--rounds 5]     into results.json
    python benchmarks/engines.py --quick          lite0, one JSON line

Every candidate runs the same trunk (pooled features, what --unfreeze 0 needs) on one batch of 32 in memory. Eager PyTorch, plain
and in channels_last; torch.compile with frozen weights; ONNX Runtime with all cores on a batch, and with batches side by side, as seewhy
extracts (these three fold BatchNorm into the convolutions). The figures stand in RESULTS.md.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from common import interleave, matrix_limit, rates, ratio, record
from torch import nn

BATCH = 32
AT_ONCE = f"ONNX Runtime, batches side by side, {BATCH} images at once"
SIDE_BY_SIDE = "ONNX Runtime, batches side by side, 4 images at once (seewhy)"
Trunk = Callable[[Any], Any]


def eager(network: nn.Module) -> Trunk:
    def run(squares: Any) -> Any:
        with torch.inference_mode():
            return network(torch.from_numpy(squares)).numpy()

    return run


def compiled(network: nn.Module, squares: Any) -> tuple[Trunk, float]:
    """torch.compile with frozen weights, and the seconds it needs before the first answer."""
    import torch._inductor.config

    torch._inductor.config.freezing = True
    run = eager(torch.compile(network))  # type: ignore[arg-type]  # a compiled module is a callable like it
    began = time.perf_counter()
    run(squares)
    return run, time.perf_counter() - began


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--quick", action="store_true", help="lite0 alone, without torch.compile")
    arguments = parser.parse_args()
    from seewhy.core.parallel import map_ordered
    from seewhy.models.backbones import create_backbone
    from seewhy.models.executors import NormalizeInput, make_executor
    from seewhy.models.trunk_tail import split_backbone

    names = ["efficientnet_lite0"] if arguments.quick else ["resnet18", "efficientnet_lite0"]
    rounds = 2 if arguments.quick else arguments.rounds
    rows: list[dict[str, Any]] = []
    ratios: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as cache:
        os.environ["SEEWHY_CACHE"] = cache
        for name in names:
            backbone = create_backbone(name, 2, "none" if name == "resnet18" else None)
            trunk, preprocessing = split_backbone(backbone, 0).trunk, backbone.preprocessing
            assert trunk is not None
            network = NormalizeInput(trunk, preprocessing).eval()
            size = preprocessing.size
            squares = np.random.default_rng(0).integers(0, 256, (BATCH, size, size, 3), dtype=np.uint8)
            one, many = (make_executor(trunk, preprocessing, images, "onnx") for images in (1, 1000))
            start: dict[str, float] = {}
            candidates: dict[str, Trunk] = {"eager PyTorch": eager(network)}
            candidates["eager, channels_last"] = eager(copy.deepcopy(network).to(memory_format=torch.channels_last))
            if not arguments.quick:
                label = "torch.compile, frozen weights"
                candidates[label], start[label] = compiled(network, squares)
            at_once = replace(many, batch=None)
            candidates |= {"ONNX Runtime, all cores on a batch": one, AT_ONCE: at_once, SIDE_BY_SIDE: many}
            work = {label: _two_batches(run, squares, map_ordered) for label, run in candidates.items()}
            seconds = interleave(work, rounds)
            speed = rates(seconds, 2 * BATCH)
            for label in candidates:
                ahead = ratio(seconds, "eager PyTorch", label)
                ratios[f"eager over {label}, {name}"] = ahead
                begin = f"{start[label]:.0f}" if label in start else "–"
                rows.append({"backbone": name, "engine": label, "images/s": speed[label], "over eager": ahead, "s before": begin})
    answer = {"name": "engines", "ratios": ratios, "rounds": rounds}
    if not arguments.quick:
        notes = [
            f"Batches of {BATCH} at the network's size, {rounds} interleaved rounds of two batches; medians, and the median of the rounds' "
            "ratios. s before: what the first answer waits for (an ONNX export takes about 8 s once, then lies in the cache).",
            f"A large float32 matrix product reached {matrix_limit():.0f} GFLOP/s in this run.",
            "GPU: not measured.",
        ]
        command = f"python benchmarks/engines.py --rounds {rounds}"
        record("engines", "Engines for a frozen trunk", {"rows": rows, "raw": {"ratios": ratios}, "notes": notes, "command": command})
    print(json.dumps(answer))


def _two_batches(run: Trunk, squares: Any, map_ordered: Any) -> Callable[[], Any]:
    max_parallel_batches = getattr(run, "lanes", 1)
    return lambda: list(map_ordered(run, [squares, squares], max_parallel_batches))


if __name__ == "__main__":
    main()
