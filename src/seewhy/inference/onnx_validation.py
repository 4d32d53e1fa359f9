"""Check untrusted ONNX graphs: refuse what could do more than compute outputs from images."""

from __future__ import annotations

from collections.abc import Iterator

import onnx
from google.protobuf.message import DecodeError  # installed with onnx

from seewhy.errors import RunError, reason_of

DOMAINS = frozenset({"", "ai.onnx", "com.microsoft"})  # operators of ONNX and ONNX Runtime; none reads files or uses the network
LOOPS = frozenset({"Loop", "Scan", "SequenceMap"})
INPUT = "images"


def check_graph(data: bytes, name: str, outputs: dict[str, int]) -> bytes:
    """Return the graph serialised anew, so that ONNX Runtime gets what was checked: raw bytes can be read in two ways.

    Raises RunError unless the graph takes `images` (N, H, W, 3) uint8 and gives some of `outputs`, name -> rank, in one pass.
    Refused are weights in other files, operators of other domains, and loops, which could be endless.
    Memory and time of the allowed operators are not bounded.
    """
    try:
        model = onnx.load_model_from_string(data)
    except (DecodeError, ValueError, RecursionError) as error:
        raise RunError(f"{name}: not a readable ONNX file ({reason_of(error, 80)}); export the run again") from error
    for problem in _problems(model, outputs):
        raise RunError(f"{name}: {problem}, unlike any file of `seewhy export`; use a file from a source you trust")
    checked: bytes = model.SerializeToString()
    return checked


def _problems(model: onnx.ModelProto, outputs: dict[str, int]) -> Iterator[str]:
    if model.functions or model.training_info:
        yield "defines its own functions or training"
    for graph in _graphs(model.graph):
        if graph.sparse_initializer:
            yield "holds sparse tensors"
        tensors = list(graph.initializer)
        for node in graph.node:
            if node.domain not in DOMAINS:
                yield f"uses operators of {node.domain[:60]!r}"
            if node.op_type in LOOPS:
                yield f"has a loop ({node.op_type})"
            for attribute in node.attribute:
                if attribute.HasField("sparse_tensor") or attribute.sparse_tensors:
                    yield "holds sparse tensors"
                tensors += [*([attribute.t] if attribute.HasField("t") else []), *attribute.tensors]
        if any(tensor.external_data or tensor.data_location == onnx.TensorProto.EXTERNAL for tensor in tensors):
            yield "reads weights from other files"
    weights = {tensor.name for tensor in model.graph.initializer}
    inputs = [value for value in model.graph.input if value.name not in weights]
    if [value.name for value in inputs] != [INPUT]:
        yield f"takes inputs other than {INPUT}"
    elif (inputs[0].type.tensor_type.elem_type, len(inputs[0].type.tensor_type.shape.dim)) != (onnx.TensorProto.UINT8, 4):
        yield f"takes {INPUT} of another type or shape"
    ranks = {value.name: len(value.type.tensor_type.shape.dim) for value in model.graph.output}
    if not ranks or any(outputs.get(output) != rank for output, rank in ranks.items()):
        yield f"gives unknown outputs ({', '.join(ranks)[:80] or 'none'})"


def _graphs(graph: onnx.GraphProto) -> Iterator[onnx.GraphProto]:
    """Yield the graph and all graphs nested in its nodes: the branches of an If."""
    yield graph
    for node in graph.node:
        for attribute in node.attribute:
            for inner in [*([attribute.g] if attribute.HasField("g") else []), *attribute.graphs]:
                yield from _graphs(inner)
