"""Run a network on batches of images: ONNX Runtime or PyTorch, whichever is faster here."""

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

from seewhy.core.cache import cache_dir
from seewhy.core.files import atomic_write
from seewhy.core.progress import LOG
from seewhy.errors import OutputError
from seewhy.models.fingerprint import network_hash
from seewhy.models.transforms import Normalize, Preprocessing, directions

ONNX_WORTH_IT = 400  # images below which exporting a network costs more than it saves; an export is kept for the next time
MANY = 64  # images from which batches run side by side
IN_CACHE = 4  # images a core takes at once: the maps of more do not fit its cache (benchmarks/engines.py)
FEW = 8  # images from which a batch's bits no longer depend on its size
FORMAT = 2  # of the kept exports


@dataclass(frozen=True)
class Executor:
    """run: (N, size, size, 3) uint8 -> (N, *shape) float32, in eval mode; at most `max_parallel_batches` threads may call it at a time.

    batch: how many images it takes at once of those it is given; None for all.

    Made by `float_executor` it takes (N, size, size, 3) normalised float32 instead.
    """

    run: Callable[[npt.NDArray[Any]], npt.NDArray[np.float32]]
    max_parallel_batches: int = 1
    batch: int | None = None

    def __call__(self, squares: npt.NDArray[Any]) -> npt.NDArray[np.float32]:
        if self.batch is None or len(squares) <= self.batch:
            return self.run(squares)
        return np.concatenate([self.run(squares[start : start + self.batch]) for start in range(0, len(squares), self.batch)])


class NormalizeInput(nn.Module):
    """(N, H, W, 3) uint8 RGB -> network((x / 255 - mean) / std): normalisation as the network's first step."""

    def __init__(self, network: nn.Module, preprocessing: Preprocessing) -> None:
        super().__init__()
        self.network = network
        self.normalize = Normalize(preprocessing)

    def forward(self, squares: Tensor) -> Tensor:
        features: Tensor = self.network(self.normalize(squares.permute(0, 3, 1, 2)))
        return features


