"""Convolutions: DequantizeLinear on the kernel, QuantizeLinear/DequantizeLinear before it, and behind it in a chain."""

from __future__ import annotations

from typing import Any, NamedTuple

import onnx_ir as ir
import torch

from qat_plugin.exporting.float32_runtime import bias_unit, integer_bias
from qat_plugin.exporting.onnx.activations import ZERO_POINT, calibrated, hand_on, per_token_numbers, quantized
from qat_plugin.exporting.onnx.graph import Graph
from qat_plugin.exporting.onnx.options import Options
from qat_plugin.exporting.onnx.weights import UINT8, Weight
from qat_plugin.numerics import ACTIVATION_QMAX


class Reader(NamedTuple):
    """The layer that a convolution's output is rounded for.

    Attributes:
        weight: its own.
        positive: a ReLU lies between.
    """

    weight: Weight
    positive: bool


def convolution(
    graph: Graph,
    x: ir.Value,
    bias: ir.Value | None,
    weight: Weight,
    attributes: dict[str, Any],
    options: Options,
    reader: Reader | None = None,
) -> ir.Value:
    """Conv on what the integers stand for.

    Args:
        graph: to put it into.
        x: [batch, channels, *size].
        bias: [out], float: left as trained, but INT32 with a ``reader``.
        weight: of the layer.
        attributes: Conv's ``strides``, ``pads``, ``dilations`` and ``group``.
        options: of the file.
        reader: that the output is rounded for, of :mod:`~qat_plugin.exporting.onnx.chaining`.
    """
    if weight.scheme.static:
        x = calibrated(graph, x, weight, options)
    elif weight.scheme.quantizes_activations:
        x = per_token_numbers(graph, x, weight.label)
    if reader is not None:
        return _in_integers(graph, x, bias, weight, attributes, options, reader)
    y = graph.emit("Conv", [x, _kernel(graph, weight)], weight.label, **attributes)
    if bias is None:
        return y
    ones = [1] * len(attributes["strides"])  # an addition of its own: ONNX Runtime rounds a Conv's bias to INT32
    return graph.emit("Add", [y, graph.emit("Reshape", [bias, graph.integers(-1, *ones)], weight.label)], weight.label)


def _in_integers(
    graph: Graph, x: ir.Value, bias: ir.Value | None, weight: Weight, attributes: dict[str, Any], options: Options,
    reader: Reader,
) -> ir.Value:  # fmt: skip
    inputs = [x, _kernel(graph, weight), *([] if bias is None else [_integer_bias(graph, bias, weight)])]
    y = graph.emit("Conv", inputs, weight.label, **attributes)
    q, scale, zero = quantized(graph, y, reader.weight, weight.label, options)
    least = zero if reader.positive else graph.constant(ZERO_POINT - ACTIVATION_QMAX, UINT8)
    numbers = graph.emit("DequantizeLinear", [graph.emit("Max", [q, least], weight.label), scale, zero], weight.label)
    hand_on(graph, numbers, reader.weight)
    return numbers


def _integer_bias(graph: Graph, bias: ir.Value, weight: Weight) -> ir.Value:
    """In units of the integer products, as QLinearConv adds it: the nearest INT32."""
    assert bias.const_value is not None
    numbers = torch.from_numpy(bias.const_value.numpy().copy())
    unit = bias_unit(weight.layer.weight)
    q = integer_bias(numbers, unit).to(torch.int32).numpy()
    held = graph.tensor(f"{weight.name}.bias_q", ir.DataType.INT32, q.shape, lambda: q)
    scale = weight.vector("bias_scale", unit)
    return graph.emit("DequantizeLinear", [held, scale], weight.label, axis=0)


def _kernel(graph: Graph, weight: Weight) -> ir.Value:
    held = weight.kernel()
    inputs = [held.q, held.scale, *([] if held.zero_point is None else [held.zero_point])]
    if weight.groups == 1:
        return graph.emit("DequantizeLinear", inputs, weight.label, axis=0)
    size = weight.in_features // weight.groups
    flat = graph.emit("DequantizeLinear", inputs, weight.label, axis=1, block_size=size)
    return graph.emit("Reshape", [flat, graph.integers(*weight.layer.weight.logical_shape)], weight.label)
