"""INT8 kernels of x86 CPUs: oneDNN's u8 x s8 product for INT8 activations, ATen's for 16-bit ones."""

from __future__ import annotations

import platform
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from qat_plugin.kernels.scales import ANY_SCALES
from qat_plugin.kernels.table import Kernel, LayerSpec, Packed
from qat_plugin.numerics import Quantized, activation_scale, quantize_activation
from qat_plugin.scheme import Scheme

if TYPE_CHECKING:
    from qat_plugin.kernels.weight import QuantizedWeight

# x86 multiplies unsigned by signed bytes; signed activations would fall onto a reference path without AMX.
_ACTIVATION_ZERO_POINT = 128
# ATen's INT8 product reads whole vectors of a row, past its end where they do not divide it: wrong numbers, or a crash.
_ATEN_VECTOR = 16
_ALIGNMENT = 64
_ONEDNN_BLOCK = 64  # of its layout on AVX512
# Weights from which the integer product saves more than quantizing its input costs (0.7-0.9 of bf16's speed at
# 1024 x 1024, 1.6-2.0 at 4096 x 4096, for 1 to 128 rows on one thread of an AVX512-BF16 x86).
_WORTH_QUANTIZING_INPUT = 1 << 21


def int8_linear(x: Tensor, packed: Tensor, weight_scale: Tensor, static_scale: Tensor | None) -> Tensor:
    """``x W^T`` of INT8 by INT8.

    Args:
        x: [tokens, in_features], any float type.
        packed: oneDNN's layout of the int8 weight.
        weight_scale: float32 [out_features].
        static_scale: float32 scalar, or ``None`` for a scale per token.
    """
    q, scale = quantize_activation(x, activation_scale(x) if static_scale is None else static_scale)
    unsigned = (q + _ACTIVATION_ZERO_POINT).to(torch.uint8)
    zero_points = torch.zeros(weight_scale.numel(), dtype=torch.int32)
    y = torch.ops.onednn.qlinear_pointwise(
        unsigned, 1.0, _ACTIVATION_ZERO_POINT, packed, weight_scale, zero_points,
        None, 1.0, 0, torch.float32, "none", [], "",
    )  # fmt: skip
    result: Tensor = (y * scale).to(x.dtype)
    return result


# Inductor cannot lower the raw oneDNN operator; eager calls skip the custom operator's dispatch.
_compiled_int8_linear = torch.library.custom_op("qat_plugin::int8_linear", int8_linear, mutates_args=())


@_compiled_int8_linear.register_fake
def _(x: Tensor, packed: Tensor, weight_scale: Tensor, static_scale: Tensor | None) -> Tensor:
    return x.new_empty(x.shape[0], weight_scale.numel())


