"""The package's own kernels for AVX512-VNNI: INT8 and INT4 weights, INT8 or float activations, any number of rows.

The weight lies in one layout for all of them, blocks of 64 output channels (``native/src/linear.h`` draws it). INT8
activations meet it in integer products whose group sums are scaled in registers. Float activations meet the integers as
bf16 numbers, which hold them exactly: bf16 activations as they are, fp16 ones as sums of two bf16 numbers, float32 ones
as sums of three, or, for many rows, in float32. So nothing is rounded but sums in float32 and the output.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from qat_plugin.kernels.table import Kernel, LayerSpec, Packed
from qat_plugin.native import available, native
from qat_plugin.numerics import Quantized
from qat_plugin.scheme import Scheme

if TYPE_CHECKING:
    from qat_plugin.kernels.weight import QuantizedWeight

_BLOCK = 64  # output channels
_STEP = 8  # inputs
# Of each eight inputs, those in the low and in the high halves of four bytes.
_LOW, _HIGH = [0, 4, 1, 5], [2, 6, 3, 7]
# Weights from which the kernels beat bf16 at any number of rows: one row by 64 x 64 takes 1.6 to 2.4 times as long, by
# 128 x 128 0.4 to 0.8 times (two threads of a Zen 4).
_WORTH_A_CALL = 1 << 14
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


class _NativeCpu(Kernel):
    scale_dtypes = (torch.bfloat16, torch.float16)
    bits: int

    @property
    def _zero(self) -> int:
        """What the stored unsigned integer of a zero weight is."""
        return 1 << (self.bits - 1)

    def serves(self, scheme: Scheme, device: torch.device) -> bool:
        """Weights of its bits on CPUs."""
        return device.type == "cpu" and scheme.weight_bits == self.bits and scheme.is_integer

    def refusal(self, spec: LayerSpec) -> str | None:
        """Symmetric linears on AVX512-VNNI."""
        if spec.usage != "linear":
            return "cannot look its packed weight up by row"
        if not spec.scheme.symmetric:
            return "needs symmetric weights"
        if spec.dtype not in _DTYPES:
            return f"needs a fp32, bf16 or fp16 model, this one is {str(spec.dtype).removeprefix('torch.')}"
        if spec.scheme.group_size is not None and spec.scheme.group_size % _STEP:
            return f"needs groups that are multiples of {_STEP}"
        if not available():
            return f"is not built ({native().reason or 'switched off'})"
        if native().instruction_set == "portable":
            return "needs AVX512-VNNI"
        return None

    def nbytes(self, spec: LayerSpec) -> int:
        """``bits`` a weight and two bytes a scale, in blocks of 64 channels by eight inputs."""
        rows, columns = -(-spec.out_features // _BLOCK) * _BLOCK, -(-spec.in_features // _STEP) * _STEP
        groups = spec.in_features // spec.scheme.group_size if spec.scheme.group_size else 1
        return rows * columns * self.bits // 8 + 2 * rows * groups

    def note(self, spec: LayerSpec) -> str:
        """Only where calling it costs more than the product."""
        small = spec.out_features * spec.in_features < _WORTH_A_CALL
        return "slower than bf16 at this small size, for few rows" if small else ""

    def pack(self, quantized: Quantized, spec: LayerSpec) -> Packed:
        """Unsigned integers in blocks, padded with zero weights; scales [blocks, groups, 64] (exact)."""
        rows, columns = spec.out_features, spec.in_features
        blocks, steps = -(-rows // _BLOCK), -(-columns // _STEP)
        if (rows, columns) == (blocks * _BLOCK, steps * _STEP):
            u = quantized.q.view(torch.uint8) + self._zero
        else:
            u = torch.full((blocks * _BLOCK, steps * _STEP), self._zero, dtype=torch.uint8)
            u[:rows, :columns] = quantized.q.view(torch.uint8) + self._zero
        if self.bits == 8:
            data = u.view(blocks, _BLOCK, 2 * steps, 4).transpose(1, 2).contiguous()
        else:
            eights = u.view(blocks, _BLOCK, steps, _STEP).transpose(1, 2)
            data = eights[..., _HIGH].bitwise_left_shift_(4).bitwise_or_(eights[..., _LOW]).contiguous()
        scale = quantized.scale.to(spec.scale_dtype)
        padded = scale.new_zeros(blocks * _BLOCK, scale.shape[1])
        padded[:rows] = scale  # a scale per tensor is a scale per channel here
        return Packed(data, padded.view(blocks, _BLOCK, -1).transpose(1, 2).contiguous())

    def unpack(self, weight: QuantizedWeight) -> Quantized:
        """The integers back from the blocks."""
        rows, columns, scheme, data = weight.out_features, weight.in_features, weight.scheme, weight.data_
        blocks, steps = data.shape[0], -(-columns // _STEP)
        if self.bits == 8:
            u = data.transpose(1, 2).reshape(blocks * _BLOCK, steps * _STEP)
        else:
            eights = data.new_empty(blocks, _BLOCK, steps, _STEP)
            eights[..., _LOW] = (data & 15).transpose(1, 2)
            eights[..., _HIGH] = (data >> 4).transpose(1, 2)
            u = eights.view(blocks * _BLOCK, steps * _STEP)
        q = (u[:rows, :columns] - self._zero).view(torch.int8)
        scale = weight.scale.transpose(1, 2).reshape(blocks * _BLOCK, -1)[:rows].float()
        return Quantized(q, scale[:1, :1] if scheme.per_tensor else scale, None, scheme)

    def linear(self, x: Tensor, weight: QuantizedWeight) -> Tensor:
        """By the native operator."""
        return self.biased(x, weight, None)

    def biased(self, x: Tensor, weight: QuantizedWeight, bias: Tensor | None) -> Tensor:
        """By the native operator; the bias is added in float32, before the output is rounded."""
        y: Tensor = torch.ops.qat_plugin_native.linear(
            x, weight.data_, weight.scale, bias, weight.activation_scale,
            weight.out_features, weight.in_features, self.bits, weight.scheme.quantizes_activations,
        )  # fmt: skip
        return y


class NativeInt8(_NativeCpu):
    """w8a8 (dynamic and static) and w8a16, per channel, per tensor or per group."""

    name = "native-int8"
    bits = 8


class NativeInt4(_NativeCpu):
    """w4a8 and w4a16, per group, per channel or per tensor."""

    name = "native-int4"
    bits = 4
