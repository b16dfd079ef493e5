"""The product with an NF4 weight on CPUs: bitsandbytes' layer with a forward and backward of our own.

On CUDA the layer is bitsandbytes' own. On CPUs its kernel takes a weight apart row by row and is wrong where a row of
32 (modulo 64) columns ends within a block of 64: the rows after it get the scales of other blocks, in forward, backward
and ``dequantize_4bit`` alike (0.50.2; NF4's error is then 25% instead of 9% on Gaussian weights). Taken as one long
row, the weight comes out right, whatever its width.
"""

from __future__ import annotations

import copy
import functools
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qat_plugin.qlora.extra import import_extra


def values(packed: Tensor, state: Any, dtype: torch.dtype) -> Tensor:
    """What packed codes stand for: [out_features, in_features] in ``dtype``, the products made in float32.

    Args:
        packed: uint8 [ceil(out * in / 2), 1].
        state: bitsandbytes' QuantState.
        dtype: float32, bfloat16 or float16.
    """
    flat = copy.copy(state)
    flat.shape, flat.dtype = torch.Size((1, state.shape.numel())), dtype
    weight: Tensor = import_extra("bitsandbytes.functional").dequantize_4bit(packed, flat)
    return weight.reshape(state.shape)


class _Product(torch.autograd.Function):
    """``x W^T + b`` with a frozen NF4 weight; nothing of the size of x or W is kept for the backward pass."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, packed: Tensor, bias: Tensor | None, state: Any) -> Tensor:
        ctx.save_for_backward(packed)
        ctx.state = state
        return F.linear(x, values(packed, state, x.dtype), bias)

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = upstream
        (packed,) = ctx.saved_tensors
        x_gradient = bias_gradient = None
        if ctx.needs_input_grad[0]:
            x_gradient = gradient @ values(packed, ctx.state, gradient.dtype)
        if ctx.needs_input_grad[2]:
            bias_gradient = gradient.flatten(0, -2).sum(0)
        return x_gradient, None, bias_gradient, None


class _Forward:
    def forward(self, x: Tensor) -> Tensor:
        layer: Any = self
        if x.device.type != "cpu":
            return super().forward(x)  # type: ignore[misc, no-any-return]
        given = x.dtype
        kind = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else layer.compute_dtype or given
        bias = None if layer.bias is None else layer.bias.to(kind)
        with torch.autocast("cpu", enabled=False):
            out: Tensor = _Product.apply(x.to(kind), layer.weight.data, bias, layer.weight.quant_state)
        return out.to(given)


@functools.cache
def layer_class() -> type[nn.Linear]:
    """bitsandbytes' Linear4bit with the forward above; made when bitsandbytes is first needed."""
    base = import_extra("bitsandbytes.nn").Linear4bit
    return type("NF4Linear", (_Forward, base), {"__module__": __name__, "__reduce_ex__": _reduce})


def _reduce(layer: nn.Module, protocol: Any) -> tuple[Any, ...]:
    """Pickle by a function: the class is made at run time."""
    return _rebuild, (), layer.__dict__


def _rebuild() -> nn.Module:
    kind = layer_class()
    return kind.__new__(kind)
