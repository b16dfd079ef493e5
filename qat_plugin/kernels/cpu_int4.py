"""The INT4 kernel of CPUs: ATen's tinygemm for few rows, an unpacked bf16 product above.

Layout on AVX512: blocks of 64 output channels; within a block, for each input, 32 bytes whose low nibbles are channels
0..31 and whose high nibbles are channels 32..63. Other instruction sets block differently, so that packing proves on
the spot that :func:`_unpack_blocks` inverts it and the kernel refuses where it does not.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from qat_plugin.kernels.table import Kernel, LayerSpec, Packed
from qat_plugin.numerics import Quantized, fake_quantize_activation, quantize_activation
from qat_plugin.scheme import Scheme

if TYPE_CHECKING:
    from qat_plugin.kernels.weight import QuantizedWeight

_BLOCK = 64
_GROUPS = (32, 64, 128, 256)


def _pack_blocks(q: Tensor) -> Tensor:
    """uint8-valued int32 [N, K] in 0..15 -> ATen's packed uint8 [N, K / 2]."""
    packed: Tensor = torch.ops.aten._convert_weight_to_int4pack_for_cpu(q, 1)
    return packed


def _unpack_blocks(packed: Tensor) -> Tensor:
    """ATen's packed uint8 [N, K / 2] -> uint8 [N, K] in 0..15."""
    rows, columns = packed.shape[0], packed.shape[1] * 2
    blocks = packed.reshape(rows // _BLOCK, columns, _BLOCK // 2)
    both = torch.stack([blocks & 0xF, blocks >> 4], dim=1)  # [blocks, half, K, 32]
    return both.permute(0, 1, 3, 2).reshape(rows, columns)


@functools.lru_cache(maxsize=1)
def layout_is_known() -> bool:
    """Whether this machine's packing is the one that :func:`_unpack_blocks` inverts; checked once, on real bytes."""
    q = (torch.arange(2 * _BLOCK * 64, dtype=torch.int32).reshape(2 * _BLOCK, 64) * 2654435761 >> 7) & 0xF
    return bool(torch.equal(_unpack_blocks(_pack_blocks(q)).to(torch.int32), q))


class AtenInt4(Kernel):
    """w4a16-gN and w4a8-gN in bf16; INT8 activations enter as integers in bf16, which holds them exactly."""

    name = "aten-int4"
    # Rows up to which tinygemm wins over unpacking into a bf16 product: one thread of an AVX512-BF16 x86, g32, has the
    # crossing near 120 rows at 1024 x 1024 and 240 at 4096 x 4096.
    few_rows = 128

    def serves(self, scheme: Scheme, device: torch.device) -> bool:
        """INT4 weights on CPUs, activations left alone or INT8 per token."""
        return device.type == "cpu" and scheme.weight_bits == 4 and not scheme.static

    def refusal(self, spec: LayerSpec) -> str | None:
        """Grouped symmetric INT4 linears in bf16 whose out_features are multiples of 64."""
        scheme = spec.scheme
        if spec.usage != "linear":
            return "cannot look its packed weight up by row"
        if scheme.group_size not in _GROUPS:
            return f"needs groups of {', '.join(map(str, _GROUPS))}"
        if not scheme.symmetric:
            return "takes its zero points in bf16, which does not hold (8 - z) x scale exactly"
        if spec.dtype != torch.bfloat16:
            return f"needs a bf16 model, this one is {str(spec.dtype).removeprefix('torch.')}"
        if spec.out_features % _BLOCK:
            return f"needs out_features ({spec.out_features}) to be a multiple of {_BLOCK}"
        if not layout_is_known():
            return "needs the AVX512 layout, which this CPU does not pack"
        return None

    def nbytes(self, spec: LayerSpec) -> int:
        """Half a byte a weight, four bytes a group."""
        return spec.out_features * spec.in_features // 2 + 4 * spec.scales

    def note(self, spec: LayerSpec) -> str:
        """Tinygemm saves bandwidth: it wins at few rows."""
        return "slower than bf16 above about 8 rows a call"

    def pack(self, quantized: Quantized, spec: LayerSpec) -> Packed:
        """Packed nibbles; scale and zero interleaved as [groups, N, 2] in bf16, ``w = (q - 8) scale + zero``."""
        scale_and_zero = torch.stack([quantized.scale, torch.zeros_like(quantized.scale)], dim=-1)
        packed = _pack_blocks(quantized.q.to(torch.int32) + 8)
        return Packed(packed, scale_and_zero.transpose(0, 1).contiguous().to(torch.bfloat16))

    def unpack(self, weight: QuantizedWeight) -> Quantized:
        """Integers back from the blocks."""
        q = _unpack_blocks(weight.data_).to(torch.int8) - 8
        scale = weight.scale[..., 0].transpose(0, 1).contiguous().float()
        return Quantized(q, scale, None, weight.scheme)

    def linear(self, x: Tensor, weight: QuantizedWeight) -> Tensor:
        """By tinygemm up to ``few_rows`` rows, by a float product above."""
        takes = x.dtype == torch.bfloat16 or weight.scheme.quantizes_activations  # their integers are exact in bf16
        if x.shape[0] > self.few_rows or not takes:
            if weight.scheme.quantizes_activations:
                x = fake_quantize_activation(x)
            return F.linear(x, self.unpack(weight).dequantize(x.dtype))
        if not weight.scheme.quantizes_activations:
            return self._tinygemm(x, weight)
        q, scale = quantize_activation(x)
        return (self._tinygemm(q.to(torch.bfloat16), weight).float() * scale).to(x.dtype)

    @staticmethod
    def _tinygemm(x: Tensor, weight: QuantizedWeight) -> Tensor:
        y: Tensor = torch.ops.aten._weight_int4pack_mm_for_cpu(
            x.contiguous(), weight.data_, weight.scheme.group_size, weight.scale
        )
        return y
