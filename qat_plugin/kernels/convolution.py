"""F.conv1d and F.conv2d on a quantized weight: from a call as PyTorch spells it to a kernel's."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from qat_plugin.errors import ConversionError
from qat_plugin.kernels.table import ConvCall, kernel_named

if TYPE_CHECKING:
    from qat_plugin.kernels.weight import QuantizedWeight

_ARGUMENTS = ("input", "weight", "bias", "stride", "padding", "dilation", "groups")


def convolve(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """Answer F.conv1d or F.conv2d, whose second argument is a quantized weight.

    Raises:
        ConversionError: when the weight is no convolution's, or a gradient would be needed.
        RuntimeError: when the input does not fit, as PyTorch does.
    """
    given = {**dict(zip(_ARGUMENTS, args, strict=False)), **kwargs}
    x, weight = given["input"], given["weight"]
    if weight.usage != "conv":
        raise ConversionError(f"{weight!r} is a linear layer's weight: a convolution cannot use it")
    if given.get("groups", 1) != weight.groups:
        raise ConversionError(f"{weight!r} was packed for {weight.groups} groups, not {given.get('groups', 1)}")
    dimensions = len(weight.logical_shape) - 2
    call = ConvCall(
        _each(given.get("stride", 1), dimensions),
        (0,) * dimensions,
        _each(given.get("dilation", 1), dimensions),
    )
    if torch.is_autocast_enabled(x.device.type) and x.is_floating_point():
        x = x.to(torch.get_autocast_dtype(x.device.type))
    if torch.is_grad_enabled() and x.requires_grad:
        return cast(Tensor, _Frozen.apply(x, weight, given.get("bias"), call, given.get("padding", 0)))
    return _run(x, weight, given.get("bias"), call, given.get("padding", 0))


class _Frozen(torch.autograd.Function):
    """Computes the convolution; its backward says why there is none."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: QuantizedWeight, bias: Tensor | None, call: ConvCall, padding: Any
    ) -> Tensor:
        ctx.scheme = weight.spelling
        return _run(x, weight, bias, call, padding)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[None, ...]:
        raise ConversionError(
            f"a converted model cannot be trained: the gradient reached an integer convolution ({ctx.scheme}). Train "
            "before convert(), or load the float checkpoint into a fresh model"
        )


def _run(x: Tensor, weight: QuantizedWeight, bias: Tensor | None, call: ConvCall, padding: Any) -> Tensor:
    dimensions = len(weight.logical_shape) - 2
    channels = weight.logical_shape[1] * weight.groups
    if x.dim() not in (dimensions + 1, dimensions + 2) or x.shape[-dimensions - 1] != channels:
        raise RuntimeError(f"input has shape {tuple(x.shape)}; {weight!r} takes {channels} channels")
    alone = x.dim() == dimensions + 1
    x = x.unsqueeze(0) if alone else x
    x, amounts = _padded(x, weight, call, padding)
    call = ConvCall(call.stride, amounts, call.dilation)
    if x.numel():
        y = kernel_named(weight.kernel_name).convolution(x, weight, bias, call)
    else:  # oneDNN takes no empty batch
        function = F.conv1d if dimensions == 1 else F.conv2d
        y = function(x, weight.dequantize(x.dtype), bias, call.stride, call.padding, call.dilation, weight.groups)
    return y.squeeze(0) if alone else y


def _padded(x: Tensor, weight: QuantizedWeight, call: ConvCall, padding: Any) -> tuple[Tensor, tuple[int, ...]]:
    """The input and the symmetric padding that is left to the kernel; PyTorch's "same" may pad one side more."""
    dimensions = len(weight.logical_shape) - 2
    if padding == "valid":
        return x, (0,) * dimensions
    if padding != "same":
        return x, _each(padding, dimensions)
    totals = [d * (k - 1) for d, k in zip(call.dilation, weight.logical_shape[2:], strict=True)]
    if any(total % 2 for total in totals):  # as PyTorch does it: the odd one goes to the far side
        x = F.pad(x, [side for total in reversed(totals) for side in (0, total % 2)])
    return x, tuple(total // 2 for total in totals)


def _each(value: int | tuple[int, ...], dimensions: int) -> tuple[int, ...]:
    values = (value,) if isinstance(value, int) else tuple(value)
    return values * dimensions if len(values) == 1 else values
