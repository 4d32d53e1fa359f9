"""Run -> one graph, in ONNX or for PyTorch: any RGB images in; probabilities, ood_score and all-class heatmaps out."""

from __future__ import annotations

import base64
import io
import json
from typing import Any, cast

import onnx
import torch
from onnx import compose, helper
from torch import Tensor, nn
from torch.nn import functional as F

from seewhy.deploy.onnx_preprocess import IR, OPSET, square_graph
from seewhy.errors import ConfigError
from seewhy.explain.attribution import feature_maps, linear_head
from seewhy.explain.cam import gradcam_all_classes
from seewhy.inference.onnx_model import FORMAT
from seewhy.models.ood import NEIGHBOURS, KNNReference
from seewhy.models.saved_run import SavedRun
from seewhy.models.transforms import Normalize, Preprocessing


class AnswerNetwork(nn.Module):
    """(N, 3, S, S) uint8 -> what a run answers, in the order of `names`, as one graph.

    logits: (N, C). probabilities: (N, C), calibrated. ood_score: (N,), where the run tells unknown images.
    heatmaps: (N, C, h, w), Grad-CAM of every class, each scaled to a maximum of 1; where the head has a closed form.
    """

    def __init__(self, run: SavedRun) -> None:
        super().__init__()
        preprocessing, self.model = run.backbone.preprocessing, run.backbone.model
        self.normalize = Normalize(preprocessing)
        self.temperature, self.flip = run.temperature, bool(run.config.tta_flip)
        self.vectors = run.references is not None
        if self.vectors:
            references = cast(KNNReference, run.references)
            self.register_buffer("centre", torch.from_numpy(references.centre))
            self.register_buffer("unit_features", torch.from_numpy(references.unit_features))  # half precision, widened when run
        self.weight = _map_weight(run)
        self.names = (
            "logits",
            "probabilities",
            *(["ood_score"] if self.vectors else []),
            *(["heatmaps"] if self.weight is not None else []),
        )

    def _way(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        model = cast(Any, self.model)
        features = feature_maps(self.model, images)
        if not self.vectors:
            return model.forward_head(features), features, features
        vector = model.forward_head(features, pre_logits=True)
        return model.get_classifier()(vector), features, vector

    def forward(self, squares: Tensor) -> tuple[Tensor, ...]:
        images = self.normalize(squares)
        logits, features, vector = self._way(images)
        maps = gradcam_all_classes(self.weight, features) if self.weight is not None else None
        if self.flip:  # the mean over both directions, as `predict` and `explain` have it
            other, mirrored, _ = self._way(images.flip(3))
            logits = (logits + other) / 2
            if maps is not None:
                maps = (maps + gradcam_all_classes(cast(Tensor, self.weight), mirrored).flip(3)) / 2
        found = [logits, (logits / self.temperature).softmax(dim=1)]
        if self.vectors:
            away = vector - cast(Tensor, self.centre)
            alike = (away / away.norm(dim=1, keepdim=True).clamp(min=1e-12)) @ cast(Tensor, self.unit_features).float().T
            nearest = min(NEIGHBOURS, alike.shape[1])
            found.append(1 - alike.topk(nearest, dim=1).values[:, -1])
        if maps is not None:
            peak = maps.amax(dim=(2, 3), keepdim=True)
            found.append(maps / peak.clamp(min=1e-12))
        return tuple(found)


def _map_weight(run: SavedRun) -> Tensor | None:
    """(C, K) of a head of average pooling and one linear layer; None where maps need a backward pass."""
    size = run.backbone.preprocessing.size
    model = run.backbone.model.eval()
    with torch.no_grad():
        features = feature_maps(model, torch.randn(1, 3, size, size, generator=torch.Generator().manual_seed(0)))
        weight = linear_head(model, features, cast(Any, model).forward_head(features))
    return None if weight is None else weight.detach()


# ---------------------------------------------------------------- ONNX


def build_onnx(run: SavedRun) -> onnx.ModelProto:
    """images (N, H, W, 3) uint8 RGB -> the outputs of `AnswerNetwork`, then network_input (N, 3, S, S) uint8, what the network saw.

    ImageCheck by onnx.checker; what a reader needs to know is in its metadata, as JSON.
    """
    network, front = _network(run), square_graph(run.backbone.preprocessing)
    squares = front.graph.output[0]
    network.ir_version = front.ir_version = IR
    del front.opset_import[:], network.opset_import[1:]
    front.opset_import.append(helper.make_opsetid("", OPSET))
    whole = compose.merge_models(front, network, io_map=[(squares.name, "network_input_in")])
    whole.graph.output.append(squares)
    facts = metadata(run) | {"preprocess_graph": base64.b64encode(square_graph(run.backbone.preprocessing).SerializeToString()).decode()}
    helper.set_model_props(whole, {name: json.dumps(value, ensure_ascii=False) for name, value in facts.items()})
    whole.producer_name, whole.doc_string = "seewhy", "RGB images of any size, (batch, height, width, 3) uint8"
    onnx.checker.check_model(whole, full_check=True)
    return whole


def _network(run: SavedRun) -> onnx.ModelProto:
    """network_input_in (N, 3, S, S) uint8 -> the outputs of `AnswerNetwork`."""
    answers = AnswerNetwork(run).eval()
    size = run.backbone.preprocessing.size
    with torch.no_grad():
        program = torch.onnx.export(
            answers,
            (torch.zeros(2, 3, size, size, dtype=torch.uint8),),
            input_names=["network_input_in"],
            output_names=list(answers.names),
            dynamo=True,
            opset_version=OPSET,
            dynamic_shapes=({0: torch.export.Dim("batch")},),
            verbose=False,
        )
    if program is None:
        raise RuntimeError("torch.onnx.export returned nothing")
    return program.model_proto


def metadata(run: SavedRun) -> dict[str, Any]:
    """What an exported file says about itself."""
    manifest = run.manifest
    return {
        "seewhy_format": FORMAT,
        "seewhy_version": manifest["versions"]["seewhy"],
        "opset": OPSET,
        "classes": list(run.classes),
        "preprocessing": run.backbone.preprocessing.as_dict(),
        "min_decode_side": run.backbone.preprocessing.min_decode_side,
        "temperature": run.temperature,
        "ood_threshold": run.manifest.get("ood", {}).get("threshold"),
        "selective": manifest["calibration"]["selective"],
        "backbone": manifest["backbone"],
        "data_sha256": manifest["data"]["hash"],
        "split_sha256": manifest["split"]["hash"],
        "test_accuracy": run.metrics["test"]["accuracy"],
        "test_accuracy_ci95": run.metrics["test"].get("accuracy_ci95"),
        "test_images": run.metrics["test"]["n"],
    }


# ---------------------------------------------------------------- PyTorch


class _FromImages(nn.Module):
    """(N, H, W, 3) uint8 -> the outputs of `AnswerNetwork`."""

    def __init__(self, run: SavedRun) -> None:
        super().__init__()
        self.answers = AnswerNetwork(run)
        self.preprocessing: Preprocessing = run.backbone.preprocessing

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        given, size = self.preprocessing, self.preprocessing.size
        planes = images.permute(0, 3, 1, 2)
        squares: Tensor = self.answers(F.interpolate(planes, (size, size), mode=given.interpolation, antialias=True))
        return cast(tuple[Tensor, ...], squares)


def build_pt2(run: SavedRun) -> bytes:
    """The same as a program of torch.export: `torch.export.load(FILE).module()(images)`, without seewhy.

    ConfigError for runs on centred squares, whose cut depends on the image's size.
    """
    if run.backbone.preprocessing.resize == "crop":
        raise ConfigError(
            "a .pt2 file squashes the whole image, and this run cuts the centred square out; export --format onnx does that too"
        )
    batch, height, width = (torch.export.Dim(name, min=1 if name == "batch" else 8, max=20_000) for name in ("batch", "height", "width"))
    example = torch.zeros(2, 300, 200, 3, dtype=torch.uint8)
    with torch.no_grad():
        program = torch.export.export(_FromImages(run).eval(), (example,), dynamic_shapes=({0: batch, 1: height, 2: width},))
    data = io.BytesIO()
    torch.export.save(program, data, extra_files={"seewhy.json": json.dumps(metadata(run), ensure_ascii=False)})
    return data.getvalue()
