"""Quantized convolutions on calibrated INT8 inputs, as XNNPACK's partitioner recognises them.

XNNPACK's static convolution gives INT8, so it needs a scale of its output. Where a ReLU and one other quantized layer
follow, that layer's input scale is it. Elsewhere there is none that was trained: the input becomes integers beside two
channels of constants (see :mod:`~qat_plugin.exporting.executorch.columns`), and the output is float.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qat_plugin.exporting.executorch.columns import HIGH, LOW
from qat_plugin.exporting.executorch.rounding import (
    Rounding,
    per_channel_weight,
    per_image,
    static_input,
    static_integers,
)
from qat_plugin.kernels.weight import QuantizedWeight
from qat_plugin.numerics import Quantized

CHANNELS = 2
"""Channels of constants."""


class LoweredConv(nn.Module):
    """One convolution in one or two dimensions; in one, it runs as one of height 1.

    Args:
        module: the layer: stride, padding, dilation and groups.
        weight: ours, with a calibrated activation scale.
        bias: [out_channels] or ``None``.
        rounding: of the input.
    """

    q: Tensor
    scale: Tensor
    zero: Tensor
    bias: Tensor | None
    step: Tensor

    def __init__(self, module: Any, weight: QuantizedWeight, bias: Tensor | None, rounding: Rounding) -> None:
        super().__init__()
        assert weight.activation_scale is not None
        self.rounding, self.static = rounding, float(weight.activation_scale)
        self.flat = len(weight.logical_shape) == 3
        q, scale = kernel_of(weight.integers(), weight, constant=not rounding.chained)
        self.register_buffer("q", q)
        self.register_buffer("scale", scale.reshape(-1))
        self.register_buffer("zero", torch.zeros(len(q), dtype=torch.int64))
        self.register_buffer("bias", None if bias is None else bias.detach().float())
        self.register_buffer("step", weight.activation_scale.detach().float().reshape(1))
        lead = (1,) if self.flat else ()
        self.stride, self.dilation = (*lead, *module.stride), (*lead, *module.dilation)
        self.groups = module.groups
        self.padding, self.uneven = _padding(module, self.flat)

    def forward(self, x: Tensor) -> Tensor:
        """[batch, out_channels, ...] of [batch, channels, ...]."""
        x = x.unsqueeze(2) if self.flat else x
        x = F.pad(x, self.uneven) if any(self.uneven) else x
        w = per_channel_weight(self.q, self.scale, self.zero, narrow=False)
        if self.rounding.chained:
            y = self._product(static_input(x, self.static, self.rounding), w, self.bias)
        else:
            q = static_integers(x, self.step, self.static, self.rounding)
            q = F.pad(F.pad(q, (0, 0, 0, 0, 0, 1), value=HIGH), (0, 0, 0, 0, 0, 1), value=LOW)
            y = self._product(per_image(q), w, None) * self.step
            y = y if self.bias is None else y + self.bias.reshape(-1, 1, 1)
        return y.squeeze(2) if self.flat else y

    def _product(self, x: Tensor, w: Tensor, bias: Tensor | None) -> Tensor:
        return F.conv2d(x, w, bias, self.stride, self.padding, self.dilation, self.groups)


def kernel_of(held: Quantized, weight: QuantizedWeight, *, constant: bool) -> tuple[Tensor, Tensor]:
    """Integers [out, in / groups, height, width], with two channels of zeros where asked, and scales [out, 1]."""
    shape = weight.logical_shape
    q = held.q.reshape(*shape[:2], *((1,) if len(shape) == 3 else ()), *shape[2:])
    q = F.pad(q, (0, 0, 0, 0, 0, CHANNELS if constant else 0)).clone()
    return q, held.scale.float().expand(len(q), 1).clone()


def _padding(module: Any, flat: bool) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The padding of both sides, and what PyTorch's "same" adds to the far sides, as F.pad takes it."""
    lead = (0,) if flat else ()
    if module.padding == "valid":
        return (0, 0), (0,) * 4
    if module.padding != "same":
        return (*lead, *module.padding), (0,) * 4
    totals = (*lead, *(d * (k - 1) for d, k in zip(module.dilation, module.kernel_size, strict=True)))
    return tuple(t // 2 for t in totals), tuple(side for t in reversed(totals) for side in (0, t % 2))
