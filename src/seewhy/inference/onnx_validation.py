"""ONNX bytes -> RunError where they could do more than compute answers from images."""

from __future__ import annotations

from collections.abc import Iterator

import onnx
from google.protobuf.message import DecodeError  # comes with onnx

from seewhy.errors import RunError, reason_of

DOMAINS = frozenset({"", "ai.onnx", "com.microsoft"})  # operators of ONNX and ONNX Runtime; none of them reads files or talks to others
ENDLESS = frozenset({"Loop", "Scan", "SequenceMap"})
INPUT = "images"


def check_graph(data: bytes, name: str, outputs: dict[str, int]) -> bytes:
    """Return the graph as it was read here, for ONNX Runtime: raw bytes may say two things, so what it gets is what was checked.

    Raises RunError unless it takes `images` (N, H, W, 3) uint8 and gives some of `outputs`, of this rank each, in one pass.
    RequestRejected are weights in other files, operators from elsewhere, and loops, which could run for ever.
    How much memory and time the allowed operators take is not bounded by this.
    """
    try:
        model = onnx.load_model_from_string(data)
    except (DecodeError, ValueError, RecursionError) as error:
        raise RunError(f"{name}: not a readable ONNX file ({reason_of(error, 80)}); export the run again") from error
    for problem in _problems(model, outputs):
        raise RunError(f"{name}: {problem}, which no file of `seewhy export` does; use a file you know")
    checked: bytes = model.SerializeToString()
    return checked


def _problems(model: onnx.ModelProto, outputs: dict[str, int]) -> Iterator[str]:
    if model.functions or model.training_info:
        yield "brings functions or training of its own"
    for graph in _graphs(model.graph):
        if graph.sparse_initializer:
            yield "holds sparse tensors"
        tensors = list(graph.initializer)
        for node in graph.node:
            if node.domain not in DOMAINS:
                yield f"uses operators of {node.domain[:60]!r}"
            if node.op_type in ENDLESS:
                yield f"has a loop ({node.op_type})"
            for attribute in node.attribute:
                if attribute.HasField("sparse_tensor") or attribute.sparse_tensors:
                    yield "holds sparse tensors"
                tensors += [*([attribute.t] if attribute.HasField("t") else []), *attribute.tensors]
        if any(tensor.external_data or tensor.data_location == onnx.TensorProto.EXTERNAL for tensor in tensors):
            yield "takes weights from other files"
    held = {tensor.name for tensor in model.graph.initializer}
    asked = [value for value in model.graph.input if value.name not in held]
    if [value.name for value in asked] != [INPUT]:
        yield f"asks for other things than {INPUT}"
    elif (asked[0].type.tensor_type.elem_type, len(asked[0].type.tensor_type.shape.dim)) != (onnx.TensorProto.UINT8, 4):
        yield f"wants its {INPUT} in another form"
    ranks = {value.name: len(value.type.tensor_type.shape.dim) for value in model.graph.output}
    if not ranks or any(outputs.get(each) != rank for each, rank in ranks.items()):
        yield f"answers with {', '.join(ranks)[:80] or 'nothing'}"


def _graphs(graph: onnx.GraphProto) -> Iterator[onnx.GraphProto]:
    """The graph and those within it, the branches of an If."""
    yield graph
    for node in graph.node:
        for attribute in node.attribute:
            for inner in [*([attribute.g] if attribute.HasField("g") else []), *attribute.graphs]:
                yield from _graphs(inner)
