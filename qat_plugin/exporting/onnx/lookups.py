"""Embeddings: rows of integers are gathered, and only those become numbers."""

from __future__ import annotations

import onnx_ir as ir

from qat_plugin.exporting.onnx.graph import Graph
from qat_plugin.exporting.onnx.layout import Blocks
from qat_plugin.exporting.onnx.options import Options
from qat_plugin.exporting.onnx.products import numbers, operator_of
from qat_plugin.exporting.onnx.weights import FLOAT, UINT8, Held, Weight


def lookup(graph: Graph, ids: ir.Value, weight: Weight, options: Options) -> ir.Value:
    """Rows of the weight, [*ids, K].

    A table that a head shares is read in the head's layout, so that the file holds it once.

    Args:
        graph: to put it into.
        ids: integers of any shape.
        weight: of the embedding.
        options: of the file.
    """
    rank = len(ids.shape or ())
    if weight.layer.weight.usage == "both":
        operator = operator_of(weight.layer, options)
        if operator == "MatMulNBits":
            return _from_blocks(graph, ids, weight, rank)
        if weight.scheme.weight_bits == 8 and weight.groups == 1 and options.target != "tensorrt":
            return _from_columns(graph, ids, weight, rank)
        return _column_rows(graph, numbers(graph, weight, operator), ids, weight, rank)
    if options.target == "tensorrt":
        return _column_rows(graph, numbers(graph, weight, "DequantizeLinear"), ids, weight, rank)
    return _from_rows(graph, ids, weight, rank)


def _from_rows(graph: Graph, ids: ir.Value, weight: Weight, rank: int) -> ir.Value:
    held = weight.rows()
    q = graph.emit("Gather", [held.q, ids], weight.label, axis=0)
    width = weight.in_features
    if weight.scheme.weight_bits < 8:
        q, width = _split_bytes(graph, q, rank, -(-width // 2), weight.label), width + width % 2
    q = graph.emit("Cast", [q], weight.label, to=FLOAT)
    if width != weight.in_features:
        q = _cut(graph, q, weight)
    if weight.scheme.per_tensor:
        return _numbers(graph, q, held.scale, held.zero_point, weight, rank, 1)
    scale = graph.emit("Gather", [held.scale, ids], weight.label, axis=0)
    zero = None if held.zero_point is None else graph.emit("Gather", [held.zero_point, ids], weight.label, axis=0)
    return _numbers(graph, q, scale, zero, weight, rank, weight.groups)


def _from_blocks(graph: Graph, ids: ir.Value, weight: Weight, rank: int) -> ir.Value:
    blocks = Blocks.of(weight.layer)
    assert blocks is not None
    held = Held(*(None if v is None else graph.emit("Gather", [v, ids], weight.label, axis=0)
                  for v in weight.blocks(blocks)))  # fmt: skip
    width = blocks.count * blocks.bytes_of_block
    q = graph.emit("Reshape", [held.q, graph.integers(*[0] * rank, width)], weight.label)
    zero = held.zero_point
    if blocks.bits == 4:
        q = _split_bytes(graph, q, rank, width, weight.label)
        zero = None if zero is None else _split_bytes(graph, zero, rank, blocks.bytes_of_zeros, weight.label)
    if zero is not None and blocks.bits == 4 and blocks.count % 2:
        zero = _sliced(graph, zero, blocks.count, weight.label)
    q = graph.emit("Cast", [q], weight.label, to=FLOAT)
    made = _numbers(graph, q, held.scale, zero, weight, rank, blocks.count, half=1 << (blocks.bits - 1))
    return _cut(graph, made, weight) if blocks.count * blocks.size != blocks.columns else made


def _from_columns(graph: Graph, ids: ir.Value, weight: Weight, rank: int) -> ir.Value:
    """Columns of [K, N], turned; each has one scale."""
    held = weight.columns()
    q = graph.emit("Cast", [_column_rows(graph, held.q, ids, weight, rank)], weight.label, to=FLOAT)
    if weight.scheme.per_tensor or weight.out_features == 1:
        return _numbers(graph, q, held.scale, held.zero_point, weight, rank, 1)
    last = graph.integers(-1)
    scale, zero = (
        None if v is None else graph.emit("Unsqueeze", [graph.emit("Gather", [v, ids], weight.label), last],
                                          weight.label)
        for v in (held.scale, held.zero_point)
    )  # fmt: skip
    assert scale is not None
    return _numbers(graph, q, scale, zero, weight, rank, 1)


def _column_rows(graph: Graph, table: ir.Value, ids: ir.Value, weight: Weight, rank: int) -> ir.Value:
    picked = graph.emit("Gather", [table, ids], weight.label, axis=1)
    return graph.emit("Transpose", [picked], weight.label, perm=[*range(1, rank + 1), 0])


def _numbers(
    graph: Graph, q: ir.Value, scale: ir.Value, zero: ir.Value | None, weight: Weight, rank: int, groups: int,
    *, half: int = 8,
) -> ir.Value:  # fmt: skip
    """``(q - zero point) * scale`` of float integers [*ids, K], scales [*ids, groups]."""
    label = weight.label
    if groups > 1:
        q = graph.emit("Reshape", [q, graph.integers(*[0] * rank, groups, -1)], label)
        scale = graph.emit("Unsqueeze", [scale, graph.integers(-1)], label)
        zero = None if zero is None else graph.emit("Unsqueeze", [zero, graph.integers(-1)], label)
    if zero is not None:
        q = graph.emit("Sub", [q, graph.emit("Cast", [zero], label, to=FLOAT)], label)
    elif weight.scheme.weight_bits < 8 or half > 8:
        q = graph.emit("Sub", [q, graph.floats(half)], label)
    made = graph.emit("Mul", [q, scale], label)
    return graph.emit("Reshape", [made, graph.integers(*[0] * rank, -1)], label) if groups > 1 else made


def _split_bytes(graph: Graph, packed: ir.Value, rank: int, width: int, label: str) -> ir.Value:
    """Two values of each byte, the low one first: [*ids, width] -> [*ids, 2 width]."""
    low = graph.emit("BitwiseAnd", [packed, graph.constant(15, UINT8)], label)
    high = graph.emit("BitShift", [packed, graph.constant(4, UINT8)], label, direction="RIGHT")
    last = graph.integers(-1)
    pairs = [graph.emit("Unsqueeze", [value, last], label) for value in (low, high)]
    both = graph.emit("Concat", pairs, label, axis=-1)
    return graph.emit("Reshape", [both, graph.integers(*[0] * rank, 2 * width)], label)


def _cut(graph: Graph, rows: ir.Value, weight: Weight) -> ir.Value:
    return _sliced(graph, rows, weight.in_features, weight.label)


def _sliced(graph: Graph, value: ir.Value, width: int, label: str) -> ir.Value:
    return graph.emit("Slice", [value, graph.integers(0), graph.integers(width), graph.integers(-1)], label)
