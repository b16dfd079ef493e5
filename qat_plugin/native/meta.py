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
