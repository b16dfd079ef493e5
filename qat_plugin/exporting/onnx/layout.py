"""Our integers in the layouts of ONNX's operators: MatMulNBits' blocks, and the columns that MatMul reads."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from qat_plugin.exporting.contents import Layer
from qat_plugin.numerics import Quantized

_LARGEST_BLOCK = 256
_CHANNEL_BLOCK = 128
_LEAST_BLOCK = 16

Array = np.ndarray[Any, Any]


class Unpacked:
    """The integers of the layer asked for last: q, scales and zero points are written one after the other."""

    def __init__(self) -> None:
        self._name, self._integers = "", None

    _integers: Quantized | None

    def __call__(self, name: str, layer: Layer) -> Quantized:
        """Of one layer."""
        if self._integers is None or self._name != name:
            self._integers = None
            self._name, self._integers = name, layer.integers
        return self._integers


@dataclass(frozen=True)
class Blocks:
    """MatMulNBits' layout of an [N, K] weight.

    Values are unsigned (a symmetric integer plus half the range), of 4 bits two to a byte with the first in the low
    nibble; rows are cut into blocks of a power of two of at least 16, the last of them filled up. Scales are repeated
    where a group of ours is several blocks.

    Attributes:
        rows, columns: N and K.
        bits: 4 or 8; 3- and 2-bit integers lie in 4 bits.
        size: weights of a block.
        group: weights of a group of ours.
    """

    rows: int
    columns: int
    bits: int
    size: int
    group: int

    @classmethod
    def of(cls, layer: Layer) -> Blocks | None:
        """The blocks of a layer, or ``None`` where its groups are no multiple of a block."""
        scheme, weight = layer.scheme, layer.weight
        bits = 8 if scheme.weight_bits == 8 else 4
        if scheme.group_size is None or scheme.group_size >= weight.in_features:
            return cls(weight.out_features, weight.in_features, bits, _CHANNEL_BLOCK, weight.in_features)
        power = scheme.group_size & -scheme.group_size
        size = min(power, _LARGEST_BLOCK)
        if size < _LEAST_BLOCK:
            return None
        return cls(weight.out_features, weight.in_features, bits, size, scheme.group_size)

    @property
    def count(self) -> int:
        """Blocks of a row."""
        return -(-self.columns // self.size)

    @property
    def bytes_of_block(self) -> int:
        """Of its values."""
        return self.size * self.bits // 8

    @property
    def bytes_of_zeros(self) -> int:
        """Of a row's zero points."""
        return -(-self.count * self.bits // 8)

    def values(self, held: Quantized) -> Array:
        """uint8 [N, blocks, bytes of a block]."""
        half = 1 << (self.bits - 1)
        fill = half if held.scheme.symmetric else 0
        values = np.full((self.rows, self.count * self.size), fill, np.uint8)
        offset = half if held.scheme.symmetric else 0
        values[:, : self.columns] = _array(held.q).view(np.uint8) + np.uint8(offset)  # wraps as two's complement does
        blocks: Array = self._packed(values).reshape(self.rows, self.count, self.bytes_of_block)
        return blocks

    def scales(self, held: Quantized) -> Array:
        """float32 [N, blocks]."""
        return self._repeated(_array(held.scale))

    def zeros(self, held: Quantized) -> Array:
        """uint8 [N, bytes of a row's zero points]; of asymmetric schemes."""
        assert held.zero_point is not None
        return self._packed(self._repeated(_array(held.zero_point)))

    def _repeated(self, grouped: Array) -> Array:
        if grouped.shape[1] == 1:
            whole: Array = np.broadcast_to(grouped, (self.rows, self.count)).copy()
            return whole
        return np.repeat(grouped, self.group // self.size, axis=1)

    def _packed(self, values: Array) -> Array:
        return values if self.bits == 8 else _paired(values)


def nibbles(held: Quantized) -> Array:
    """Rows of unsigned 4-bit values, two to a byte, low nibble first: uint8 [N, ceil(K / 2)]; symmetric ones plus 8."""
    return _paired(_array(held.q).view(np.uint8) + np.uint8(8 if held.scheme.symmetric else 0))


def _paired(values: Array) -> Array:
    if values.shape[1] % 2:
        values = np.pad(values, ((0, 0), (0, 1)))
    pairs: Array = values[:, 0::2] | (values[:, 1::2] << 4)
    return pairs


def columns(held: Quantized) -> Array:
    """[K, N], the orientation in which MatMul reads a weight."""
    return _array(held.q.t())


def column_scales(grouped: torch.Tensor) -> Array:
    """Scales or zero points [N, groups] as DequantizeLinear takes them for :func:`columns`: [groups, N], [N] or []."""
    if grouped.numel() == 1:
        return _array(grouped.reshape(()))
    return _array(grouped.reshape(-1) if grouped.shape[1] == 1 else grouped.t())


def _array(tensor: torch.Tensor) -> Array:
    array: Array = tensor.detach().cpu().contiguous().numpy()
    return array
