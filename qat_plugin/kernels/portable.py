"""The kernel that runs everywhere: integers are turned into numbers for each product, by plain PyTorch operators.

It computes exactly what the fake-quantized layer computes, so its output is equal to the last bit where the order of
summation is. It saves memory, not time.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from qat_plugin.kernels.packing import pack, packed_columns, unpack
from qat_plugin.kernels.scales import ANY_SCALES
from qat_plugin.kernels.table import ConvCall, Kernel, LayerSpec, Packed
from qat_plugin.numerics import Quantized, dequantize, fake_quantize_activation
from qat_plugin.scheme import Scheme

if TYPE_CHECKING:
    from qat_plugin.kernels.weight import QuantizedWeight


class Portable(Kernel):
    """Packed rows, dequantized for each product (or, for an embedding, row by row)."""

    name = "dequantize"
    scale_dtypes = ANY_SCALES
    convolves = True

    def serves(self, scheme: Scheme, device: torch.device) -> bool:
        """Every integer scheme, everywhere."""
        return scheme.is_integer

    def nbytes(self, spec: LayerSpec) -> int:
        """Packed rows, two bytes a scale (four, of float32 ones), one a zero point."""
        rows = spec.out_features * packed_columns(spec.in_features, spec.scheme.weight_bits)
        return rows + spec.scales * (spec.scale_dtype.itemsize + (0 if spec.scheme.symmetric else 1))

    def note(self, spec: LayerSpec) -> str:
        """It is slower than a float layer, unless it only looks rows up."""
        if spec.usage == "embedding":
            return ""
        if spec.scheme.weight_bits < 4:
            return f"reference kernel for {spec.scheme.weight_bits}-bit weights: saves memory, slower than bf16"
        return "saves memory, slower than bf16"

    def pack(self, quantized: Quantized, spec: LayerSpec) -> Packed:
        """Rows of packed integers, scales in the type that holds them exactly."""
        return Packed(
            pack(quantized.q, quantized.scheme.weight_bits),
            quantized.scale.to(spec.scale_dtype),
            quantized.zero_point,
        )

    def unpack(self, weight: QuantizedWeight) -> Quantized:
        """Integers, with float32 scales."""
        scheme = weight.scheme
        q = unpack(weight.data_, scheme.weight_bits, weight.in_features, signed=scheme.symmetric)
        return Quantized(q, weight.scale.float(), weight.zero_point, scheme)

    def linear(self, x: Tensor, weight: QuantizedWeight) -> Tensor:
        """The fake-quantized layer's own arithmetic."""
        if weight.scheme.quantizes_activations:
            x = fake_quantize_activation(x, weight.activation_scale)
        return F.linear(x, self.unpack(weight).dequantize(x.dtype))

    def convolution(self, x: Tensor, weight: QuantizedWeight, bias: Tensor | None, call: ConvCall) -> Tensor:
        """The fake-quantized layer's own arithmetic."""
        if weight.scheme.quantizes_activations:
            x = fake_quantize_activation(x, weight.activation_scale)
        kernel = weight.dequantize(x.dtype)
        convolve = F.conv1d if kernel.dim() == 3 else F.conv2d
        return convolve(x, kernel, bias, call.stride, call.padding, call.dilation, weight.groups)

    def embedding(self, ids: Tensor, weight: QuantizedWeight) -> Tensor:
        """Gathers packed rows, then dequantizes only those."""
        scheme, flat = weight.scheme, ids.reshape(-1)
        # index_select refuses negative ids, as F.embedding does; indexing would wrap them around
        q = unpack(weight.data_.index_select(0, flat), scheme.weight_bits, weight.in_features, signed=scheme.symmetric)
        scale, zero_point = weight.scale, weight.zero_point
        if not scheme.per_tensor:
            scale, zero_point = scale[flat], None if zero_point is None else zero_point[flat]
        rows = dequantize(q, scale, zero_point, weight.dtype)
        return rows.reshape(*ids.shape, weight.in_features)
