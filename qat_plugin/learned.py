"""Fake quantization that learns its grid: LSQ (arXiv:1902.08153), with zero points as in LSQ+ (arXiv:2004.09576).

What is trained is what ships: the forward pass uses scales that bf16 and fp16 hold exactly and zero points that are
integers of the grid; their gradients pass straight through those roundings to the float32 numbers behind them.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor

from qat_plugin.numerics import nonzero, on_grid, round_scale, to_groups
from qat_plugin.scheme import Scheme


def fake_quantize_learned(weight: Tensor, scale: Tensor, zero_point: Tensor | None, scheme: Scheme) -> Tensor:
    """Fake quantization whose scales, and zero points, are learned (LSQ, arXiv:1902.08153; LSQ+, arXiv:2004.09576).

    The forward pass uses the scale rounded to a bf16- and fp16-exact number and the zero point rounded to an integer of
    the grid; both gradients pass straight through that. With upstream gradient g, a scale d and zero point z get, over
    their group, and times ``1 / sqrt(group size * qmax)``:

    * d: ``sum of g (q - z - w / d)`` inside the grid and ``g (q - z)`` where it clips;
    * z: ``-d * sum of g`` where it clips; nothing where a step would lead further out of the grid.

    Args:
        weight: [out_features, in_features].
        scale: float32 [out_features, groups]; gradients go to it.
        zero_point: ``None``; of the scale's shape: uint8 where it is fixed, float32 where it is learned.
        scheme: an integer scheme.
    """
    return cast(Tensor, _FakeQuantizeLearned.apply(weight, scale, zero_point, scheme))


def learned_scale(scale: Tensor, scheme: Scheme) -> Tensor:
    """The scale that a learned parameter stands for: rounded as :func:`choose_qparams` rounds."""
    return round_scale(scale.detach(), significant_bits=8 if scheme.symmetric else 7)


def learned_zero_point(zero_point: Tensor, scheme: Scheme) -> Tensor:
    """The integer that a learned zero point stands for, uint8; one that is not learned is returned as it is."""
    if not zero_point.is_floating_point():
        return zero_point
    return torch.floor(zero_point.detach() + 0.5).clamp(0, scheme.qmax).to(torch.uint8)


def learned_gradients(
    grad: Tensor,
    kept: Tensor,
    weight: Tensor,
    numbers: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    scheme: Scheme,
) -> tuple[Tensor, Tensor | None]:
    """The gradients of scales and learned zero points, from what fake quantization leaves behind anyway.

    Since ``q - z - w / d = (numbers - w) / d`` inside the grid and ``q - z = numbers / d`` outside, the scale's is
    ``sum(grad * numbers - kept * w) / d``.

    Args:
        grad: of the numbers, [out_features, in_features].
        kept: the part of it that is inside the grid: the weight's gradient.
        weight, numbers: before and after.
        scale: the rounded scales in force, float32 [out_features, groups].
        zero_point: as learned, or ``None`` where none is learned.
        scheme: an integer scheme.

    Returns:
        Gradients of the scales' shape, float32; the second is ``None`` without a learned zero point.
    """
    wide = torch.float32
    slope = torch.addcmul(grad.to(wide) * numbers, kept.to(wide), weight.to(wide), value=-1)
    size = weight.numel() // max(1, scale.numel())
    balance = (size * max(scheme.qmax, 1)) ** -0.5
    of_scale = to_groups(slope, scheme).sum(-1) / nonzero(scale) * balance
    if zero_point is None:
        return of_scale, None
    outside = to_groups(grad.to(wide) - kept, scheme).sum(-1)
    of_zero = -scale * outside * balance
    leaving = ((zero_point <= 0) & (of_zero > 0)) | ((zero_point >= scheme.qmax) & (of_zero < 0))
    return of_scale, of_zero.masked_fill(leaving, 0.0)


class _FakeQuantizeLearned(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weight: Tensor, scale: Tensor, zero_point: Tensor | None, scheme: Scheme) -> Tensor:
        rounded = learned_scale(scale, scheme)
        zero = None if zero_point is None else learned_zero_point(zero_point, scheme)
        numbers, inside = on_grid(weight, rounded, zero, scheme)
        learned = zero_point if zero_point is not None and zero_point.is_floating_point() else None
        ctx.scheme = scheme
        ctx.save_for_backward(weight, numbers, inside, rounded, learned)
        return numbers

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        weight, numbers, inside, rounded, learned = ctx.saved_tensors
        kept = grad * inside
        return kept, *learned_gradients(grad, kept, weight, numbers, rounded, learned, ctx.scheme), None
