"""Network -> Engine: squares of a picture in, float32 features out, on whatever runs the network fastest."""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from seewhy.backbones import weights_hash
from seewhy.cache import cache_dir
from seewhy.errors import OutputError
from seewhy.progress import LOG
from seewhy.transforms import Normalize, Preprocessing
from seewhy.writing import whole_file

ONNX_WORTH_IT = 400  # pictures below which exporting a network costs more than it saves; an export is kept for the next time
MANY = 64  # pictures from which batches run side by side
IN_CACHE = 4  # pictures a core takes at once: the maps of more do not fit its cache (benchmarks/engines.py)
FEW = 8  # pictures from which a batch's bits no longer depend on its size
FORMAT = 1  # of the kept exports


@dataclass(frozen=True)
class Engine:
    """run: (N, size, size, 3) uint8 -> (N, *shape) float32, in eval mode; at most `lanes` threads may call it at a time.

    batch: how many pictures it takes at once of those it is given; None for all.

    Made by `float_engine` it takes (N, size, size, 3) normalised float32 instead.
    """

    run: Callable[[npt.NDArray[Any]], npt.NDArray[np.float32]]
    lanes: int = 1
    batch: int | None = None

    def __call__(self, squares: npt.NDArray[Any]) -> npt.NDArray[np.float32]:
        if self.batch is None or len(squares) <= self.batch:
            return self.run(squares)
        return np.concatenate([self.run(squares[start : start + self.batch]) for start in range(0, len(squares), self.batch)])


class FromSquares(nn.Module):
    """(N, H, W, 3) uint8 RGB -> network((x / 255 - mean) / std): normalisation as the network's first step."""

    def __init__(self, network: nn.Module, preprocessing: Preprocessing) -> None:
        super().__init__()
        self.network = network
        self.normalize = Normalize(preprocessing)

    def forward(self, squares: Tensor) -> Tensor:
        features: Tensor = self.network(self.normalize(squares.permute(0, 3, 1, 2)))
        return features