class FromImages(nn.Module):
    """(N, H, W, 3) normalised float32 -> network(images): what asks a network about images that were changed behind their decoding."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, images: Tensor) -> Tensor:
        answers: Tensor = self.network(images.permute(0, 3, 1, 2))
        return answers


def float_executor(network: nn.Module, size: int, images: int) -> Executor:
    """What runs `network` on (N, size, size, 3) normalised float32, one batch at a time."""
    wrapped = FromImages(network).eval()
    name = "torch" if torch.cuda.is_available() or images < ONNX_WORTH_IT else "onnx"
    return EXECUTORS[name](wrapped, size, 1)


def resolve_runtime(runtime: str, images: int) -> str:
    """What "auto" stands for where bits must not depend on what was exported before: `images` of the whole dataset decide."""
    if runtime != "auto":
        return runtime
    return "torch" if torch.cuda.is_available() or images < ONNX_WORTH_IT else "onnx"


def runtime_of(runtime: str) -> str:
    """The library behind an executor with its version; another one may round differently."""
    package = {"onnx": "onnxruntime", "torch": "torch"}[runtime]
    return f"{package} {version(package)}"


def batch_invariant(executor: Executor, squares: npt.NDArray[Any]) -> npt.NDArray[np.float32]:
    """Features of a batch, with the same bits in whatever company an image comes.

    PyTorch multiplies the matrices of very few images in another order than those of many, so few are given company.
    """
    short = max(0, FEW - len(squares))
    return executor(np.concatenate([squares, np.repeat(squares[:1], short, axis=0)]))[: len(squares)] if short else executor(squares)


def make_executor(network: nn.Module, preprocessing: Preprocessing, images: int, runtime: str = "auto") -> Executor:
    """What runs `network` on squares of `preprocessing.size`, normalised as its first step.

    onnx: ONNX Runtime on the CPU, faster than eager PyTorch there. torch: PyTorch, on the GPU where there is one.
    """
    if runtime == "auto":
        runtime = choose_runtime(network, preprocessing, images)
    return EXECUTORS[runtime](NormalizeInput(network, preprocessing).eval(), preprocessing.size, _lanes(runtime, images))


def _lanes(runtime: str, images: int) -> int:
    """How many batches run side by side, each on its share of the cores.

    Two batches on a core each finish sooner than two batches after one another on both, whose threads wait for each other
    in every layer (benchmarks/extraction.py). A few images are sooner there with all cores on them. At most 4, for memory.
    """
    return min(torch.get_num_threads(), 4) if runtime == "onnx" and images >= MANY else 1


def choose_runtime(network: nn.Module, preprocessing: Preprocessing, images: int) -> str:
    """onnx where it pays: on a CPU, and for more than a few images or where the export is at hand already."""
    if torch.cuda.is_available():
        return "torch"
    if images >= ONNX_WORTH_IT:
        return "onnx"
    return "onnx" if _export_place(NormalizeInput(network, preprocessing), preprocessing.size).is_file() else "torch"


def get_executor(
    kept: dict[tuple[str, int], Executor], network: nn.Module, preprocessing: Preprocessing, images: int, runtime: str = "auto"
) -> Executor:
    """`make_executor`, made once for all calls with the same `kept`, so that a loaded run answers its second image at once."""
    if runtime == "auto":
        names = {name for name, _ in kept}
        known = "onnx" if "onnx" in names else "torch" if "torch" in names and images < ONNX_WORTH_IT else None
        runtime = known or choose_runtime(network, preprocessing, images)
    key = (runtime, _lanes(runtime, images))
    if key not in kept:
        kept[key] = make_executor(network, preprocessing, images, runtime)
    return kept[key]


def _torch_executor(network: nn.Module, size: int, max_parallel_batches: int) -> Executor:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    # A copy: a trunk shares its parameters with the tail, which must stay where it is.
    network = copy.deepcopy(network).to(device).to(memory_format=torch.channels_last)

    def run(squares: npt.NDArray[Any]) -> npt.NDArray[np.float32]:
        with torch.inference_mode():
            features: npt.NDArray[np.float32] = network(torch.from_numpy(squares).to(device)).float().cpu().contiguous().numpy()
        return features

    return Executor(run)  # its own threads use all cores for one batch


def _onnx_executor(network: nn.Module, size: int, max_parallel_batches: int) -> Executor:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads() // max_parallel_batches
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

    return Executor(run, max_parallel_batches, IN_CACHE if max_parallel_batches > 1 or options.intra_op_num_threads == 1 else None)


EXECUTORS: dict[str, Callable[[nn.Module, int, int], Executor]] = {"onnx": _onnx_executor, "torch": _torch_executor}


def _exported(network: nn.Module, size: int) -> bytes:
    """The network as an ONNX graph, from the cache where it was exported before."""
    place = _export_place(network, size)
    with suppress(OSError):
        return place.read_bytes()
    LOG.info("preparing the network for ONNX Runtime; done once, then kept in the cache")
    example = torch.zeros(2, size, size, 3, dtype=torch.float32 if isinstance(network, FromImages) else torch.uint8)
    with torch.no_grad():
        program = torch.onnx.export(network, (example,), dynamo=True, dynamic_shapes=({0: torch.export.Dim("batch")},), verbose=False)
    if program is None:
        raise RuntimeError("torch.onnx.export returned nothing")
    graph: bytes = program.model_proto.SerializeToString()
    with suppress(OutputError), atomic_write(place) as work:  # an export that cannot be kept is made again next time
        work.write_bytes(graph)
    return graph


def _export_place(network: nn.Module, size: int) -> Path:
    """Where the export of this very network stands: the network, the size of its input and the exporter's version decide."""
    facts = [FORMAT, size, network_hash(network)]
    return cache_dir() / "executors" / f"{hashlib.sha256(repr(facts).encode()).hexdigest()[:20]}.onnx"


def flip_tta(forward: Executor, squares: npt.NDArray[np.uint8], classes: int) -> npt.NDArray[np.float32]:
    """Mean logits, the first `classes` columns, of (N, size, size, 3) squares and their mirror images; the rest is the squares' own."""
    found, mirrored = map(forward, directions(squares, True))
    mean = (found[:, :classes] + mirrored[:, :classes]) / 2
    return np.concatenate([mean, found[:, classes:]], axis=1)
