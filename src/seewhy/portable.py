"""Run -> one ONNX file: RGB pictures of any size in; logits, probabilities, strangeness and the heatmaps of all classes out."""

from __future__ import annotations

import io
import json
import os
from contextlib import redirect_stderr, redirect_stdout, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import numpy.typing as npt
import onnx
import torch
from onnx import TensorProto, compose, helper
from torch import Tensor, nn

from seewhy.attribution import feature_maps, linear_head
from seewhy.errors import ConfigError, OutputError
from seewhy.images import open_images, read_image
from seewhy.progress import progress
from seewhy.run import Run
from seewhy.runtime import FORMAT
from seewhy.split import read_split
from seewhy.transforms import Preprocessing
from seewhy.unknowns import NEIGHBOURS, References

OPSET, IR = 20, 10
# What a file must keep to, against the run, on real pictures: a few resized pixels in a thousand differ by a grey level.
MAX_DIFFERENCE, LEAST_CORRELATION = 0.02, 0.99


class _Answers(nn.Module):
    """(N, 3, S, S) uint8 -> logits, probabilities, and where the run has them strangeness and maps: what a run answers, as one graph."""

    def __init__(self, run: Run) -> None:
        super().__init__()
        preprocessing, self.model = run.backbone.preprocessing, run.backbone.model
        mean, std = torch.tensor(preprocessing.mean), torch.tensor(preprocessing.std)
        self.register_buffer("scale", (1 / (255 * std)).view(1, 3, 1, 1))
        self.register_buffer("shift", (-mean / std).view(1, 3, 1, 1))
        self.temperature, self.flip = run.temperature, bool(run.config.test_flip)
        self.vectors = run.references is not None
        if self.vectors:
            references = cast(References, run.references)
            self.register_buffer("centre", torch.from_numpy(references.centre))
            self.register_buffer("directions", torch.from_numpy(references.directions))  # half precision, widened when run
        self.weight = _map_weight(run)

    def _way(self, pictures: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        model = cast(Any, self.model)
        features = feature_maps(self.model, pictures)
        if not self.vectors:
            return model.forward_head(features), features, features
        vector = model.forward_head(features, pre_logits=True)
        return model.get_classifier()(vector), features, vector

    def _maps(self, features: Tensor) -> Tensor:
        """Grad-CAM of every class in closed form: relu(W A), to a factor. (N, K, h, w) -> (N, C, h, w)."""
        return torch.einsum("ck,nkhw->nchw", cast(Tensor, self.weight), features).clamp(min=0)

    def forward(self, squares: Tensor) -> tuple[Tensor, ...]:
        pictures = squares.float() * cast(Tensor, self.scale) + cast(Tensor, self.shift)
        logits, features, vector = self._way(pictures)
        maps = self._maps(features) if self.weight is not None else None
        if self.flip:  # the mean over both directions, as `predict` and `explain` have it
            other, mirrored, _ = self._way(pictures.flip(3))
            logits = (logits + other) / 2
            if maps is not None:
                maps = (maps + self._maps(mirrored).flip(3)) / 2
        found = [logits, (logits / self.temperature).softmax(dim=1)]
        if self.vectors:
            away = vector - cast(Tensor, self.centre)
            alike = (away / away.norm(dim=1, keepdim=True).clamp(min=1e-12)) @ cast(Tensor, self.directions).float().T
            nearest = min(NEIGHBOURS, alike.shape[1])
            found.append(1 - alike.topk(nearest, dim=1).values[:, -1])
        if maps is not None:
            peak = maps.amax(dim=(2, 3), keepdim=True)
            found.append(maps / peak.clamp(min=1e-12))
        return tuple(found)


def _map_weight(run: Run) -> Tensor | None:
    """(C, K) of a head of average pooling and one linear layer; None where maps need a backward pass."""
    size = run.backbone.preprocessing.size
    model = run.backbone.model.eval()
    with torch.no_grad():
        features = feature_maps(model, torch.randn(1, 3, size, size, generator=torch.Generator().manual_seed(0)))
        weight = linear_head(model, features, cast(Any, model).forward_head(features))
    return None if weight is None else weight.detach()


# ---------------------------------------------------------------- the graph in front: any picture -> the network's square


def _resizing_graph(preprocessing: Preprocessing) -> onnx.ModelProto:
    """(N, H, W, 3) uint8 -> (N, 3, S, S) uint8: cut and resized as `transforms.render` does, to a grey level here and there."""
    if preprocessing.interpolation not in ("bilinear", "bicubic"):
        raise ConfigError(f"interpolation {preprocessing.interpolation!r} cannot be part of an ONNX file; bilinear and bicubic can")
    make = helper.make_node
    nodes = [make("Transpose", ["pictures"], ["planes"], perm=[0, 3, 1, 2])]
    constants = [helper.make_tensor("size", TensorProto.INT64, [1], [preprocessing.size])]
    planes = "planes"
    if preprocessing.resize == "crop":
        nodes += _centre_cut(preprocessing.crop, constants)
        planes = "cut"
    options: dict[str, Any] = {"antialias": 1, "coordinate_transformation_mode": "half_pixel"}
    if preprocessing.interpolation == "bicubic":
        options |= {"mode": "cubic", "cubic_coeff_a": -0.5, "exclude_outside": 1}
    else:
        options |= {"mode": "linear"}
    # One side after the other, rounded in between: so PyTorch works on bytes. All four sides are named, since ONNX Runtime
    # moves the transposition behind the resizing, and forgets attributes that number the sides.
    for name, value in (("zero", 0), ("second", 2), ("third", 3)):
        constants.append(helper.make_tensor(name, TensorProto.INT64, [1], [value]))
    nodes += [
        make("Shape", [planes], ["shape"]),
        make("Slice", ["shape", "zero", "third"], ["all_but_width"]),
        make("Slice", ["shape", "zero", "second"], ["all_but_both"]),
        make("Concat", ["all_but_width", "size"], ["narrow_size"], axis=0),
        make("Concat", ["all_but_both", "size", "size"], ["square_size"], axis=0),
        make("Resize", [planes, "", "", "narrow_size"], ["narrow"], **options),
        make("Resize", ["narrow", "", "", "square_size"], ["squares"], **options),
    ]
    graph = helper.make_graph(
        nodes,
        "resize",
        [helper.make_tensor_value_info("pictures", TensorProto.UINT8, ["batch", "height_in", "width_in", 3])],
        [helper.make_tensor_value_info("squares", TensorProto.UINT8, ["batch", 3, preprocessing.size, preprocessing.size])],
        constants,
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=IR)


def _centre_cut(share: float, constants: list[onnx.TensorProto]) -> list[onnx.NodeProto]:
    """Nodes that cut the centred square of `share` times the short side out of `planes`, at whole pixels, into `cut`."""
    make = helper.make_node
    for name, kind, value in (
        ("two", TensorProto.INT64, 2),
        ("four", TensorProto.INT64, 4),
        ("axes", TensorProto.INT64, None),
        ("share", TensorProto.FLOAT, share),
        ("half", TensorProto.FLOAT, 0.5),
    ):
        values = [2, 3] if value is None else [value]
        constants.append(helper.make_tensor(name, kind, [len(values)], values))
    return [
        make("Shape", ["planes"], ["whole"]),
        make("Slice", ["whole", "two", "four"], ["sides"]),
        make("Cast", ["sides"], ["sides_f"], to=TensorProto.FLOAT),
        make("ReduceMin", ["sides_f"], ["short"], keepdims=1),
        make("Mul", ["short", "share"], ["side"]),
        make("Sub", ["sides_f", "side"], ["over"]),
        make("Mul", ["over", "half"], ["low_f"]),
        make("Add", ["low_f", "side"], ["high_f"]),
        make("Round", ["low_f"], ["low_r"]),
        make("Round", ["high_f"], ["high_r"]),
        make("Cast", ["low_r"], ["low"], to=TensorProto.INT64),
        make("Cast", ["high_r"], ["high"], to=TensorProto.INT64),
        make("Slice", ["planes", "low", "high", "axes"], ["cut"]),
    ]


# ---------------------------------------------------------------- the file


def build_onnx(run: Run) -> onnx.ModelProto:
    """The whole graph with its metadata, checked by onnx.checker."""
    answers = _Answers(run).eval()
    size = run.backbone.preprocessing.size
    names = [
        "logits",
        "probabilities",
        *(["strangeness"] if answers.vectors else []),
        *(["heatmaps"] if answers.weight is not None else []),
    ]
    example = torch.zeros(2, 3, size, size, dtype=torch.uint8)
    with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()), torch.no_grad():  # the exporter narrates
        program = torch.onnx.export(
            answers,
            (example,),
            input_names=["squares_in"],
            output_names=names,
            dynamo=True,
            opset_version=OPSET,
            dynamic_shapes=({0: torch.export.Dim("batch")},),
            verbose=False,
        )
    if program is None:
        raise RuntimeError("torch.onnx.export returned nothing")
    network = program.model_proto
    network.ir_version = IR
    whole = compose.merge_models(_resizing_graph(run.backbone.preprocessing), network, io_map=[("squares", "squares_in")])
    helper.set_model_props(whole, {name: json.dumps(value, ensure_ascii=False) for name, value in _metadata(run).items()})
    whole.producer_name, whole.doc_string = "seewhy", "RGB pictures of any size, (batch, height, width, 3) uint8"
    onnx.checker.check_model(whole, full_check=True)
    return whole


