"""INT8 activations in standard operators, on the integers that training saw.

Per token (dynamic)::

    s = absmax(x) / 127, 1 where that is 0      q = Round(x / s)        (half to even, as in training)

The integers go to MatMulInteger as uint8 with zero point 128: the same numbers, on the path that x86 has instructions
for (int8 activations take ONNX Runtime's reference path there).

Calibrated (static)::

    QuantizeLinear(Clip(x, -127 s)) -> DequantizeLinear

QuantizeLinear rounds as training does, but reaches -128, which the project's grid has not: hence the Clip, left out
where the input cannot be negative. For ONNX Runtime these integers are bytes with zero point 128 as well.
"""

from __future__ import annotations

from typing import Final, NamedTuple

import onnx_ir as ir

from qat_plugin.exporting.onnx.graph import Graph
from qat_plugin.exporting.onnx.options import Options
from qat_plugin.exporting.onnx.weights import INT8, UINT8, Weight

_QMAX: Final = 127
ZERO_POINT: Final = 128
_NEVER_NEGATIVE: Final = ("Relu", "Sigmoid", "Softmax", "Abs")


class Rounded(NamedTuple):
    """An activation's integers as float32, and their scales [..., 1]."""

    q: ir.Value
    scale: ir.Value


def divided(graph: Graph, x: ir.Value, weight: Weight) -> ir.Value:
    """The input of a layer whose columns carry a scale."""
    input_scale = weight.layer.weight.input_scale
    if input_scale is None:
        return x
    return graph.emit("Div", [x, weight.vector("input_scale", input_scale)], weight.label)


def per_token(graph: Graph, x: ir.Value, label: str) -> Rounded:
    """Integers of each row on a scale of its own; made once for all layers that read ``x``."""
    key = ("per token", x)
    if key not in graph.once:
        # rows so small that 127 divides to a subnormal could pass 127 by rounding: their products are 0 all the same
        absmax = graph.emit("ReduceMax", [graph.emit("Abs", [x], label), graph.integers(-1)], label, keepdims=1)
        scale = graph.emit("Div", [absmax, graph.floats(_QMAX)], label)
        empty = graph.emit("Equal", [scale, graph.floats(0.0)], label)
        scale = graph.emit("Where", [empty, graph.floats(1.0), scale], label)
        graph.once[key] = Rounded(graph.emit("Round", [graph.emit("Div", [x, scale], label)], label), scale)
    rounded: Rounded = graph.once[key]
    return rounded


def per_token_bytes(graph: Graph, x: ir.Value, label: str) -> Rounded:
    """The same integers as uint8 with zero point 128."""
    key = ("per token, bytes", x)
    if key not in graph.once:
        rounded = per_token(graph, x, label)
        shifted = graph.emit("Add", [rounded.q, graph.floats(ZERO_POINT)], label)
        graph.once[key] = Rounded(graph.emit("Cast", [shifted], label, to=UINT8), rounded.scale)
    rounded_bytes: Rounded = graph.once[key]
    return rounded_bytes


def per_token_numbers(graph: Graph, x: ir.Value, label: str) -> ir.Value:
    """The numbers that the integers stand for."""
    key = ("per token, numbers", x)
    if key not in graph.once:
        rounded = per_token(graph, x, label)
        graph.once[key] = graph.emit("Mul", [rounded.q, rounded.scale], label)
    numbers: ir.Value = graph.once[key]
    return numbers


def calibrated(graph: Graph, x: ir.Value, weight: Weight, options: Options) -> ir.Value:
    """Through QuantizeLinear and DequantizeLinear on the layer's own scale."""
    key = _key(x, weight)
    if key not in graph.once:
        producer, own = x.producer(), x
        if producer is None or producer.op_type not in _NEVER_NEGATIVE:
            own = graph.emit("Clip", [x, graph.floats(-_QMAX * key[2])], weight.label)
        q, *grid = quantized(graph, own, weight, weight.label, options)
        graph.once[key] = graph.emit("DequantizeLinear", [q, *grid], weight.label)
    numbers: ir.Value = graph.once[key]
    return numbers


def quantized(
    graph: Graph, x: ir.Value, reader: Weight, label: str, options: Options
) -> tuple[ir.Value, ir.Value, ir.Value]:
    """Integers on the calibrated scale of a layer, the scale, and the zero point.

    They are bytes with zero point 128 for ONNX Runtime, whose x86 kernels take those; TensorRT asks for zero point 0.
    """
    held = reader.layer.weight.activation_scale
    assert held is not None
    zero = graph.constant(0, INT8) if options.target == "tensorrt" else graph.constant(ZERO_POINT, UINT8)
    scale = reader.vector("activation_scale", held.reshape(()))
    return graph.emit("QuantizeLinear", [x, scale, zero], label), scale, zero


def hand_on(graph: Graph, numbers: ir.Value, reader: Weight) -> None:
    """Let a layer, and others of its scale, read numbers that lie on it as they are."""
    graph.once[_key(numbers, reader)] = numbers


def _key(x: ir.Value, weight: Weight) -> tuple[str, ir.Value, float]:
    held = weight.layer.weight.activation_scale
    assert held is not None
    return "calibrated", x, float(held)
