"""The initializers of one quantized weight, in the layout that its operator reads; each is in the file once."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import onnx_ir as ir

from qat_plugin.exporting.contents import Layer
from qat_plugin.exporting.onnx.graph import Graph
from qat_plugin.exporting.onnx.layout import Blocks, Unpacked, column_scales, columns, nibbles
from qat_plugin.numerics import Quantized

FLOAT, UINT8, INT8 = ir.DataType.FLOAT, ir.DataType.UINT8, ir.DataType.INT8


class Held(NamedTuple):
    """Values of a graph: integers, scales and, of asymmetric schemes, zero points."""

    q: ir.Value
    scale: ir.Value
    zero_point: ir.Value | None


class Weight:
    """One quantized weight on its way into a graph.

    Args:
        graph: it goes into.
        name: of the parameter.
        layer: it is of.
        unpacked: shared by all weights.

    Attributes:
        label: what its nodes are called after: the layer's name.
        scheme: of the integers.
        out_features, in_features: N and K.
        groups: scales of one row.
    """

    def __init__(self, graph: Graph, name: str, layer: Layer, unpacked: Unpacked) -> None:
        self.graph, self.name, self.layer, self._unpacked = graph, name, layer, unpacked
        self.label, self.scheme = layer.name, layer.scheme
        self.out_features, self.in_features = layer.weight.out_features, layer.weight.in_features
        size = layer.scheme.group_size
        self.groups = 1 if size is None else self.in_features // size

    @property
    def type(self) -> ir.DataType:
        """The integers' type where they are one element each."""
        if self.scheme.weight_bits == 8:
            return INT8 if self.scheme.symmetric else UINT8
        return ir.DataType.INT4 if self.scheme.symmetric else ir.DataType.UINT4

    def columns(self) -> Held:
        """[K, N], with scales [groups, N], [N] or []."""
        shape = self._scale_shape()
        return self._held(
            (self.in_features, self.out_features), self.type, columns, shape,
            lambda held: column_scales(held.scale), lambda held: column_scales(_zeros(held)), self.type,
        )  # fmt: skip

    def blocks(self, blocks: Blocks) -> Held:
        """As MatMulNBits reads them."""
        return self._held(
            (blocks.rows, blocks.count, blocks.bytes_of_block), UINT8, blocks.values, (blocks.rows, blocks.count),
            blocks.scales, blocks.zeros, UINT8, (blocks.rows, blocks.bytes_of_zeros),
        )  # fmt: skip

    def rows(self) -> Held:
        """[N, K] of 8 bits, or [N, ceil(K / 2)] of two values a byte; scales and zero points [N, groups]."""
        grouped = (1 if self.scheme.per_tensor else self.out_features, self.groups)
        if self.scheme.weight_bits == 8:
            shape, dtype, values = (self.out_features, self.in_features), self.type, _q
        else:
            shape, dtype, values = (self.out_features, -(-self.in_features // 2)), UINT8, nibbles
        return self._held(
            shape, dtype, values, grouped, lambda held: held.scale.numpy(), lambda held: _zeros(held).numpy(), UINT8
        )

    def kernel(self) -> Held:
        """A convolution's: [out, in / groups, *size] with scales [out] or []; [out, K] where K is cut into groups."""
        shape = tuple(self.layer.weight.logical_shape) if self.groups == 1 else (self.out_features, self.in_features)
        scales: tuple[int, ...] = self._scale_shape()
        if self.groups > 1:
            scales = (self.out_features, self.groups)
        return self._held(
            shape, self.type, lambda held: _q(held).reshape(shape), scales,
            lambda held: held.scale.numpy().reshape(scales), lambda held: _zeros(held).numpy().reshape(scales),
            self.type,
        )  # fmt: skip

    def vector(self, suffix: str, values: Any) -> ir.Value:
        """A float32 tensor that belongs to the weight."""
        array = values.detach().float().cpu().numpy()
        return self.graph.tensor(f"{self.name}.{suffix}", FLOAT, array.shape, lambda: array)

    def _scale_shape(self) -> tuple[int, ...]:
        if self.groups > 1:
            return (self.groups, self.out_features)
        return () if self.scheme.per_tensor or self.out_features == 1 else (self.out_features,)

    def _held(
        self,
        shape: tuple[int, ...],
        dtype: ir.DataType,
        values: Callable[[Quantized], Any],
        scale_shape: tuple[int, ...],
        scales: Callable[[Quantized], Any],
        zeros: Callable[[Quantized], Any],
        zero_dtype: ir.DataType,
        zero_shape: tuple[int, ...] | None = None,
    ) -> Held:
        def made(what: Callable[[Quantized], Any], shape: tuple[int, ...]) -> Callable[[], Any]:
            def make() -> Any:
                array = np.asarray(what(self._unpacked(self.name, self.layer)))
                assert array.size == math.prod(shape), (self.name, array.shape, shape)
                return array.reshape(shape)

            return make

        zero_shape = zero_shape or scale_shape
        tensor = self.graph.tensor
        q = tensor(f"{self.name}.q", dtype, shape, made(values, shape))
        scale = tensor(f"{self.name}.scale", FLOAT, scale_shape, made(scales, scale_shape))
        if self.scheme.symmetric:
            return Held(q, scale, None)
        return Held(q, scale, tensor(f"{self.name}.zero_point", zero_dtype, zero_shape, made(zeros, zero_shape)))


def _q(held: Quantized) -> Any:
    return held.q.contiguous().numpy()


def _zeros(held: Quantized) -> Any:
    assert held.zero_point is not None
    return held.zero_point
