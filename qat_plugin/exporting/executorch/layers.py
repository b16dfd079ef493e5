"""Quantized linear layers in the operators that XNNPACK's partitioner recognises, on our integers and scales."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qat_plugin.exporting.executorch.columns import Columns
from qat_plugin.exporting.executorch.rounding import (
    Rounding,
    per_channel_weight,
    per_group_weight,
    per_token,
    static_input,
    static_integers,
)
from qat_plugin.kernels.weight import QuantizedWeight
from qat_plugin.numerics import ACTIVATION_QMAX

_TINY = torch.finfo(torch.float32).tiny
_TO_INTEGER = 1.5 * 2.0**23  # float32 numbers around it are the integers: adding it rounds, half to even


class LoweredLinear(nn.Module):
    """One linear layer.

    Args:
        weight: ours.
        bias: [out_features] or ``None``.
        rounding: of the input.
    """

    q: Tensor
    scale: Tensor
    zero: Tensor
    bias: Tensor | None
    input_scale: Tensor | None
    signs: Tensor | None
    step: Tensor | None

    def __init__(self, weight: QuantizedWeight, bias: Tensor | None, rounding: Rounding) -> None:
        super().__init__()
        held = weight.integers()
        self.rounding, self.narrow = rounding, held.scheme.weight_bits < 8
        self.columns = Columns.of(held.scheme, weight.in_features, constant=not rounding.chained)
        q, scale = self.columns.of_weight(held)
        grouped = self.columns.grouped
        self.register_buffer("q", q)
        self.register_buffer("scale", scale if grouped else scale.reshape(-1))
        self.register_buffer("zero", torch.zeros_like(self.scale, dtype=torch.int8 if grouped else torch.int64))
        self.register_buffer("bias", None if bias is None else bias.detach().float())
        self.register_buffer("input_scale", weight.input_scale)
        self.register_buffer("signs", self.columns.signs(held))
        static = weight.activation_scale
        self.register_buffer("step", None if static is None else static.detach().float().reshape(1))
        self.static = None if static is None else float(static)

    def forward(self, x: Tensor) -> Tensor:
        """[..., out_features] of [..., in_features]."""
        if self.input_scale is not None:
            x = x / self.input_scale
        if self.rounding.chained:
            assert self.static is not None
            return F.linear(static_input(x, self.static, self.rounding), self.weight(), self.bias)
        if self.step is None or self.static is None:
            step = torch.clamp(x.abs().amax(-1, keepdim=True) / ACTIVATION_QMAX, min=_TINY)
            q = x / step
        else:
            step = self.step
            q = static_integers(x, step, self.static, self.rounding)
        y = F.linear(per_token(self.columns.of_input(q)), self.weight())
        if self.signs is not None and self.columns.grouped:
            y = y + F.linear(self.columns.sums(q + _TO_INTEGER - _TO_INTEGER), self.signs)
        y = y * step
        if self.signs is not None and not self.columns.grouped:
            y = y * self.signs
        return y if self.bias is None else y + self.bias

    def weight(self) -> Tensor:
        """The numbers of the integers, by the operator that the partitioner looks for."""
        if self.columns.grouped:
            return per_group_weight(self.q, self.scale, self.zero, self.columns.padded)
        return per_channel_weight(self.q, self.scale, self.zero, narrow=self.narrow)
