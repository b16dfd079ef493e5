"""Quantized weights as tensor subclasses: a converted layer keeps its class, its forward and its names.

:class:`QuantizedWeight` holds a kernel's tensors and answers ``F.linear`` (nn.Linear and its subclasses),
``torch.addmm`` (transformers' Conv1D, whose weight is [in, out]), ``F.conv1d``, ``F.conv2d`` and ``F.embedding``.
:class:`CastWeight` is a float weight stored in a narrower float type. Both are frozen: a backward pass through an
integer product raises.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from qat_plugin.errors import ConversionError
from qat_plugin.kernels.convolution import convolve
from qat_plugin.kernels.table import kernel_named
from qat_plugin.kernels.tensors import CastWeight, QuantizedWeight, is_converted_weight
from qat_plugin.numerics import divided_input

__all__ = ["CastWeight", "QuantizedWeight", "is_converted_weight"]

aten = torch.ops.aten


class _Frozen(torch.autograd.Function):
    """Computes the integer product; its backward says why there is none."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: QuantizedWeight, bias: Tensor | None) -> Tensor:
        ctx.scheme = weight.spelling
        return _product(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[None, None, None]:
        raise ConversionError(
            f"a converted model cannot be trained: the gradient reached an integer layer ({ctx.scheme}). Train before "
            "convert(), or load the float checkpoint into a fresh model"
        )


def _product(x: Tensor, weight: QuantizedWeight, bias: Tensor | None) -> Tensor:
    if x.shape[-1] != weight.in_features:
        raise RuntimeError(
            f"input has {x.shape[-1]} features (shape {tuple(x.shape)}), {weight!r} takes {weight.in_features}"
        )
    divided = x if weight.input_scale is None else divided_input(x, weight.input_scale, weight.scheme)
    if torch.is_autocast_enabled(x.device.type) and x.is_floating_point():
        x = x.to(torch.get_autocast_dtype(x.device.type))
        bias = None if bias is None else bias.to(x.dtype)
        if weight.input_scale is None or not weight.scheme.quantizes_activations:
            divided = divided.to(x.dtype)
    tokens = divided.reshape(-1, x.shape[-1])
    if tokens.shape[0] == 0:
        return x.new_empty(*x.shape[:-1], weight.out_features)
    kernel = kernel_named(weight.kernel_name)
    if bias is not None and bias.requires_grad and torch.is_grad_enabled():
        y = kernel.linear(tokens, weight) + bias
    else:
        y = kernel.biased(tokens, weight, bias)
    return y.to(x.dtype).reshape(*x.shape[:-1], weight.out_features)


def _linear(x: Tensor, weight: QuantizedWeight, bias: Tensor | None) -> Tensor:
    if torch.is_grad_enabled() and x.requires_grad:
        return cast(Tensor, _Frozen.apply(x, weight, bias))
    return _product(x, weight, bias)


def _argument(args: tuple[Any, ...], kwargs: dict[str, Any], index: int, name: str, default: Any = None) -> Any:
    return args[index] if len(args) > index else kwargs.get(name, default)


@QuantizedWeight.implements_torch_function(F.linear)
def _(func: Callable[..., Any], types: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    weight = _argument(args, kwargs, 1, "weight")
    return _linear(_argument(args, kwargs, 0, "input"), weight, _argument(args, kwargs, 2, "bias"))


@QuantizedWeight.implements_torch_function(torch.addmm)
def _(func: Callable[..., Any], types: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    bias, x, weight = (_argument(args, kwargs, i, name) for i, name in enumerate(("input", "mat1", "mat2")))
    scaled = any(kwargs.get(name, 1) != 1 for name in ("alpha", "beta"))
    if scaled or not isinstance(weight, QuantizedWeight) or not weight.transposed:
        raise ConversionError(
            "torch.addmm on a quantized weight is supported as bias + x @ weight with an [in, out] weight"
        )
    return _linear(x, weight, bias)


@QuantizedWeight.implements_torch_function([F.conv1d, F.conv2d])
def _(func: Callable[..., Any], types: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    return convolve(args, kwargs)


@QuantizedWeight.implements_torch_function(F.embedding)
def _(func: Callable[..., Any], types: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    ids, weight = _argument(args, kwargs, 0, "input"), _argument(args, kwargs, 1, "weight")
    if _argument(args, kwargs, 3, "max_norm") is not None:
        raise ConversionError("an embedding with max_norm rewrites its rows in place and cannot be converted")
    return kernel_named(weight.kernel_name).embedding(ids, weight)


def _is_param_copy(weight: Tensor, target_device: torch.device, target_dtype: torch.dtype) -> bool:
    return weight.device == target_device and weight.dtype == target_dtype


@QuantizedWeight.implements(aten._to_copy.default)
def _(func: Callable[..., Any], types: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    weight: QuantizedWeight = args[0]
    device = torch.device(kwargs.get("device") or weight.device)
    dtype = kwargs.get("dtype") or weight.dtype
    if _is_param_copy(weight, device, dtype):
        return cast(Tensor, weight._apply_fn_to_data(torch.clone))
    return weight.repack(device, dtype)


@QuantizedWeight.implements(aten.clone.default)
def _(func: Callable[..., Any], types: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    return cast(Tensor, args[0]._apply_fn_to_data(torch.clone))


_copy_between = {cls: cls._ATEN_OP_TABLE[cls][aten.copy_.default] for cls in (QuantizedWeight, CastWeight)}


@QuantizedWeight.implements(aten.copy_.default)
def _(func: Callable[..., Any], types: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    return _copy(QuantizedWeight, func, types, args, kwargs)


@CastWeight.implements(aten.copy_.default)
def _(func: Callable[..., Any], types: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    return _copy(CastWeight, func, types, args, kwargs)


def _copy(cls: Any, func: Callable[..., Any], types: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """A converted weight loaded into a float model becomes the numbers it stands for."""
    target, source = args[0], args[1]
    if is_converted_weight(source) and not is_converted_weight(target):
        return cast(Tensor, target.copy_(source.dequantize(target.dtype)))
    return cast(Tensor, _copy_between[cls](func, types, args, kwargs))


@CastWeight.implements_torch_function(F.embedding)
def _(func: Callable[..., Any], types: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    weight = _argument(args, kwargs, 1, "weight")
    rest = {name: value for name, value in kwargs.items() if name not in ("input", "weight")}
    return F.embedding(_argument(args, kwargs, 0, "input"), weight.data_, *args[2:], **rest).to(weight.dtype)


@CastWeight.implements(aten._to_copy.default)
def _(func: Callable[..., Any], types: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    weight: CastWeight = args[0]
    data = weight.data_.to(kwargs.get("device") or weight.device, copy=True)
    return CastWeight(data, kwargs.get("dtype") or weight.dtype)


_KEPT_AS_CAST = {aten.detach.default, aten.alias.default, aten.clone.default, aten.copy_.default, aten._to_copy.default}


def _cast_dispatch(
    cls: type[CastWeight], func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
) -> Any:
    if func in _KEPT_AS_CAST:
        return _inherited_dispatch(cls, func, types, args, kwargs or {})
    from torch.utils._pytree import tree_map_only

    args, kwargs = tree_map_only(CastWeight, lambda weight: weight.dequantize(), (args, kwargs or {}))
    return func(*args, **kwargs)


_inherited_dispatch = CastWeight.__torch_dispatch__.__func__
CastWeight.__torch_dispatch__ = classmethod(_cast_dispatch)
