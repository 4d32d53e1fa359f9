"""Build one graph of a run, for ONNX or torch.export: RGB images of any size to probabilities, OOD score and all-class heatmaps."""

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

from seewhy.deploy.onnx_preprocess import IR, OPSET, preprocess_graph
from seewhy.errors import ConfigError
from seewhy.explain.attribution import feature_maps, linear_head
from seewhy.explain.cam import gradcam_all_classes
from seewhy.inference.onnx_model import FORMAT
from seewhy.models.ood import NEIGHBOURS, KNNReference
from seewhy.models.saved_run import SavedRun
from seewhy.models.transforms import Normalize, Preprocessing


class ExportNetwork(nn.Module):
    """Map network input (N, 3, S, S) uint8 to a tuple of the outputs in `names`.

    logits: (N, C). probabilities: (N, C), calibrated. ood_score: (N,), if the run has one. heatmaps: (N, C, h, w), Grad-CAM of every
    class, each scaled to a maximum of 1; if the head has a closed form.
    """

    def __init__(self, run: SavedRun) -> None:
        super().__init__()
        preprocessing, self.model = run.backbone.preprocessing, run.backbone.model
        self.normalize = Normalize(preprocessing)
        self.temperature, self.flip = run.temperature, bool(run.config.tta_flip)
        self.has_ood_score = run.references is not None
        if self.has_ood_score:
            references = cast(KNNReference, run.references)
            self.register_buffer("centre", torch.from_numpy(references.centre))
            self.register_buffer("unit_features", torch.from_numpy(references.unit_features))  # float16, cast to float32 in forward
        self.weight = _linear_weight(run)
        optional = {"ood_score": self.has_ood_score, "heatmaps": self.weight is not None}
        self.names = ("logits", "probabilities", *(name for name, present in optional.items() if present))

    def _logits_maps_vector(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return logits (N, C), feature maps (N, K, h, w) and penultimate features (N, K) of normalised images (N, 3, S, S)."""
        model = cast(Any, self.model)
        features = feature_maps(self.model, images)
        if not self.has_ood_score:
            return model.forward_head(features), features, features
        vector = model.forward_head(features, pre_logits=True)
        return model.get_classifier()(vector), features, vector

    def forward(self, pixels: Tensor) -> tuple[Tensor, ...]:
        images = self.normalize(pixels)
        logits, features, vector = self._logits_maps_vector(images)
        maps = gradcam_all_classes(self.weight, features) if self.weight is not None else None
        if self.flip:  # the mean over image and mirror image, as in `predict` and `explain`
            flipped_logits, flipped_features, _ = self._logits_maps_vector(images.flip(3))
            logits = (logits + flipped_logits) / 2
            if maps is not None:
                maps = (maps + gradcam_all_classes(cast(Tensor, self.weight), flipped_features).flip(3)) / 2
        outputs = [logits, (logits / self.temperature).softmax(dim=1)]
        if self.has_ood_score:
            centred = vector - cast(Tensor, self.centre)
            cosine = (centred / centred.norm(dim=1, keepdim=True).clamp(min=1e-12)) @ cast(Tensor, self.unit_features).float().T
            nearest = min(NEIGHBOURS, cosine.shape[1])
            outputs.append(1 - cosine.topk(nearest, dim=1).values[:, -1])
        if maps is not None:
            peak = maps.amax(dim=(2, 3), keepdim=True)
            outputs.append(maps / peak.clamp(min=1e-12))
        return tuple(outputs)


def _linear_weight(run: SavedRun) -> Tensor | None:
    """Return the weight (C, K) of a head of average pooling and one linear layer; None for other heads, whose maps need gradients."""
    size = run.backbone.preprocessing.size
    model = run.backbone.model.eval()
    with torch.no_grad():
        features = feature_maps(model, torch.randn(1, 3, size, size, generator=torch.Generator().manual_seed(0)))
        weight = linear_head(model, features, cast(Any, model).forward_head(features))
    return None if weight is None else weight.detach()


# ---------------------------------------------------------------- ONNX


def build_onnx(run: SavedRun) -> onnx.ModelProto:
    """Return the graph from images (N, H, W, 3) uint8 RGB to the outputs of `ExportNetwork` and network_input (N, 3, S, S) uint8.

    It has passed onnx.checker; its metadata, each value JSON, holds all that a reader of the file needs.
    """
    network, front = _network(run), preprocess_graph(run.backbone.preprocessing)
    encoded_front, network_input = base64.b64encode(front.SerializeToString()).decode(), front.graph.output[0]
    network.ir_version = front.ir_version = IR
    del front.opset_import[:], network.opset_import[1:]
    front.opset_import.append(helper.make_opsetid("", OPSET))
    whole = compose.merge_models(front, network, io_map=[(network_input.name, "network_input_in")])
    whole.graph.output.append(network_input)
    facts = metadata(run) | {"preprocess_graph": encoded_front}
    helper.set_model_props(whole, {name: json.dumps(value, ensure_ascii=False) for name, value in facts.items()})
    whole.producer_name, whole.doc_string = "seewhy", "RGB images of any size, (batch, height, width, 3) uint8"
    onnx.checker.check_model(whole, full_check=True)
    return whole


def _network(run: SavedRun) -> onnx.ModelProto:
    """Return the graph from network_input_in (N, 3, S, S) uint8 to the outputs of `ExportNetwork`."""
    network = ExportNetwork(run).eval()
    size = run.backbone.preprocessing.size
    with torch.no_grad():
        program = torch.onnx.export(
            network,
            (torch.zeros(2, 3, size, size, dtype=torch.uint8),),
            input_names=["network_input_in"],
            output_names=list(network.names),
            dynamo=True,
            opset_version=OPSET,
            dynamic_shapes=({0: torch.export.Dim("batch")},),
            verbose=False,
        )
    if program is None:
        raise RuntimeError("torch.onnx.export returned nothing")
    return program.model_proto


def metadata(run: SavedRun) -> dict[str, Any]:
    """Return the metadata of an exported file: classes, preprocessing, calibration, thresholds, hashes, test accuracy."""
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


class _WithPreprocessing(nn.Module):
    """Map images (N, H, W, 3) uint8 to the outputs of `ExportNetwork`."""

    def __init__(self, run: SavedRun) -> None:
        super().__init__()
        self.network = ExportNetwork(run)
        self.preprocessing: Preprocessing = run.backbone.preprocessing

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        size, mode = self.preprocessing.size, self.preprocessing.interpolation
        pixels = F.interpolate(images.permute(0, 3, 1, 2), (size, size), mode=mode, antialias=True)
        return cast(tuple[Tensor, ...], self.network(pixels))


def build_pt2(run: SavedRun) -> bytes:
    """Return the content of a torch.export file: `torch.export.load(FILE).module()(images)` gives the outputs of `ExportNetwork`.

    Raises ConfigError for runs on centred crops, whose size depends on the image's.
    """
    if run.backbone.preprocessing.resize == "crop":
        raise ConfigError("a .pt2 file cannot crop the centred square, as this run's preprocessing does; use --format onnx")
    batch, height, width = (torch.export.Dim(name, min=1 if name == "batch" else 8, max=20_000) for name in ("batch", "height", "width"))
    example = torch.zeros(2, 300, 200, 3, dtype=torch.uint8)
    with torch.no_grad():
        program = torch.export.export(_WithPreprocessing(run).eval(), (example,), dynamic_shapes=({0: batch, 1: height, 2: width},))
    data = io.BytesIO()
    torch.export.save(program, data, extra_files={"seewhy.json": json.dumps(metadata(run), ensure_ascii=False)})
    return data.getvalue()
