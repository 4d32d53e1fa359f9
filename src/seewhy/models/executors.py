"""Run a network on batches of images: ONNX Runtime or PyTorch, whichever is faster on this machine."""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
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
from seewhy.models.transforms import Normalize, Preprocessing, flip_views

MIN_ONNX_IMAGES = 400  # images below which an export to ONNX costs more than it saves
MIN_PARALLEL_IMAGES = 64  # images from which batches run in parallel
BATCH_PER_CORE = 4  # images; the activations of more do not fit a core's cache (benchmarks/engines.py)
MIN_INVARIANT_BATCH = 8  # images from which the bits of an output no longer depend on the batch size
FORMAT = 2  # of the cached exports


@dataclass(frozen=True)
class Executor:
    """A network in eval mode, ready to run.

    run: (N, size, size, 3) pixels to (N, *shape) float32; uint8 pixels, or normalised float32 for a `float_executor`.
    max_parallel_batches: how many threads may call `run` at a time.
    batch: largest number of images a call of `run`; None: no limit.
    """

    run: Callable[[npt.NDArray[Any]], npt.NDArray[np.float32]]
    max_parallel_batches: int = 1
    batch: int | None = None

    def __call__(self, pixels: npt.NDArray[Any]) -> npt.NDArray[np.float32]:
        if self.batch is None or len(pixels) <= self.batch:
            return self.run(pixels)
        return np.concatenate([self.run(pixels[start : start + self.batch]) for start in range(0, len(pixels), self.batch)])


class NormalizeInput(nn.Module):
    """Run `network` on (N, H, W, 3) uint8 RGB pixels, normalised as its first step; on normalised float32 without `preprocessing`."""

    def __init__(self, network: nn.Module, preprocessing: Preprocessing | None) -> None:
        super().__init__()
        self.network = network
        self.normalize = nn.Identity() if preprocessing is None else Normalize(preprocessing)
        self.input_dtype = torch.float32 if preprocessing is None else torch.uint8

    def forward(self, pixels: Tensor) -> Tensor:
        features: Tensor = self.network(self.normalize(pixels.permute(0, 3, 1, 2)))
        return features


def float_executor(network: nn.Module, size: int, images: int) -> Executor:
    """Executor of `network` on (N, size, size, 3) normalised float32, one batch at a time."""
    return EXECUTORS[resolve_runtime("auto", images)](NormalizeInput(network, None).eval(), size, 1)


def resolve_runtime(runtime: str, images: int) -> str:
    """Resolve "auto" by the number of images only, so that bits do not depend on which exports are cached."""
    if runtime != "auto":
        return runtime
    return "torch" if torch.cuda.is_available() or images < MIN_ONNX_IMAGES else "onnx"


def batch_invariant(executor: Executor, pixels: npt.NDArray[Any]) -> npt.NDArray[np.float32]:
    """Run a batch, padded to MIN_INVARIANT_BATCH images, so that the bits of an image do not depend on the rest of the batch.

    PyTorch multiplies matrices of few rows in another order than those of many.
    """
    padding = np.repeat(pixels[:1], max(0, MIN_INVARIANT_BATCH - len(pixels)), axis=0)
    return executor(np.concatenate([pixels, padding]))[: len(pixels)] if len(padding) else executor(pixels)


def make_executor(network: nn.Module, preprocessing: Preprocessing, images: int, runtime: str = "auto") -> Executor:
    """Executor of `network` on uint8 pixels of `preprocessing.size`.

    images: how many it will run on, about. runtime: 'onnx' (ONNX Runtime on the CPU, faster than eager PyTorch there),
    'torch' (PyTorch, on the GPU if there is one), or 'auto'.
    """
    if runtime == "auto":
        runtime = choose_runtime(network, preprocessing, images)
    return EXECUTORS[runtime](NormalizeInput(network, preprocessing).eval(), preprocessing.size, _parallel_batches(runtime, images))


def _parallel_batches(runtime: str, images: int) -> int:
    """Number of batches to run in parallel, each on its share of the cores; at most 4, to bound memory.

    Two batches on one core each are faster than one after the other on both, whose threads synchronise in every layer
    (benchmarks/extraction.py), except for a few images.
    """
    return min(torch.get_num_threads(), 4) if runtime == "onnx" and images >= MIN_PARALLEL_IMAGES else 1