class OneDnnInt8(Kernel):
    """w8a8: per-token (or calibrated) uint8 activations with zero point 128, weights prepacked once."""

    name = "onednn-int8"
    scale_dtypes = ANY_SCALES

    def serves(self, scheme: Scheme, device: torch.device) -> bool:
        """INT8 weights by INT8 activations on CPUs."""
        return device.type == "cpu" and scheme.weight_bits == 8 and scheme.quantizes_activations

    def refusal(self, spec: LayerSpec) -> str | None:
        """Symmetric per-channel or per-tensor linears on x86."""
        if not torch.backends.mkldnn.is_available() or platform.machine().lower() not in ("x86_64", "amd64"):
            return "needs an x86 CPU with oneDNN"
        if spec.usage != "linear":
            return "cannot look its packed weight up by row"
        if not spec.scheme.symmetric or spec.scheme.granularity == "group":
            return "needs symmetric weights with a scale per channel or tensor"
        return None

    def note(self, spec: LayerSpec) -> str:
        """In a small layer, quantizing the input costs more than the product saves."""
        if spec.out_features * spec.in_features < _WORTH_QUANTIZING_INPUT:
            return "slower than bf16 at this small size"
        return ""

    def nbytes(self, spec: LayerSpec) -> int:
        """A byte a weight and four a channel in blocks of 64 (oneDNN keeps compensations there), and the scales."""
        rows, columns = (-(-size // _ONEDNN_BLOCK) * _ONEDNN_BLOCK for size in (spec.out_features, spec.in_features))
        return rows * (columns + 4) + 4 * spec.out_features

    def pack(self, quantized: Quantized, spec: LayerSpec) -> Packed:
        """oneDNN's blocked layout (it transposes [N, K] itself) and a float32 scale per channel."""
        scale = quantized.scale.reshape(-1).expand(spec.out_features).contiguous()
        return Packed(torch.ops.onednn.qlinear_prepack(quantized.q.contiguous(), None), scale)

    def unpack(self, weight: QuantizedWeight) -> Quantized:
        """Back from the blocked layout."""
        scheme = weight.scheme
        scale = weight.scale[:1].reshape(1, 1) if scheme.per_tensor else weight.scale.reshape(-1, 1)
        return Quantized(weight.data_.to_dense().t().contiguous(), scale, None, scheme)

    def linear(self, x: Tensor, weight: QuantizedWeight) -> Tensor:
        """Integer product, exact; then one multiplication by the two scales."""
        product = _compiled_int8_linear if torch.compiler.is_compiling() else int8_linear
        y: Tensor = product(x, weight.data_, weight.scale, weight.activation_scale)
        return y


class AtenInt8(Kernel):
    """w8a16 in bf16: ATen's product for few rows; the dequantized weight in a float product above that."""

    name = "aten-int8"
    # Rows up to which ATen's kernel wins over dequantizing into a bf16 product: one thread of an AVX512-BF16 x86 has
    # the crossing near 30 rows at 1024 x 1024 and 130 at 4096 x 4096.
    few_rows = 64

    def serves(self, scheme: Scheme, device: torch.device) -> bool:
        """INT8 weight-only on CPUs."""
        return device.type == "cpu" and scheme.weight_bits == 8 and not scheme.quantizes_activations

    def refusal(self, spec: LayerSpec) -> str | None:
        """Symmetric per-channel linears in bf16; its other types are reference code."""
        if spec.usage != "linear":
            return "does not look rows up"
        if not spec.scheme.symmetric or spec.scheme.granularity != "channel":
            return "needs symmetric weights with a scale per channel"
        if spec.in_features % _ATEN_VECTOR:
            return f"needs in_features ({spec.in_features}) to be a multiple of {_ATEN_VECTOR}"
        if spec.dtype != torch.bfloat16:
            return f"needs a bf16 model, this one is {str(spec.dtype).removeprefix('torch.')}"
        return None

    def nbytes(self, spec: LayerSpec) -> int:
        """A byte a weight, two a channel."""
        return spec.out_features * (spec.in_features + 2)

    def note(self, spec: LayerSpec) -> str:
        """Weight-only INT8 saves bandwidth, not arithmetic."""
        return "slower than bf16 above about 4 rows a call"

    def pack(self, quantized: Quantized, spec: LayerSpec) -> Packed:
        """Plain int8 rows, aligned (a tensor mapped from a file need not be, and ATen's loads crash on it)."""
        rows = quantized.q.contiguous()
        rows = rows.clone() if rows.data_ptr() % _ALIGNMENT else rows
        return Packed(rows, quantized.scale.reshape(-1).to(torch.bfloat16))

    def unpack(self, weight: QuantizedWeight) -> Quantized:
        """The same rows."""
        return Quantized(weight.data_, weight.scale.reshape(-1, 1).float(), None, weight.scheme)

    def linear(self, x: Tensor, weight: QuantizedWeight) -> Tensor:
        """By ATen up to ``few_rows`` rows, by a float product above."""
        if x.dtype == torch.bfloat16 and x.shape[0] <= self.few_rows:
            y: Tensor = torch.ops.aten._weight_int8pack_mm(x.contiguous(), weight.data_, weight.scale)
            return y
        return F.linear(x, self.unpack(weight).dequantize(x.dtype))
