"""Preprocessing -> ONNX graph: RGB images of any size to the network's squares, equal to `transforms.render` to the last bit."""

from __future__ import annotations

from typing import Any, cast

import onnx
import onnx.inliner
from onnx import TensorProto, compose, helper
from onnxscript import DOUBLE, INT64, UINT8, script
from onnxscript import opset20 as op

from seewhy.errors import ConfigError
from seewhy.models.transforms import Preprocessing

OPSET, IR = 20, 10
BLOCKS = 8  # a side, at most: each needs no more of the image than it reaches
REACH = {"bilinear": 1.0, "bicubic": 2.0}  # half the width of the filter, in pixels of the smaller image


def square_graph(preprocessing: Preprocessing) -> onnx.ModelProto:
    """images (N, H, W, 3) uint8 -> squares (N, 3, S, S) uint8.

    PyTorch resizes bytes in whole numbers, one side after the other, the width first: weights in 16 bits, the sum rounded to bytes.
    The graph does that sum in float64, which holds it exactly, as matrix products with the weights.
    The square of an image that is one already is the image. ConfigError for an interpolation that PyTorch does not do on bytes.
    """
    if preprocessing.interpolation not in REACH:
        raise ConfigError(f"interpolation {preprocessing.interpolation!r} cannot be part of an ONNX file; bilinear and bicubic can")
    size, reach, cubic = preprocessing.size, REACH[preprocessing.interpolation], preprocessing.interpolation == "bicubic"
    side_length = float(size)
    blocks = max(count for count in range(1, BLOCKS + 1) if size % count == 0)
    rows, tripled = size // blocks, 3 * size
    share = helper.make_tensor("share", TensorProto.DOUBLE, [1], [preprocessing.crop])

    @script()
    def tent(t: DOUBLE) -> DOUBLE:
        return op.Max(1.0 - op.Abs(t), op.CastLike(0.0, t))

    @script()
    def keys(t: DOUBLE) -> DOUBLE:
        """Cubic convolution with a = -0.5 (Keys 1981)."""
        x = op.Abs(t)
        near = (1.5 * x - 2.5) * x * x + 1.0
        far = ((-0.5 * x + 2.5) * x - 4.0) * x + 2.0
        return op.Where(x < 1.0, near, op.Where(x < 2.0, far, 0.0 * x))

    filter_of = keys if cubic else tent

    @script()
    def one_side(lines: UINT8[...], length: INT64[...]) -> UINT8[...]:
        """(N, length, M) -> (N, S, M). Lines of the square are made `rows` at a time, from those lines of the image that they reach."""
        n = op.Cast(length, to=TensorProto.DOUBLE)
        scale = n / side_length
        wide = op.Max(scale, op.CastLike(1.0, scale))
        support = reach * wide
        place = op.Cast(op.Range(0, size, 1), to=TensorProto.DOUBLE)
        centre = op.Reshape(scale * (place + 0.5), op.Constant(value_ints=[blocks, rows, 1]))
        low = op.Floor(op.Max(centre - support + 0.5, op.CastLike(0.0, scale)))
        high = op.Min(op.Floor(centre + support + 0.5), n)
        first = op.ReduceMin(low, op.Constant(value_ints=[1]))  # (blocks, 1, 1): where each block begins in the image
        longest = op.ReduceMax(op.ReduceMax(high, op.Constant(value_ints=[1])) - first, keepdims=0)
        step = op.Range(op.CastLike(0.0, longest), longest, op.CastLike(1.0, longest))
        pixel = first + step
        # Of each line of the image in each of the square: (blocks, rows, longest), rows summing to 1.
        values = filter_of((pixel - centre + 0.5) * (1.0 / wide))
        values = op.Where(op.And(pixel >= low, pixel < high), values, 0.0 * values)
        fine = values / op.ReduceSum(values, op.Constant(value_ints=[2]))
        # As many binary places as 16 bits hold of the largest weight, 22 at most.
        doubled = op.Pow(2.0, op.Cast(op.Range(1, 23, 1), to=TensorProto.FLOAT))
        fits = op.Floor(op.ReduceMax(fine, keepdims=0) * op.Cast(doubled, to=TensorProto.DOUBLE) + 0.5) < 32768.0
        unit = op.Pow(op.CastLike(2.0, fine), op.ReduceSum(op.Cast(fits, to=TensorProto.DOUBLE), keepdims=0))
        whole = op.Sign(fine) * op.Floor(op.Abs(fine) * unit + 0.5)
        reached = op.Cast(op.Min(op.Squeeze(pixel, op.Constant(value_ints=[1])), n - 1.0), to=TensorProto.INT64)
        sums = op.MatMul(whole, op.Cast(op.Gather(lines, reached, axis=1), to=TensorProto.DOUBLE))
        rounded = op.Clip(op.Floor(sums / unit + 0.5), op.CastLike(0.0, sums), op.CastLike(255.0, sums))
        return op.Reshape(op.Cast(rounded, to=TensorProto.UINT8), op.Constant(value_ints=[0, size, -1]))

    @script()
    def whole_image(images: UINT8[...]) -> UINT8[...]:
        return op.Identity(images)

    @script()
    def centred_square(images: UINT8[...]) -> UINT8[...]:
        """The square of `crop` times the short side in the middle, at whole pixels."""
        sides = op.Cast(op.Shape(images, start=1, end=3), to=TensorProto.DOUBLE)
        side = op.ReduceMin(sides, keepdims=1) * op.Constant(value=share)
        low = (sides - side) * 0.5
        first = op.Cast(op.Round(low), to=TensorProto.INT64)
        last = op.Cast(op.Round(low + side), to=TensorProto.INT64)
        return op.Slice(images, first, last, op.Constant(value_ints=[1, 2]))

    cut_out = centred_square if preprocessing.resize == "crop" else whole_image

    @script()
    def to_squares(images: UINT8[...]) -> UINT8[...]:
        cut = cut_out(images)
        sides = op.Shape(cut, start=1, end=3)
        if op.ReduceMin(op.Cast(sides == size, to=TensorProto.INT64), keepdims=0) == 1:
            squares = op.Transpose(cut, perm=[0, 3, 1, 2])
        else:
            columns = op.Reshape(op.Transpose(cut, perm=[0, 2, 3, 1]), op.Constant(value_ints=[0, 0, -1]))
            narrow = op.Reshape(one_side(columns, op.Shape(cut, start=2, end=3)), op.Constant(value_ints=[0, size, 3, -1]))
            lines = op.Reshape(op.Transpose(narrow, perm=[0, 3, 2, 1]), op.Constant(value_ints=[0, 0, tripled]))
            square = op.Reshape(one_side(lines, op.Shape(cut, start=1, end=2)), op.Constant(value_ints=[0, size, 3, size]))
            squares = op.Transpose(square, perm=[0, 2, 1, 3])
        return squares

    model = onnx.inliner.inline_local_functions(cast(Any, to_squares).to_model_proto(ir_version=IR))
    # A prefix, so that no name is also one of the graph that is put behind it.
    model = compose.add_prefix(model, "square_", rename_inputs=False, rename_outputs=False)
    shapes: dict[str, list[str | int]] = {"images": ["batch", "height_in", "width_in", 3], "network_input": ["batch", 3, size, size]}
    (given,), (found,) = model.graph.input, model.graph.output
    model.graph.node[-1].output[0] = "network_input"  # onnxscript numbers what two branches assign
    given.CopyFrom(helper.make_tensor_value_info("images", TensorProto.UINT8, shapes["images"]))
    found.CopyFrom(helper.make_tensor_value_info("network_input", TensorProto.UINT8, shapes["network_input"]))
    return model
