"""What runs a frozen trunk fastest on this CPU, and what does 8-bit arithmetic cost in accuracy?

    python benchmarks/engines.py --data-root DIR [--rounds 5] [--pictures 3000]     Caltech-101, into results.json
    python benchmarks/engines.py --quick                                            demo pictures, lite0, one JSON line

Every candidate runs the same trunk (pooled features, what --unfreeze 0 needs) on one batch of 32 in memory. Eager PyTorch, plain
and in channels_last; torch.compile with frozen weights; ONNX Runtime with all cores on a batch, and with batches side by side, as seewhy
extracts (these three fold BatchNorm into the convolutions); ONNX Runtime in 8 bits (static, per channel, calibrated on training data).
Accuracy: scikit-learn's logistic regression on the features of each arithmetic, fitted to the training part, C chosen on val, measured on
test; 8 bits would be offered by name if they were faster and within 0.3 points. The figures stand in RESULTS.md.
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
AT_ONCE = f"ONNX Runtime, batches side by side, {BATCH} pictures at once"
SIDE_BY_SIDE, EIGHT_BITS = "ONNX Runtime, batches side by side, 4 pictures at once (seewhy)", "ONNX Runtime, 8 bits, the same way"
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


def eight_bits(network: nn.Module, size: int, calibration: Any, lanes: int) -> Any:
    """An engine with quantised convolutions and products."""
    import onnx
    import onnxruntime

    from seewhy import portable
    from seewhy.engines import IN_CACHE, Engine, _exported

    model = portable.eight_bits(onnx.load_from_string(_exported(network, size)), calibration)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = max(1, torch.get_num_threads() // lanes)
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    return Engine(lambda squares: session.run(None, {name: squares})[0], lanes, IN_CACHE)


def square_of(images: Any, i: int, preprocessing: Any) -> Any:
    """The evaluation view of one picture."""
    from seewhy.decoding import read_image
    from seewhy.features import render_view

    return render_view(read_image(images.paths[i], preprocessing.enough), 0, images.hashes[i], preprocessing)


def pooled(engine: Any, images: Any, indices: Any, preprocessing: Any) -> Any:
    """(N, K) features of the evaluation views."""
    from seewhy.streams import in_batches, in_order

    squares = in_order(lambda i: square_of(images, i, preprocessing), indices, 2)
    batches = in_batches(squares, BATCH)
    return np.concatenate(list(in_order(lambda batch: engine(np.stack(batch)), batches, engine.lanes, ahead=engine.lanes)))


def linear_accuracy(features: dict[str, Any], labels: dict[str, Any]) -> float:
    """Test accuracy of a logistic regression; its C is the best on val."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    fits = [make_pipeline(StandardScaler(), LogisticRegression(C=c, max_iter=300)) for c in (0.003, 0.01, 0.03)]
    best = max((fit.fit(features["train"], labels["train"]) for fit in fits), key=lambda fit: fit.score(features["val"], labels["val"]))
    return float(best.score(features["test"], labels["test"]))


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data-root", help="folder that holds caltech101 (or $SEEWHY_DATA)")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--pictures", type=int, default=3000, help="pictures of the accuracy comparison, of all classes")
    parser.add_argument("--quick", action="store_true", help="lite0 on the demo set, without torch.compile")
    arguments = parser.parse_args()
    from seewhy.backbones import create_backbone
    from seewhy.cutting import cut_backbone
    from seewhy.engines import FromSquares, make_engine
    from seewhy.images import open_images
    from seewhy.split import split_images
    from seewhy.streams import in_order

    names = ["efficientnet_lite0"] if arguments.quick else ["resnet18", "efficientnet_lite0"]
    rounds = 2 if arguments.quick else arguments.rounds
    rows: list[dict[str, Any]] = []
    ratios: dict[str, float] = {}
    accuracies: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as cache:
        os.environ["SEEWHY_CACHE"] = cache
        images = open_images("scenes" if arguments.quick else "caltech101", arguments.data_root)
        split = split_images(images, seed=0)
        for name in names:
            backbone = create_backbone(name, 2, "none" if name == "resnet18" else None)
            trunk, preprocessing = cut_backbone(backbone, 0).trunk, backbone.preprocessing
            assert trunk is not None
            network = FromSquares(trunk, preprocessing).eval()
            size = preprocessing.size
            squares = np.random.default_rng(0).integers(0, 256, (BATCH, size, size, 3), dtype=np.uint8)
            one, many = (make_engine(trunk, preprocessing, pictures, "onnx") for pictures in (1, 1000))
            calibration = np.stack([square_of(images, i, preprocessing) for i in split.train[:: len(split.train) // 64][:64]])
            small = eight_bits(network, size, calibration, many.lanes)
            start: dict[str, float] = {}
            candidates: dict[str, Trunk] = {"eager PyTorch": eager(network)}
            candidates["eager, channels_last"] = eager(copy.deepcopy(network).to(memory_format=torch.channels_last))
            if not arguments.quick:
                label = "torch.compile, frozen weights"
                candidates[label], start[label] = compiled(network, squares)
            at_once = replace(many, batch=None)
            candidates |= {"ONNX Runtime, all cores on a batch": one, AT_ONCE: at_once, SIDE_BY_SIDE: many, EIGHT_BITS: small}
            work = {label: _two_batches(run, squares, in_order) for label, run in candidates.items()}
            seconds = interleave(work, rounds)
            speed = rates(seconds, 2 * BATCH)
            for label in candidates:
                ahead = ratio(seconds, "eager PyTorch", label)
                ratios[f"eager over {label}, {name}"] = ahead
                begin = f"{start[label]:.0f}" if label in start else "–"
                rows.append({"backbone": name, "engine": label, "pictures/s": speed[label], "over eager": ahead, "s before": begin})
            if name == "efficientnet_lite0":  # resnet18's weights are random here
                share = min(1.0, (160 if arguments.quick else arguments.pictures) / len(images))
                parts = {part: getattr(split, part)[:: max(1, round(1 / share))] for part in ("train", "val", "test")}
                labels = {part: images.labels[chosen] for part, chosen in parts.items()}
                for label, engine in (("float32", many), ("8 bits", small)):
                    features = {part: pooled(engine, images, chosen, preprocessing) for part, chosen in parts.items()}
                    accuracies[label] = linear_accuracy(features, labels)
                accuracies["n_test"] = len(parts["test"])
    answer = {"name": "engines", "ratios": ratios, "accuracy": accuracies, "rounds": rounds}
    if not arguments.quick:
        notes = [
            f"Batches of {BATCH} at the network's size, {rounds} interleaved rounds of two batches; medians, and the median of the rounds' "
            "ratios. s before: what the first answer waits for (an ONNX export takes about 8 s once, then lies in the cache).",
            f"8 bits, efficientnet_lite0: test accuracy {accuracies['8 bits']:.1%} against {accuracies['float32']:.1%} in float32 "
            f"(logistic regression on the features, seed 0, every {max(1, round(len(images) / arguments.pictures))}rd picture, n = "
            f"{accuracies['n_test']}).",
            f"A large float32 matrix product reached {matrix_limit():.0f} GFLOP/s in this run.",
            "GPU: not measured.",
        ]
        command = f"python benchmarks/engines.py --rounds {rounds} --pictures {arguments.pictures}"
        raw = {"ratios": ratios, "accuracy": accuracies}
        record("engines", "Engines for a frozen trunk, and 8 bits", {"rows": rows, "raw": raw, "notes": notes, "command": command})
    print(json.dumps(answer))


def _two_batches(run: Trunk, squares: Any, in_order: Any) -> Callable[[], Any]:
    lanes = getattr(run, "lanes", 1)
    return lambda: list(in_order(run, [squares, squares], lanes))


if __name__ == "__main__":
    main()
