"""Kernels of CUDA devices: the operators that torchao's own CUDA tensors call, on this package's integers.

INT4 is tinygemm's tile-packed product (torchao's ``Int4TilePackedTo4dTensor``), INT8 by INT8 is cuBLASLt's integer
product (torchao's ``Int8Tensor``), INT8 weight-only a float product with the scale applied after it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from qat_plugin.kernels.scales import ANY_SCALES
from qat_plugin.kernels.table import Kernel, LayerSpec, Packed
from qat_plugin.numerics import Quantized, quantize_activation
from qat_plugin.scheme import Scheme

if TYPE_CHECKING:
    from qat_plugin.kernels.weight import QuantizedWeight

_INNER_K_TILES = 8
_GROUPS = (32, 64, 128, 256)
_INT_MM_LEAST_ROWS = 32  # cuBLASLt's integer product takes more than 16 rows


def _capability(device: torch.device) -> tuple[int, int]:
    """The device's compute capability; Ampere's when planning on a machine without one."""
    return torch.cuda.get_device_capability(device) if torch.cuda.is_available() else (8, 0)


class CudaInt8(Kernel):
    """w8a8: per-token (or calibrated) INT8 activations, exact integer product."""

    name = "cublas-int8"
    scale_dtypes = ANY_SCALES

    def serves(self, scheme: Scheme, device: torch.device) -> bool:
        """INT8 weights by INT8 activations on CUDA."""
        return device.type == "cuda" and scheme.weight_bits == 8 and scheme.quantizes_activations

    def refusal(self, spec: LayerSpec) -> str | None:
        """Symmetric per-channel or per-tensor linears with both sizes multiples of 8."""
        if spec.usage != "linear":
            return "does not look rows up"
        if not spec.scheme.symmetric or spec.scheme.granularity == "group":
            return "needs symmetric weights with a scale per channel or tensor"
        if spec.in_features % 8 or spec.out_features % 8:
            return f"needs sizes that are multiples of 8, not {spec.out_features} x {spec.in_features}"
        return None

    def nbytes(self, spec: LayerSpec) -> int:
        """A byte a weight, four a channel."""
        return spec.out_features * (spec.in_features + 4)

    def note(self, spec: LayerSpec) -> str:
        """Activations are quantized by separate kernels."""
        return "below about 16 rows slower than bf16 in eager mode"

    def pack(self, quantized: Quantized, spec: LayerSpec) -> Packed:
        """Plain int8 rows and a float32 scale per channel."""
        scale = quantized.scale.reshape(-1).expand(spec.out_features).contiguous()
        return Packed(quantized.q.contiguous(), scale)

    def unpack(self, weight: QuantizedWeight) -> Quantized:
        """The same rows."""
        scheme = weight.scheme
        scale = weight.scale[:1].reshape(1, 1) if scheme.per_tensor else weight.scale.reshape(-1, 1)
        return Quantized(weight.data_, scale, None, scheme)

    def linear(self, x: Tensor, weight: QuantizedWeight) -> Tensor:
        """Integer product, exact; then the two scales."""
        q, scale = quantize_activation(x, weight.activation_scale)
        tokens = q.shape[0]
        integers = F.pad(q, (0, 0, 0, max(0, _INT_MM_LEAST_ROWS - tokens))).to(torch.int8)
        y = torch._int_mm(integers, weight.data_.t())[:tokens]
        return (y.to(torch.float32) * weight.scale * scale).to(x.dtype)


class CudaInt8WeightOnly(Kernel):
    """w8a16: the integers as a float matrix, the scale applied to the product."""

    name = "cuda-int8-weight-only"

    def serves(self, scheme: Scheme, device: torch.device) -> bool:
        """INT8 weight-only on CUDA."""
        return device.type == "cuda" and scheme.weight_bits == 8 and not scheme.quantizes_activations

    def refusal(self, spec: LayerSpec) -> str | None:
        """Symmetric per-channel linears; in fp16 the unscaled product could overflow."""
        if spec.usage != "linear":
            return "does not look rows up"
        if not spec.scheme.symmetric or spec.scheme.granularity != "channel":
            return "needs symmetric weights with a scale per channel"
        if spec.dtype == torch.float16:
            return "needs a bf16 or float32 model: its unscaled product could overflow fp16"
        return None

    def nbytes(self, spec: LayerSpec) -> int:
        """A byte a weight, two a channel."""
        return spec.out_features * (spec.in_features + 2)

    def note(self, spec: LayerSpec) -> str:
        """It pays once fused."""
        return "saves memory; slower than bf16 unless compiled with torch.compile"

    def pack(self, quantized: Quantized, spec: LayerSpec) -> Packed:
        """Plain int8 rows; scales in bf16 (exact)."""
        return Packed(quantized.q.contiguous(), quantized.scale.reshape(-1).to(torch.bfloat16))

    def unpack(self, weight: QuantizedWeight) -> Quantized:
        """The same rows."""
        return Quantized(weight.data_, weight.scale.reshape(-1, 1).float(), None, weight.scheme)

    def linear(self, x: Tensor, weight: QuantizedWeight) -> Tensor:
        """``(x q^T) scale``."""
        return F.linear(x, weight.data_.to(x.dtype)) * weight.scale.to(x.dtype)


class CudaInt4(Kernel):
    """w4a16-gN and w4a8-gN in bf16 by tinygemm; INT8 activations enter as integers, which bf16 holds exactly."""

    name = "tinygemm-int4"

    def serves(self, scheme: Scheme, device: torch.device) -> bool:
        """INT4 weights on CUDA, activations left alone or INT8 per token."""
        return device.type == "cuda" and scheme.weight_bits == 4 and not scheme.static

    def refusal(self, spec: LayerSpec) -> str | None:
        """Grouped symmetric INT4 linears in bf16 on Ampere or later."""
        if spec.usage != "linear":
            return "cannot look its packed weight up by row"
        if spec.scheme.group_size not in _GROUPS:
            return f"needs groups of {', '.join(map(str, _GROUPS))}"
        if not spec.scheme.symmetric:
            return "takes its zero points in bf16, which does not hold (8 - z) x scale exactly"
        if spec.dtype != torch.bfloat16:
            return f"needs a bf16 model, this one is {str(spec.dtype).removeprefix('torch.')}"
        if spec.out_features % 8 or spec.in_features % (_INNER_K_TILES * 16):
            return (
                f"needs out_features a multiple of 8 and in_features of {_INNER_K_TILES * 16}, "
                f"not {spec.out_features} x {spec.in_features}"
            )
        if _capability(spec.device) < (8, 0):
            return "needs compute capability 8.0"
        return None

    def nbytes(self, spec: LayerSpec) -> int:
        """Half a byte a weight, four bytes a group."""
        return spec.out_features * spec.in_features // 2 + 4 * spec.scales

    def note(self, spec: LayerSpec) -> str:
        """Tinygemm saves bandwidth: it wins at few rows."""
        return "above about 8 rows it can be slower than bf16"

    def pack(self, quantized: Quantized, spec: LayerSpec) -> Packed:
        """Tiles of nibbles; scale and zero interleaved as [groups, N, 2] in bf16, ``w = (q - 8) scale + zero``."""
        unsigned = (quantized.q.to(torch.int32) + 8).to(torch.uint8)
        pairs = (unsigned[:, ::2] << 4) | unsigned[:, 1::2]
        tiles = torch.ops.aten._convert_weight_to_int4pack(pairs.contiguous(), _INNER_K_TILES)
        scale_and_zero = torch.stack([quantized.scale, torch.zeros_like(quantized.scale)], dim=-1)
        return Packed(tiles, scale_and_zero.transpose(0, 1).contiguous().to(torch.bfloat16))

    def unpack(self, weight: QuantizedWeight) -> Quantized:
        """Integers back from the product with the identity: ``(q - 8)`` with all scales 1 is exact in bf16."""
        unit = torch.zeros_like(weight.scale)
        unit[..., 0] = 1.0
        identity = torch.eye(weight.in_features, dtype=torch.bfloat16, device=weight.device)
        q = self._tinygemm(identity, weight, unit).t().contiguous().to(torch.int8)
        scale = weight.scale[..., 0].transpose(0, 1).contiguous().float()
        return Quantized(q, scale, None, weight.scheme)

    def linear(self, x: Tensor, weight: QuantizedWeight) -> Tensor:
        """By tinygemm; INT8 activations as integers, their scale after the product."""
        if not weight.scheme.quantizes_activations:
            return self._tinygemm(x.to(torch.bfloat16), weight, weight.scale).to(x.dtype)
        q, scale = quantize_activation(x)
        return (self._tinygemm(q.to(torch.bfloat16), weight, weight.scale).float() * scale).to(x.dtype)

    @staticmethod
    def _tinygemm(x: Tensor, weight: QuantizedWeight, scale_and_zero: Tensor) -> Tensor:
        y: Tensor = torch.ops.aten._weight_int4pack_mm(
            x.contiguous(), weight.data_, weight.scheme.group_size, scale_and_zero
        )
        return y
