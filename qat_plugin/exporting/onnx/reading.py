"""Integers out of an ONNX file, by onnx's own reader and each operator's documented layout; none of it our packing."""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np

from qat_plugin.errors import ExportError

Array = np.ndarray[Any, Any]


class File:
    """A file's nodes by layer, and its tensors one at a time.

    Args:
        path: of ``model.onnx``; external data lies beside it.
    """

    def __init__(self, path: Path) -> None:
        import onnx

        self._folder, self._numpy = path.parent, onnx.numpy_helper
        self.graph = onnx.load(path, load_external_data=False).graph
        self.initializers = {entry.name: entry for entry in self.graph.initializer}
        self.nodes: dict[str, list[Any]] = defaultdict(list)
        for node in self.graph.node:
            self.nodes[node.name.split("/")[0]].append(node)

    def array(self, name: str) -> Array:
        """One tensor; 4-bit integers one element each."""
        array: Array = self._numpy.to_array(self.initializers[name], base_dir=str(self._folder))
        return array

    def operators(self, layer: str, *kinds: str) -> list[Any]:
        """Nodes of a layer, of some operators."""
        return [node for node in self.nodes[layer] if node.op_type in kinds]


def uses(file: File, layer: str) -> int:
    """How many times a layer's integers are read in the graph as quantized operators.

    A product counts where its weight comes from an integer initializer through nothing but the operators that make
    numbers of it; an embedding where rows of one are gathered.
    """
    makers = {output: node for node in file.nodes[layer] for output in node.output}
    counted = 0
    for node in file.operators(layer, "MatMulNBits", "MatMulInteger", "MatMul", "Conv"):
        counted += _from_integers(file, makers, node.input[1])
    for node in file.operators(layer, "Gather"):
        counted += node.input[0].endswith(".q") or _from_integers(file, makers, node.input[0], least=1)
    return counted


def has_integer_bias(file: File, layer: str) -> bool:
    """Whether a convolution's bias is made from integers."""
    makers = {output: node for node in file.nodes[layer] for output in node.output}
    biases = [makers.get(node.input[2]) for node in file.operators(layer, "Conv") if len(node.input) > 2]
    return any(node is not None and node.op_type == "DequantizeLinear" for node in biases)


_MAKERS = ("DequantizeLinear", "Cast", "Sub", "Mul", "Reshape")


def _from_integers(file: File, makers: dict[str, Any], name: str, least: int = 0) -> bool:
    for _ in range(16):
        if name in file.initializers:
            return least <= 0 and file.initializers[name].data_type in _integer_types()
        node = makers.get(name)
        if node is None or node.op_type not in _MAKERS:
            return False
        name, least = node.input[0], least - 1
    return False


def _integer_types() -> set[int]:
    from onnx import TensorProto

    return {TensorProto.INT8, TensorProto.UINT8, TensorProto.INT4, TensorProto.UINT4}


def integers(
    file: File, name: str, layer: str, rows: int, columns: int, groups: int, bits: int
) -> tuple[Array, Array, Array | None]:
    """A layer's integers, scales and zero points, [N, K] and [N, groups], as its operators in the file read them.

    Args:
        file: to read from.
        name: of the parameter.
        layer: whose it is.
        rows, columns: N and K.
        groups: scales of a row.
        bits: of the scheme, for gathered tables of two values a byte.

    Raises:
        ExportError: when no operator of the layer reads integers, or repeated scales differ.
    """
    blocks = file.operators(layer, "MatMulNBits")
    if blocks:
        return _of_blocks(file, blocks[0], rows, columns, groups)
    read = {entry for node in file.nodes[layer] for entry in node.input if entry in file.initializers}
    if f"{name}.q" not in read or f"{name}.scale" not in read:
        raise ExportError(f"{layer}: no operator of the file reads its integers and scales")
    q, scale = file.array(f"{name}.q"), file.array(f"{name}.scale")
    zero = file.array(f"{name}.zero_point") if f"{name}.zero_point" in read else None
    if file.operators(layer, "Conv"):
        return q.astype(np.int16).reshape(rows, -1), scale.reshape(-1, groups), _reshaped(zero, groups)
    if file.operators(layer, "MatMul", "MatMulInteger") or _gathers_columns(file, layer, name):
        return _of_columns(q, scale, zero, groups)
    if bits < 8:
        pairs = np.stack([q & 15, q >> 4], axis=-1).reshape(q.shape[0], -1)[:, :columns]
        q = pairs.astype(np.int16) - (8 if zero is None else 0)
    return q.astype(np.int16), scale, zero


def _gathers_columns(file: File, layer: str, name: str) -> bool:
    gathers = file.operators(layer, "Gather")
    return any(a.name == "axis" and a.i == 1 for node in gathers for a in node.attribute)


def _of_columns(q: Array, scale: Array, zero: Array | None, groups: int) -> tuple[Array, Array, Array | None]:
    def turned(grouped: Array | None) -> Array | None:
        if grouped is None:
            return None
        return grouped.astype(np.float32).T if grouped.ndim == 2 else grouped.astype(np.float32).reshape(-1, 1)

    scales = turned(scale)
    assert scales is not None
    return q.astype(np.int16).T, scales, turned(zero)


def _reshaped(zero: Array | None, groups: int) -> Array | None:
    return None if zero is None else zero.astype(np.int16).reshape(-1, groups)


def _of_blocks(file: File, node: Any, rows: int, columns: int, groups: int) -> tuple[Array, Array, Array | None]:
    """MatMulNBits: B [N, blocks, bytes], scales [N, blocks], zero points [N, bytes], the low nibble first."""
    attributes = {entry.name: entry.i for entry in node.attribute}
    if (attributes["N"], attributes["K"]) != (rows, columns):
        raise ExportError(f"{node.name} multiplies [{attributes['N']}, {attributes['K']}], not [{rows}, {columns}]")
    bits, size = attributes["bits"], attributes["block_size"]
    count = -(-columns // size)
    half = 1 << (bits - 1)
    q = _values(file.array(node.input[1]), bits).reshape(rows, count * size)[:, :columns].astype(np.int16)
    scale = _once(file.array(node.input[2]).reshape(rows, count), groups, node.name)
    if len(node.input) < 4:
        return q - half, scale, None
    zeros = _values(file.array(node.input[3]).reshape(rows, -1), bits)[:, :count]
    return q, scale, _once(zeros, groups, node.name)


def _values(packed: Array, bits: int) -> Array:
    if bits == 8:
        return packed
    low, high = packed & 0x0F, packed >> 4
    values: Array = np.stack([low, high], axis=-1).reshape(*packed.shape[:-1], -1)
    return values


def _once(repeated: Array, groups: int, name: str) -> Array:
    """Blocks of one group have one scale."""
    if groups == 1:
        first = repeated[:, :1]
        same = bool((repeated == first).all())
    else:
        split = repeated.reshape(repeated.shape[0], groups, -1)
        first, same = split[..., 0], bool((split == split[..., :1]).all())
    if not same:
        raise ExportError(f"{name}: blocks of one group have different scales")
    return first
