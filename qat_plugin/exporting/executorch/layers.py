"""Quantized layers spelled in the operators that XNNPACK's partitioner recognises, on our integers and scales."""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qat_plugin.exporting.executorch.columns import Columns
from qat_plugin.kernels.weight import QuantizedWeight
from qat_plugin.numerics import ACTIVATION_QMAX

Rounding = Literal["constants", "chained"]
"""How a layer's input becomes INT8: on our scale, per token or calibrated, with constants beside it (the output is
float); or on a calibrated scale by XNNPACK's static operators (the output is the next layer's INT8)."""

_TINY = torch.finfo(torch.float32).tiny
_TO_INTEGER = 1.5 * 2.0**23  # float32 numbers around it are the integers: adding it rounds, half to even


def register_operators() -> None:
    """Import what defines ``quantized_decomposed`` and ``torchao``'s operators."""
    import torch.ao.quantization.fx._decomposed

    from qat_plugin.kernels.torchao_import import import_torchao

    import_torchao()
    import torchao.quantization.quant_primitives  # noqa: F401


def rounded_per_token(x: Tensor) -> Tensor:
    """Rounded as XNNPACK rounds a row: INT8 from -128 to 127 with a zero point."""
    ao, block = torch.ops.torchao, [1] * (x.dim() - 1) + [x.shape[-1]]
    eps = torch.finfo(torch.float32).eps
    scale, zero = ao.choose_qparams_affine.default(
        x, "ASYMMETRIC", block, torch.int8, -128, 127, eps, torch.float32, torch.int8, True
    )
    q = ao.quantize_affine.default(x, block, scale, zero, torch.int8, -128, 127)
    y: Tensor = ao.dequantize_affine.default(q, block, scale, zero, torch.int8, -128, 127)
    return y


def rounded_statically(x: Tensor, scale: float) -> Tensor:
    """Rounded per tensor with zero point 0."""
    decomposed, bound = torch.ops.quantized_decomposed, int(ACTIVATION_QMAX)
    q = decomposed.quantize_per_tensor.default(x, scale, 0, -bound, bound, torch.int8)
    y: Tensor = decomposed.dequantize_per_tensor.default(q, scale, 0, -bound, bound, torch.int8)
    return y


class LoweredLinear(nn.Module):
    """One linear layer.

    Args:
        weight: ours.
        bias: [out_features] or ``None``.
        rounding: of the input.
    """

    def __init__(self, weight: QuantizedWeight, bias: Tensor | None, rounding: Rounding) -> None:
        super().__init__()
        held = weight.integers()
        self.rounding, self.narrow = rounding, held.scheme.weight_bits < 8
        self.columns = Columns.of(held.scheme, weight.in_features, constant=rounding == "constants")
        q, scale = self.columns.of_weight(held)
        grouped = self.columns.grouped
        self.register_buffer("q", q)
        self.register_buffer("scale", scale if grouped else scale.reshape(-1))
        self.register_buffer("zero", torch.zeros_like(self.scale, dtype=torch.int8 if grouped else torch.int64))
        self.register_buffer("bias", None if bias is None else bias.detach().float())
        self.register_buffer("input_scale", weight.input_scale)
        self.register_buffer("signs", self.columns.signs(held))
        self.activation_scale = None if weight.activation_scale is None else float(weight.activation_scale)

    def forward(self, x: Tensor) -> Tensor:
        """[..., out_features] of [..., in_features]."""
        if self.input_scale is not None:
            x = x / self.input_scale
        if self.rounding == "chained":
            assert self.activation_scale is not None
            return F.linear(rounded_statically(x, self.activation_scale), self.weight(), self.bias)
        scale: Tensor | float
        if self.activation_scale is None:
            scale = torch.clamp(x.abs().amax(-1, keepdim=True) / ACTIVATION_QMAX, min=_TINY)
            q = x / scale
        else:
            scale = self.activation_scale
            q = torch.clamp(x / scale, -ACTIVATION_QMAX, ACTIVATION_QMAX)
        y = F.linear(rounded_per_token(self.columns.of_input(q)), self.weight())
        if self.signs is not None and self.columns.grouped:
            y = y + F.linear(self.columns.sums(q + _TO_INTEGER - _TO_INTEGER), self.signs)
        y = y * scale if self.signs is None or self.columns.grouped else y * scale * self.signs
        return y if self.bias is None else y + self.bias

    def weight(self) -> Tensor:
        """The numbers of the integers, by the operator that the partitioner looks for."""
        low, high = (-8, 7) if self.narrow else (-127, 127)
        if self.columns.grouped:
            w: Tensor = torch.ops.torchao.dequantize_affine.default(
                self.q, [1, self.columns.padded], self.scale, self.zero, torch.int8, low, high
            )
        else:
            w = torch.ops.quantized_decomposed.dequantize_per_channel.default(
                self.q, self.scale, self.zero, 0, low, high, torch.int8
            )
        return w
