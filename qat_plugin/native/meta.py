"""What torch.compile and torch.export must know of the native operators: the shapes and types of their results."""

from __future__ import annotations

import torch
from torch import Tensor


@torch.library.register_fake("qat_plugin_native::linear")
def _(
    x: Tensor,
    data: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    fixed_scale: Tensor | None,
    n: int,
    k: int,
    bits: int,
    integer: bool,
) -> Tensor:
    return x.new_empty((*x.shape[:-1], n))


@torch.library.register_fake("qat_plugin_native::dequantize")
def _(data: Tensor, scale: Tensor, n: int, k: int, bits: int, dtype: torch.dtype) -> Tensor:
    return data.new_empty((n, k), dtype=dtype)


@torch.library.register_fake("qat_plugin_native::to_bytes")
def _(x: Tensor, scale: Tensor) -> Tensor:
    return torch.empty_like(x, dtype=torch.uint8)


@torch.library.register_fake("qat_plugin_native::fake_quantize_weight")
def _(
    weight: Tensor, scale: Tensor | None, zero_point: Tensor | None, group: int, bits: int, symmetric: bool, mask: int
) -> tuple[Tensor, Tensor]:
    return _fake_quantized(weight, weight.numel() // group, group, mask)


@torch.library.register_fake("qat_plugin_native::fake_quantize_activation")
def _(x: Tensor, scale: Tensor | None, mask: int) -> tuple[Tensor, Tensor]:
    return _fake_quantized(x, x.numel() // x.shape[-1], x.shape[-1], mask)


@torch.library.register_fake("qat_plugin_native::keep_inside")
def _(grad: Tensor, inside: Tensor) -> Tensor:
    return grad.new_empty(grad.shape)


def _fake_quantized(x: Tensor, groups: int, group: int, mask: int) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), x.new_empty((groups if mask else 0, (group + 7) // 8), dtype=torch.uint8)


@torch.library.register_fake("qat_plugin_native::attend")
def _(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    batch, heads, _, width = query.shape
    return query.new_empty((batch, 1, heads, width))


@torch.library.register_fake("qat_plugin_native::linears")
def _(
    x: Tensor,
    data: list[Tensor],
    scale: list[Tensor],
    bias: list[Tensor | None],
    fixed_scale: Tensor | None,
    n: list[int],
    k: int,
    bits: int,
    integer: bool,
) -> list[Tensor]:
    return [x.new_empty((*x.shape[:-1], one)) for one in n]


@torch.library.register_fake("qat_plugin_native::dense")
def _(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return x.new_empty((*x.shape[:-1], weight.shape[0]))