class FromPictures(nn.Module):
    """(N, H, W, 3) normalised float32 -> network(pictures): what asks a network about pictures that were changed behind their decoding."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, pictures: Tensor) -> Tensor:
        answers: Tensor = self.network(pictures.permute(0, 3, 1, 2))
        return answers


def float_engine(network: nn.Module, size: int, pictures: int) -> Engine:
    """What runs `network` on (N, size, size, 3) normalised float32, one batch at a time."""
    wrapped = FromPictures(network).eval()
    name = "torch" if torch.cuda.is_available() or pictures < ONNX_WORTH_IT else "onnx"
    return ENGINES[name](wrapped, size, 1)


def settled_engine(engine: str, pictures: int) -> str:
    """What "auto" stands for where bits must not depend on what was exported before: `pictures` of the whole dataset decide."""
    if engine != "auto":
        return engine
    return "torch" if torch.cuda.is_available() or pictures < ONNX_WORTH_IT else "onnx"


def runtime_of(engine: str) -> str:
    """The library behind an engine with its version; another one may round differently."""
    package = {"onnx": "onnxruntime", "torch": "torch"}[engine]
    return f"{package} {version(package)}"


def steady(engine: Engine, squares: npt.NDArray[Any]) -> npt.NDArray[np.float32]:
    """Features of a batch, with the same bits in whatever company a picture comes.

    PyTorch multiplies the matrices of very few pictures in another order than those of many, so few are given company.
    """
    short = max(0, FEW - len(squares))
    return engine(np.concatenate([squares, np.repeat(squares[:1], short, axis=0)]))[: len(squares)] if short else engine(squares)


def make_engine(network: nn.Module, preprocessing: Preprocessing, pictures: int, engine: str = "auto") -> Engine:
    """What runs `network` on squares of `preprocessing.size`, normalised as its first step.

    onnx: ONNX Runtime on the CPU, faster than eager PyTorch there. torch: PyTorch, on the GPU where there is one.
    """
    if engine == "auto":
        engine = choose_engine(network, preprocessing, pictures)
    return ENGINES[engine](FromSquares(network, preprocessing).eval(), preprocessing.size, _lanes(engine, pictures))


def _lanes(engine: str, pictures: int) -> int:
    """How many batches run side by side, each on its share of the cores.

    Two batches on a core each finish sooner than two batches after one another on both, whose threads wait for each other
    in every layer (benchmarks/extraction.py). A few pictures are sooner there with all cores on them. At most 4, for memory.
    """
    return min(torch.get_num_threads(), 4) if engine == "onnx" and pictures >= MANY else 1


def choose_engine(network: nn.Module, preprocessing: Preprocessing, pictures: int) -> str:
    """onnx where it pays: on a CPU, and for more than a few pictures or where the export is at hand already."""
    if torch.cuda.is_available():
        return "torch"
    if pictures >= ONNX_WORTH_IT:
        return "onnx"
    return "onnx" if _export_place(FromSquares(network, preprocessing), preprocessing.size).is_file() else "torch"


def kept_engine(
    kept: dict[tuple[str, int], Engine], network: nn.Module, preprocessing: Preprocessing, pictures: int, engine: str = "auto"
) -> Engine:
    """`make_engine`, made once for all calls with the same `kept`, so that a loaded run answers its second picture at once."""
    if engine == "auto":
        names = {name for name, _ in kept}
        known = "onnx" if "onnx" in names else "torch" if "torch" in names and pictures < ONNX_WORTH_IT else None
        engine = known or choose_engine(network, preprocessing, pictures)
    key = (engine, _lanes(engine, pictures))
    if key not in kept:
        kept[key] = make_engine(network, preprocessing, pictures, engine)
    return kept[key]


def _torch_engine(network: nn.Module, size: int, lanes: int) -> Engine:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    # A copy: a trunk shares its parameters with the tail, which must stay where it is.
    network = copy.deepcopy(network).to(device).to(memory_format=torch.channels_last)

    def run(squares: npt.NDArray[Any]) -> npt.NDArray[np.float32]:
        with torch.inference_mode():
            features: npt.NDArray[np.float32] = network(torch.from_numpy(squares).to(device)).float().cpu().contiguous().numpy()
        return features

    return Engine(run)  # its own threads use all cores for one batch


def _onnx_engine(network: nn.Module, size: int, lanes: int) -> Engine:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads() // lanes
    options.log_severity_level = 3
    # Idle threads sleep: spinning, they would take the cores from the threads that decode and from PyTorch's.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    try:
        session = onnxruntime.InferenceSession(_exported(network, size), options, providers=["CPUExecutionProvider"])
    except Exception:  # onnxruntime raises types of its own; whatever spoiled the kept export, a new one mends it
        _export_place(network, size).unlink(missing_ok=True)
        session = onnxruntime.InferenceSession(_exported(network, size), options, providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name

    def run(squares: npt.NDArray[Any]) -> npt.NDArray[np.float32]:
        output: npt.NDArray[np.float32] = session.run(None, {name: squares})[0]
        return output

    return Engine(run, lanes, IN_CACHE if lanes > 1 or options.intra_op_num_threads == 1 else None)


ENGINES: dict[str, Callable[[nn.Module, int, int], Engine]] = {"onnx": _onnx_engine, "torch": _torch_engine}


def _exported(network: nn.Module, size: int) -> bytes:
    """The network as an ONNX graph, from the cache where it was exported before."""
    place = _export_place(network, size)
    with suppress(OSError):
        return place.read_bytes()
    LOG.info("preparing the network for ONNX Runtime; done once, then kept in the cache")
    example = torch.zeros(2, size, size, 3, dtype=torch.float32 if isinstance(network, FromPictures) else torch.uint8)
    with torch.no_grad():
        program = torch.onnx.export(network, (example,), dynamo=True, dynamic_shapes=({0: torch.export.Dim("batch")},), verbose=False)
    if program is None:
        raise RuntimeError("torch.onnx.export returned nothing")
    graph: bytes = program.model_proto.SerializeToString()
    with suppress(OutputError), whole_file(place) as work:  # an export that cannot be kept is made again next time
        work.write_bytes(graph)
    return graph


def _export_place(network: nn.Module, size: int) -> Path:
    """Where the export of this very network stands: its structure, weights, input and the exporter's version decide."""
    facts: list[Any] = [FORMAT, version("torch"), version("timm"), size, repr(network), weights_hash(network)]
    return cache_dir() / "engines" / f"{hashlib.sha256(repr(facts).encode()).hexdigest()[:20]}.onnx"
