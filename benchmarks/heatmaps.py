"""How many heatmaps a second, against pytorch-grad-cam, torch-cam and captum on the same network and images?

    python benchmarks/heatmaps.py [--rounds 7]     ResNet-18 and EfficientNet-Lite0, batch 32, 101 classes, into results.json
    python benchmarks/heatmaps.py --quick          ResNet-18, fewer rounds, one JSON line

Everybody starts from the same normalised batch and ends with maps of the size of the image. seewhy runs the network on ONNX
Runtime, as `seewhy explain` does, and once in eager PyTorch like its peers. Weights are random: the work is the same.
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
LAYERS = {"resnet18": "layer4", "efficientnet_lite0": "bn2"}  # whose output the pooling reads


def enlarge(maps: Tensor) -> Tensor:
    """(N, C, h, w) -> (N, C, SIZE, SIZE), bilinear."""
    return F.interpolate(maps, (SIZE, SIZE), mode="bilinear")


def ours(model: nn.Module, preprocessing: Any, squares: Any, engine: str) -> dict[str, Callable[[], Any]]:
    """Our candidates, by row."""
    from seewhy.explain.attribution import FeatureMaps, maps_from_features
    from seewhy.explain.cam import gradcam_all_classes
    from seewhy.models.executors import make_executor

    forward = make_executor(FeatureMaps(model), preprocessing, len(squares), engine)

    def features() -> Tensor:
        return torch.from_numpy(forward(squares))

    def one_class(method: str) -> Tensor:
        maps, _, _ = maps_from_features(model, features(), method)
        return enlarge(maps[:, None])

    def all_classes() -> tuple[Tensor, Tensor]:
        maps = features()
        with torch.inference_mode():
            return model.forward_head(maps), gradcam_all_classes(model.get_classifier().weight, maps)  # type: ignore[operator]  # timm's

    def forward_alone() -> Tensor:
        with torch.inference_mode():
            logits: Tensor = model.forward_head(features())  # type: ignore[operator]  # timm's
        return logits

    return {
        "forward alone": forward_alone,
        "gradcam, 1 class": lambda: one_class("gradcam"),
        "gradcam++, 1 class": lambda: one_class("gradcam++"),
        "gradcam, all classes": all_classes,
    }


def grad_cam_peer(model: nn.Module, layer: str, images: Tensor, method: str) -> Callable[[], Any]:
    from pytorch_grad_cam import GradCAM, GradCAMPlusPlus
    from pytorch_grad_cam.utils.model_targets import ClassifierOutputTarget

    extractor = {"gradcam": GradCAM, "gradcam++": GradCAMPlusPlus}[method](model=model, target_layers=[model.get_submodule(layer)])
    targets = [ClassifierOutputTarget(n % CLASSES) for n in range(len(images))]
    return lambda: extractor(input_tensor=images, targets=targets)


def torchcam_peer(model: nn.Module, layer: str, images: Tensor, method: str) -> Callable[[], Any]:
    from torchcam.methods import GradCAM, GradCAMpp

    extractor = {"gradcam": GradCAM, "gradcam++": GradCAMpp}[method](model, layer)
    targets = [n % CLASSES for n in range(len(images))]

    def run() -> Tensor:
        maps: Tensor = extractor(targets, model(images))[0]
        return enlarge(maps[:, None])

    return run


def captum_peer(model: nn.Module, layer: str, images: Tensor) -> Callable[[], Any]:
    from captum.attr import LayerGradCam

    extractor = LayerGradCam(model, model.get_submodule(layer))
    targets = torch.arange(len(images)) % CLASSES
    return lambda: enlarge(extractor.attribute(images, target=targets, relu_attributions=True))


def measure(name: str, rounds: int) -> tuple[list[dict[str, Any]], dict[str, float]]:
    """The rows of one backbone, and how far ahead of each peer."""
    from seewhy.models.backbones import create_backbone
    from seewhy.models.executors import NormalizeInput

    def fresh() -> nn.Module:
        """A network of its own for each library: some leave hooks in it. The same weights by the same seed."""
        torch.manual_seed(0)
        return create_backbone(name, CLASSES, "none").model.eval()

    squares = np.random.default_rng(0).integers(0, 256, (BATCH, SIZE, SIZE, 3), dtype=np.uint8)
    preprocessing = create_backbone(name, 2, "none").preprocessing
    images = NormalizeInput(nn.Identity(), preprocessing)(torch.from_numpy(squares))
    onnx, eager = (ours(fresh(), preprocessing, squares, engine) for engine in ("onnx", "torch"))
    candidates: dict[str, Callable[[], Any]] = {}
    for method in ("gradcam", "gradcam++"):
        row = f"{method}, 1 class"
        candidates[f"seewhy | {row}"] = onnx[row]
        candidates[f"seewhy, eager | {row}"] = eager[row]
        candidates[f"pytorch-grad-cam | {row}"] = grad_cam_peer(fresh(), LAYERS[name], images, method)
        candidates[f"torch-cam | {row}"] = torchcam_peer(fresh(), LAYERS[name], images, method)
        if method == "gradcam":
            candidates[f"captum | {row}"] = captum_peer(fresh(), LAYERS[name], images)
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
                ratios[f"{peer} {method} {name}"] = ratio(seconds, f"{peer} | {row}", f"seewhy | {row}")
    # Above 1 would mean faster than the forward pass alone; the goal is at least 1 / 1.05.
    ratios[f"forward alone, all classes gradcam {name}"] = ratio(seconds, "seewhy | forward alone", "seewhy | gradcam, all classes")
    rows = []
    for candidate in candidates:
        library, row = candidate.split(" | ")
        rows.append(
            {
                "backbone": name,
                "library": library,
                "what": row,
                "images/s": speed[candidate],
                "maps/s": round(speed[candidate] * (CLASSES if "all" in row else "1 class" in row)) or "–",
                "seewhy is ahead": ratios.get(f"{library} {row.split(',')[0]} {name}", "–"),
            }
        )
    return rows, ratios


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--quick", action="store_true", help="ResNet-18, fewer rounds")
    arguments = parser.parse_args()
    rounds = 2 if arguments.quick else arguments.rounds
    rows: list[dict[str, Any]] = []
    ratios: dict[str, float] = {}
    for name in ["resnet18"] if arguments.quick else LAYERS:
        found, ahead = measure(name, rounds)
        rows += found
        ratios |= ahead
    if not arguments.quick:
        notes = [
            f"Batches of {BATCH} images of {SIZE} pixels, {CLASSES} classes, {rounds} interleaved rounds; medians, and the median of the "
            "rounds' ratios. Peers and 1-class rows give maps of the image's size, all-classes rows maps of the network's.",
            "Behind a last layer that average pooling reads, a map costs the forward pass and next to nothing: for ResNet-18, where eager "
            "PyTorch is nearly as fast as ONNX Runtime on this processor, captum and torch-cam can be at most that little behind.",
            f"A large float32 matrix product reached {matrix_limit():.0f} GFLOP/s in this run; the forward pass needs 3.6 GFLOP an image "
            "(ResNet-18) or 0.77 (EfficientNet-Lite0).",
            "GPU: not measured.",
        ]
        command = f"python benchmarks/heatmaps.py --rounds {rounds}"
        record("heatmaps", "Heatmaps a second", {"rows": rows, "raw": {"ratios": ratios}, "notes": notes, "command": command})
    print(json.dumps({"name": "heatmaps", "ratios": ratios, "rows": rows, "n": BATCH, "rounds": rounds}))


if __name__ == "__main__":
    main()