def choose_runtime(network: nn.Module, preprocessing: Preprocessing, images: int) -> str:
    """'onnx' on a CPU for MIN_ONNX_IMAGES images or more, or where the export is cached; else 'torch'."""
    runtime = resolve_runtime("auto", images)
    if torch.cuda.is_available() or runtime == "onnx":
        return runtime
    return "onnx" if _export_file(NormalizeInput(network, preprocessing), preprocessing.size).is_file() else "torch"


def get_executor(
    cache: dict[tuple[str, int], Executor], network: nn.Module, preprocessing: Preprocessing, images: int, runtime: str = "auto"
) -> Executor:
    """Like `make_executor`, but made once for all calls with the same `cache`."""
    if runtime == "auto":
        names = {name for name, _ in cache}
        cached = "onnx" if "onnx" in names else "torch" if "torch" in names and images < MIN_ONNX_IMAGES else None
        runtime = cached or choose_runtime(network, preprocessing, images)
    key = (runtime, _parallel_batches(runtime, images))
    if key not in cache:
        cache[key] = make_executor(network, preprocessing, images, runtime)
    return cache[key]


def _torch_executor(network: NormalizeInput, size: int, max_parallel_batches: int) -> Executor:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    # A copy: a trunk shares its parameters with the tail, which must stay on its device.
    network = copy.deepcopy(network).to(device).to(memory_format=torch.channels_last)

    def run(pixels: npt.NDArray[Any]) -> npt.NDArray[np.float32]:
        with torch.inference_mode():
            features: npt.NDArray[np.float32] = network(torch.from_numpy(pixels).to(device)).float().cpu().contiguous().numpy()
        return features

    return Executor(run)  # PyTorch's threads use all cores for one batch


def _onnx_executor(network: NormalizeInput, size: int, max_parallel_batches: int) -> Executor:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads() // max_parallel_batches
    options.log_severity_level = 3
    # Spinning idle threads would compete with the decoding threads and with PyTorch's.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    try:
        session = onnxruntime.InferenceSession(_exported(network, size), options, providers=["CPUExecutionProvider"])
    except Exception:  # onnxruntime's own types; export again if the cached file is damaged
        _export_file(network, size).unlink(missing_ok=True)
        session = onnxruntime.InferenceSession(_exported(network, size), options, providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name

    def run(pixels: npt.NDArray[Any]) -> npt.NDArray[np.float32]:
        output: npt.NDArray[np.float32] = session.run(None, {name: pixels})[0]
        return output

    return Executor(run, max_parallel_batches, BATCH_PER_CORE if max_parallel_batches > 1 or options.intra_op_num_threads == 1 else None)


EXECUTORS: dict[str, Callable[[NormalizeInput, int, int], Executor]] = {"onnx": _onnx_executor, "torch": _torch_executor}


def _exported(network: NormalizeInput, size: int) -> bytes:
    """The network as an ONNX graph, from the cache if it was exported before."""
    file = _export_file(network, size)
    with suppress(OSError):
        return file.read_bytes()
    LOG.info("exporting the network to ONNX (once, then cached)")
    example = torch.zeros(2, size, size, 3, dtype=network.input_dtype)
    with torch.no_grad():
        program = torch.onnx.export(network, (example,), dynamo=True, dynamic_shapes=({0: torch.export.Dim("batch")},), verbose=False)
    assert program is not None
    graph: bytes = program.model_proto.SerializeToString()
    with suppress(OutputError), atomic_write(file) as work:  # if it cannot be cached, the next call exports again
        work.write_bytes(graph)
    return graph


def _export_file(network: nn.Module, size: int) -> Path:
    """Cache file of the export of this network, its versions of torch and timm, and this input size."""
    key = hashlib.sha256(repr([FORMAT, size, network_hash(network)]).encode()).hexdigest()[:20]
    return cache_dir() / "executors" / f"{key}.onnx"


def flip_tta(forward: Executor, pixels: npt.NDArray[np.uint8], classes: int) -> npt.NDArray[np.float32]:
    """Average the first `classes` columns of the outputs for (N, size, size, 3) pixels and their mirror images."""
    output, mirrored = map(forward, flip_views(pixels, True))
    return np.concatenate([(output[:, :classes] + mirrored[:, :classes]) / 2, output[:, classes:]], axis=1)
