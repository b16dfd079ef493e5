"""How activations become INT8, in the operators that XNNPACK's partitioner recognises."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from qat_plugin.numerics import ACTIVATION_QMAX


@dataclass(frozen=True)
class Rounding:
    """Of one layer.

    Attributes:
        chained: XNNPACK's static kernel, whose output is the INT8 input of the only layer that reads it; otherwise the
            input lies on the integer grid, with constants beside it, and the output is float.
        fed: the layer before is chained to this one: its output is INT8 on this layer's scale.
    """

    chained: bool = False
    fed: bool = False


def register_operators() -> None:
    """Import what defines ``quantized_decomposed`` and ``torchao``'s operators."""
    import importlib

    from qat_plugin.kernels.torchao_import import import_torchao

    import_torchao()
    importlib.import_module("torch.ao.quantization.fx._decomposed")
    importlib.import_module("torchao.quantization.quant_primitives")


def per_token(x: Tensor) -> Tensor:
    """Rounded as XNNPACK rounds a row of a linear layer: INT8 from -128 to 127 with a zero point."""
    ao: Any = torch.ops.torchao
    block, eps = [1] * (x.dim() - 1) + [x.shape[-1]], torch.finfo(torch.float32).eps
    scale, zero = ao.choose_qparams_affine.default(
        x, "ASYMMETRIC", block, torch.int8, -128, 127, eps, torch.float32, torch.int8, True
    )
    q = ao.quantize_affine.default(x, block, scale, zero, torch.int8, -128, 127)
    y: Tensor = ao.dequantize_affine.default(q, block, scale, zero, torch.int8, -128, 127)
    return y


def per_image(x: Tensor) -> Tensor:
    """Rounded as XNNPACK rounds an image of a convolution; the operator's own grid is one for all of them."""
    decomposed: Any = torch.ops.quantized_decomposed
    scale, zero = decomposed.choose_qparams.tensor(x, -128, 127, torch.finfo(torch.float32).eps, torch.int8)
    q = decomposed.quantize_per_tensor.tensor(x, scale, zero, -128, 127, torch.int8)
    y: Tensor = decomposed.dequantize_per_tensor.tensor(q, scale, zero, -128, 127, torch.int8)
    return y


def per_tensor(x: Tensor, scale: float) -> Tensor:
    """Rounded on a calibrated scale with zero point 0."""
    decomposed: Any = torch.ops.quantized_decomposed
    q = decomposed.quantize_per_tensor.default(x, scale, 0, -128, 127, torch.int8)
    y: Tensor = decomposed.dequantize_per_tensor.default(q, scale, 0, -128, 127, torch.int8)
    return y


def static_input(x: Tensor, scale: float, rounding: Rounding) -> Tensor:
    """The input of a layer of XNNPACK's static kernel; its integers end at -128 there, ours at -127."""
    return per_tensor(x if rounding.fed else torch.clamp(x, min=-ACTIVATION_QMAX * scale), scale)


def static_integers(x: Tensor, scale: Tensor, value: float, rounding: Rounding) -> Tensor:
    """Numbers that round to the integers of a calibrated scale."""
    x = per_tensor(x, value) if rounding.fed else x
    return torch.clamp(x / scale, -ACTIVATION_QMAX, ACTIVATION_QMAX)


def per_channel_weight(q: Tensor, scale: Tensor, zero: Tensor, *, narrow: bool) -> Tensor:
    """The numbers of integers with a scale per output channel."""
    decomposed: Any = torch.ops.quantized_decomposed
    low, high = (-8, 7) if narrow else (-127, 127)
    w: Tensor = decomposed.dequantize_per_channel.default(q, scale, zero, 0, low, high, torch.int8)
    return w


def per_group_weight(q: Tensor, scale: Tensor, zero: Tensor, group: int) -> Tensor:
    """The numbers of INT4 integers with a scale per group."""
    ao: Any = torch.ops.torchao
    w: Tensor = ao.dequantize_affine.default(q, [1, group], scale, zero, torch.int8, -8, 7)
    return w
