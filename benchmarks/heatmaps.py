"""How many heatmaps a second, against pytorch-grad-cam, torch-cam and captum on the same network and pictures?

    python benchmarks/heatmaps.py [--rounds 7]     ResNet-18, batch 32, 101 classes, into results.json
    python benchmarks/heatmaps.py --quick          fewer rounds, one JSON line

Everybody starts from the same normalised batch and ends with maps of the size of the picture. seewhy runs the network on ONNX
Runtime, as `seewhy explain` does, and once in eager PyTorch like its peers. Weights are random: the work is the same.
All classes: peers need a backward pass for each; theirs is timed on 3 classes and multiplied.
The figures stand in RESULTS.md.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from common import interleave, matrix_limit, rates, ratio, record
from torch import Tensor, nn
from torch.nn import functional as F

CLASSES, BATCH, SIZE = 101, 32, 224
TIMED_CLASSES = 3  # of the peers' all-classes rows


def enlarge(maps: Tensor) -> Tensor:
    """(N, C, h, w) -> (N, C, SIZE, SIZE), bilinear."""
    return F.interpolate(maps, (SIZE, SIZE), mode="bilinear")


def ours(model: nn.Module, squares: Any, engine: str) -> dict[str, Callable[[], Any]]:
    """Our candidates, by row."""
    from seewhy.attribution import FeatureMaps, all_class_maps, maps_of_features
    from seewhy.backbones import create_backbone
    from seewhy.engines import make_engine

    preprocessing = create_backbone("resnet18", 2, "none").preprocessing
    forward = make_engine(FeatureMaps(model), preprocessing, len(squares), engine)

    def features() -> Tensor:
        return torch.from_numpy(forward(squares))

    def one_class(method: str) -> Tensor:
        maps, _, _ = maps_of_features(model, features(), method)
        return enlarge(maps[:, None])

    def forward_alone() -> Tensor:
        with torch.inference_mode():
            logits: Tensor = model.forward_head(features())  # type: ignore[operator]  # timm's
        return logits

    return {
        "forward alone": forward_alone,
        "gradcam, 1 class": lambda: one_class("gradcam"),
        "gradcam++, 1 class": lambda: one_class("gradcam++"),
        "gradcam, all classes": lambda: all_class_maps(model, features(), "gradcam"),
        "gradcam++, all classes": lambda: all_class_maps(model, features(), "gradcam++"),
    }


def grad_cam_peer(model: nn.Module, pictures: Tensor, method: str) -> Callable[[], Any]:
    from pytorch_grad_cam import GradCAM, GradCAMPlusPlus
    from pytorch_grad_cam.utils.model_targets import ClassifierOutputTarget

    extractor = {"gradcam": GradCAM, "gradcam++": GradCAMPlusPlus}[method](model=model, target_layers=[model.layer4])
    targets = [ClassifierOutputTarget(n % CLASSES) for n in range(len(pictures))]
    return lambda: extractor(input_tensor=pictures, targets=targets)


def torchcam_peer(model: nn.Module, pictures: Tensor, method: str) -> Callable[[], Any]:
    from torchcam.methods import GradCAM, GradCAMpp

    extractor = {"gradcam": GradCAM, "gradcam++": GradCAMpp}[method](model, "layer4")
    targets = [n % CLASSES for n in range(len(pictures))]

    def run() -> Tensor:
        maps: Tensor = extractor(targets, model(pictures))[0]
        return enlarge(maps[:, None])

    return run


def captum_peer(model: nn.Module, pictures: Tensor) -> Callable[[], Any]:
    from captum.attr import LayerGradCam

    extractor = LayerGradCam(model, model.layer4)
    targets = torch.arange(len(pictures)) % CLASSES
    return lambda: enlarge(extractor.attribute(pictures, target=targets, relu_attributions=True))


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--quick", action="store_true", help="fewer rounds")
    arguments = parser.parse_args()
    rounds = 2 if arguments.quick else arguments.rounds
    from timm import create_model

    from seewhy.backbones import create_backbone
    from seewhy.engines import FromSquares

    torch.manual_seed(0)

    def fresh() -> nn.Module:
        """A network of its own for each library: some leave hooks in it. The same weights by the same seed."""
        torch.manual_seed(0)
        network: nn.Module = create_model("resnet18", num_classes=CLASSES)
        return network.eval()

    squares = np.random.default_rng(0).integers(0, 256, (BATCH, SIZE, SIZE, 3), dtype=np.uint8)
    preprocessing = create_backbone("resnet18", 2, "none").preprocessing
    pictures = FromSquares(nn.Identity(), preprocessing)(torch.from_numpy(squares))
    onnx, eager = ours(fresh(), squares, "onnx"), ours(fresh(), squares, "torch")
    candidates: dict[str, Callable[[], Any]] = {}
    for method in ("gradcam", "gradcam++"):
        row = f"{method}, 1 class"
        candidates[f"seewhy | {row}"] = onnx[row]
        candidates[f"seewhy, eager | {row}"] = eager[row]
        candidates[f"pytorch-grad-cam | {row}"] = grad_cam_peer(fresh(), pictures, method)
        candidates[f"torch-cam | {row}"] = torchcam_peer(fresh(), pictures, method)
        if method == "gradcam":
            candidates[f"captum | {row}"] = captum_peer(fresh(), pictures)
        candidates[f"seewhy | {method}, all classes"] = onnx[f"{method}, all classes"]
        candidates[f"seewhy, eager | {method}, all classes"] = eager[f"{method}, all classes"]
    candidates["seewhy | forward alone"] = onnx["forward alone"]
    candidates["seewhy, eager | forward alone"] = eager["forward alone"]
    seconds = interleave(candidates, rounds)
    speed = rates(seconds, BATCH)
    ratios: dict[str, float] = {}
    for method in ("gradcam", "gradcam++"):
        row = f"{method}, 1 class"
        for peer in ("pytorch-grad-cam", "torch-cam", "captum"):
            if f"{peer} | {row}" in seconds:
                ratios[f"{peer} {method}"] = ratio(seconds, f"{peer} | {row}", f"seewhy | {row}")
        # Above 1 would mean faster than the forward pass alone; the goal is at least 1 / 1.05.
        ratios[f"forward alone, all classes {method}"] = ratio(seconds, "seewhy | forward alone", f"seewhy | {method}, all classes")
    answer = {"name": "heatmaps", "ratios": ratios, "pictures_per_s": speed, "n": BATCH, "rounds": rounds}
    if not arguments.quick:
        rows = []
        for name in candidates:
            library, row = name.split(" | ")
            peer_of = {f"{peer} {method}": value for (peer, method), value in ((k.rsplit(" ", 1), v) for k, v in ratios.items())}
            rows.append(
                {
                    "library": library,
                    "what": row,
                    "pictures/s": speed[name],
                    "maps/s": round(speed[name] * (CLASSES if "all" in row else "1 class" in row)) or "–",
                    "seewhy is ahead": peer_of.get(f"{library} {row.split(',')[0]}", "–"),
                }
            )
        notes = [
            f"ResNet-18, {BATCH} pictures of {SIZE} pixels, {CLASSES} classes, {rounds} interleaved rounds; medians, and the median of the "
            "rounds' ratios. Peers and 1-class rows give maps of the picture's size, all-classes rows maps of the network's.",
            f"A large float32 matrix product reached {matrix_limit():.0f} GFLOP/s in this run; the forward pass needs 3.6 GFLOP a picture.",
            "GPU: not measured.",
        ]
        command = f"python benchmarks/heatmaps.py --rounds {rounds}"
        record("heatmaps", "Heatmaps a second", {"rows": rows, "raw": {"ratios": ratios}, "notes": notes, "command": command})
    print(json.dumps(answer))


if __name__ == "__main__":
    main()
