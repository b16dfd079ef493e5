"""Convolutions: DequantizeLinear on the kernel, and QuantizeLinear/DequantizeLinear before it."""

from __future__ import annotations

from typing import Any

import onnx_ir as ir

from qat_plugin.exporting.onnx.activations import calibrated, per_token_numbers
from qat_plugin.exporting.onnx.graph import Graph
from qat_plugin.exporting.onnx.weights import Weight


def convolution(
    graph: Graph, x: ir.Value, bias: ir.Value | None, weight: Weight, attributes: dict[str, Any]
) -> ir.Value:
    """Conv on what the integers stand for.

    Args:
        graph: to put it into.
        x: [batch, channels, *size].
        bias: [out], float: left as trained.
        weight: of the layer.
        attributes: Conv's ``strides``, ``pads``, ``dilations`` and ``group``.
    """
    if weight.scheme.static:
        x = calibrated(graph, x, weight)
    elif weight.scheme.quantizes_activations:
        x = per_token_numbers(graph, x, weight.label)
    inputs = [x, _kernel(graph, weight), *([] if bias is None else [bias])]
    return graph.emit("Conv", inputs, weight.label, **attributes)


def _kernel(graph: Graph, weight: Weight) -> ir.Value:
    held = weight.kernel()
    inputs = [held.q, held.scale, *([] if held.zero_point is None else [held.zero_point])]
    if weight.groups == 1:
        return graph.emit("DequantizeLinear", inputs, weight.label, axis=0)
    size = weight.in_features // weight.groups
    flat = graph.emit("DequantizeLinear", inputs, weight.label, axis=1, block_size=size)
    return graph.emit("Reshape", [flat, graph.integers(*weight.layer.weight.logical_shape)], weight.label)