def _metadata(run: Run) -> dict[str, Any]:
    manifest = run.manifest
    return {
        "seewhy_format": FORMAT,
        "seewhy_version": manifest["versions"]["seewhy"],
        "opset": OPSET,
        "classes": list(run.classes),
        "preprocessing": run.backbone.preprocessing.as_dict(),
        "temperature": run.temperature,
        "unknown_above": run.manifest.get("unknowns", {}).get("threshold"),
        "abstain": manifest.get("calibration", {}).get("abstain", []),
        "backbone": manifest["backbone"],
        "data_sha256": manifest["data"]["hash"],
        "split_sha256": manifest["split"]["hash"],
        "test_accuracy": run.metrics["test"]["accuracy"],
    }


@dataclass(frozen=True)
class Parity:
    """An ONNX file against its run on N pictures, from files to answers.

    same_class: share of equal most probable classes. difference: largest of any probability. correlation: least and mean of the
    heatmaps of the predicted class; nan where the file has none.
    """

    n: int
    same_class: float
    difference: float
    correlation_least: float
    correlation_mean: float


def measure_parity(run: Run, model: bytes, paths: list[Path]) -> Parity:
    """Runs both on the files; heatmaps are compared where the file has them."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]
    expected = run.explain(paths, "gradcam") if "heatmaps" in names else None
    theirs = run.predict(paths).probs
    probs, correlations = [], []
    with progress("comparing", len(paths)) as advance:
        for n, path in enumerate(paths):
            picture = np.asarray(read_image(path))[None]
            found = dict(zip(names, session.run(None, {"pictures": picture}), strict=True))
            probs.append(found["probabilities"][0])
            if expected is not None:
                correlations.append(_correlation(found["heatmaps"][0, expected.targets[n]], expected.maps[n]))
            advance(1)
    ours = np.stack(probs)
    return Parity(
        n=len(paths),
        same_class=float((ours.argmax(axis=1) == theirs.argmax(axis=1)).mean()),
        difference=float(np.abs(ours - theirs).max()),
        correlation_least=float(np.min(correlations)) if correlations else float("nan"),
        correlation_mean=float(np.mean(correlations)) if correlations else float("nan"),
    )


def _correlation(one: npt.NDArray[np.float32], other: npt.NDArray[np.float32]) -> float:
    """Pearson's, of two maps; 1 for two constant ones."""
    if one.std() == 0 or other.std() == 0:
        return float(np.allclose(one, other, atol=1e-3))
    return float(np.corrcoef(one.ravel(), other.ravel())[0, 1])


