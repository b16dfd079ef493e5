"""Linear layers: which operator each scheme is, and its nodes."""

from __future__ import annotations

from typing import Final

import onnx_ir as ir

from qat_plugin.exporting.contents import Layer
from qat_plugin.exporting.onnx.activations import (
    ZERO_POINT,
    calibrated,
    divided,
    per_token_bytes,
    per_token_numbers,
)
from qat_plugin.exporting.onnx.graph import Graph
from qat_plugin.exporting.onnx.layout import Blocks
from qat_plugin.exporting.onnx.options import Options
from qat_plugin.exporting.onnx.weights import FLOAT, UINT8, Weight

CONTRIB: Final = "com.microsoft"
_RESULT = {"matmulnbits": "MatMulNBits", "dequantize": "DequantizeLinear", "cast": "Cast"}


def operator_of(layer: Layer, options: Options) -> str:
    """The operator that reads a linear layer's integers.

    Returns:
        ``"MatMulInteger"`` (integer products), ``"MatMulNBits"``, ``"DequantizeLinear"`` or ``"Cast"`` (numbers made
        from the integers, then MatMul).
    """
    scheme = layer.scheme
    whole_rows = scheme.group_size is None or scheme.group_size >= layer.weight.in_features
    if scheme.weight_bits == 8 and whole_rows and scheme.quantizes_activations:
        return "DequantizeLinear" if scheme.static else "MatMulInteger"
    wanted = options.spelling_of_int8 if scheme.weight_bits == 8 else options.spelling_of_int4
    if wanted == "matmulnbits" and Blocks.of(layer) is None:
        wanted = "cast"
    return _RESULT[wanted]


def product(graph: Graph, x: ir.Value, weight: Weight, options: Options) -> ir.Value:
    """``x @ weight.T`` [..., N], without the bias.

    Args:
        graph: to put it into.
        x: [..., K].
        weight: of the layer.
        options: of the file.
    """
    label, scheme = weight.label, weight.scheme
    x = divided(graph, x, weight)
    operator = operator_of(weight.layer, options)
    if operator == "MatMulInteger":
        return _integer_product(graph, x, weight)
    if scheme.static:
        x = calibrated(graph, x, weight, options)
    elif scheme.quantizes_activations:
        x = per_token_numbers(graph, x, label)
    if operator == "MatMulNBits":
        return _block_product(graph, x, weight, options)
    return graph.emit("MatMul", [x, numbers(graph, weight, operator)], label)


def numbers(graph: Graph, weight: Weight, operator: str) -> ir.Value:
    """The numbers [K, N] that the integers stand for; made once for all that read the weight.

    Args:
        graph: to put it into.
        weight: of the layer.
        operator: ``"DequantizeLinear"``, or ``"Cast"`` for plain arithmetic, which no runtime fuses with what reads it.
    """
    key = ("numbers", weight.name)
    if key not in graph.once:
        make = _dequantized if operator == "DequantizeLinear" else _computed
        graph.once[key] = make(graph, weight)
    made: ir.Value = graph.once[key]
    return made


def _dequantized(graph: Graph, weight: Weight) -> ir.Value:
    held = weight.columns()
    inputs = [held.q, held.scale, *([] if held.zero_point is None else [held.zero_point])]
    if weight.groups > 1:
        size = weight.in_features // weight.groups
        return graph.emit("DequantizeLinear", inputs, weight.label, axis=0, block_size=size)
    return graph.emit("DequantizeLinear", inputs, weight.label, axis=1)


def _computed(graph: Graph, weight: Weight) -> ir.Value:
    """``(q - zero point) * scale``, a group at a time; exact in float32, and folded by a runtime when it loads."""
    label, held = weight.label, weight.columns()
    grouped = weight.groups > 1
    q = graph.emit("Cast", [held.q], label, to=FLOAT)
    if grouped:
        cut = graph.integers(weight.groups, weight.in_features // weight.groups, weight.out_features)
        q = graph.emit("Reshape", [q, cut], label)
    axis = graph.integers(1)
    if held.zero_point is not None:
        zero = graph.emit("Cast", [held.zero_point], label, to=FLOAT)
        q = graph.emit("Sub", [q, graph.emit("Unsqueeze", [zero, axis], label) if grouped else zero], label)
    scale = graph.emit("Unsqueeze", [held.scale, axis], label) if grouped else held.scale
    made = graph.emit("Mul", [q, scale], label)
    if grouped:
        made = graph.emit("Reshape", [made, graph.integers(weight.in_features, weight.out_features)], label)
    return made


def _block_product(graph: Graph, x: ir.Value, weight: Weight, options: Options) -> ir.Value:
    blocks = Blocks.of(weight.layer)
    assert blocks is not None
    held = weight.blocks(blocks)
    level = {"accuracy_level": options.accuracy_level} if options.accuracy_level else {}
    return graph.emit(
        "MatMulNBits", [x, held.q, held.scale, *([] if held.zero_point is None else [held.zero_point])], weight.label,
        domain=CONTRIB, K=blocks.columns, N=blocks.rows, bits=blocks.bits, block_size=blocks.size, **level,
    )  # fmt: skip


def _integer_product(graph: Graph, x: ir.Value, weight: Weight) -> ir.Value:
    label, held = weight.label, weight.columns()
    q, scale = per_token_bytes(graph, x, label)
    zeros = [graph.constant(ZERO_POINT, UINT8), *([] if held.zero_point is None else [held.zero_point])]
    sums = graph.emit("Cast", [graph.emit("MatMulInteger", [q, held.q, *zeros], label)], label, to=FLOAT)
    return graph.emit("Mul", [graph.emit("Mul", [sums, scale], label), held.scale], label)