def export_onnx(run: Run, path: Path | str, pictures: int = 200) -> Parity | None:
    """Writes the run as one ONNX file, after comparing it with the run on at most `pictures` of its own test pictures.

    Returns None where the data is no longer there to compare on. Raises OutputError where file and run do not say the same.
    """
    path = Path(path)
    data = build_onnx(run).SerializeToString()
    paths = _test_files(run, pictures)
    parity = measure_parity(run, data, paths) if paths else None
    if parity is not None and not (parity.difference <= MAX_DIFFERENCE and not parity.correlation_least < LEAST_CORRELATION):
        raise OutputError(
            f"{path}: not written, since it would not say what the run says (probabilities differ by up to {parity.difference:.4f}, "
            f"heatmaps correlate at least {parity.correlation_least:.4f}); please report the backbone {run.config.backbone}"
        )
    work = path.parent / f".{path.name}-{os.getpid()}"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        work.write_bytes(data)
        os.replace(work, path)
    except OSError as error:
        with suppress(OSError):
            work.unlink()
        raise OutputError(f"{path}: cannot be written ({error.strerror}); choose another place with --out") from error
    return parity


def _test_files(run: Run, most: int) -> list[Path]:
    """Some test pictures of the run, drawn at random; none where its data cannot be opened."""
    from seewhy.errors import SeewhyError

    config = run.config
    try:
        images = open_images(config.data, config.data_root, config.skip_bad, config.workers)
        test = read_split(run.path, images).test
    except SeewhyError:
        return []
    drawn = np.sort(np.random.default_rng(0).permutation(test)[:most])
    return [Path(images.paths[i]) for i in drawn]
