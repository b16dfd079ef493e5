"""Pure tensor functions of quantization: scales, integers, and their way back to numbers.

One grid serves every target, so that a trained tensor is exact in torchao (bf16 scales), GGUF (fp16 scales), ONNX and
compressed-tensors:

* symmetric, b < 8 bits: ``d = signed absmax / -2^(b-1)``, ``q = clamp(floor(w / d + 1/2), -2^(b-1), 2^(b-1) - 1)``
  (for b = 4 the grid of GGUF's Q4_0 and of ONNX Runtime's MatMulNBits);
* symmetric INT8: ``d = absmax / 127``, ``q`` in [-127, 127] (GGUF's Q8_0);
* asymmetric: ``d = (max(w, 0) - min(w, 0)) / (2^b - 1)``, integer zero point ``z``, ``w = (q - z) d``;
* every ``d`` is rounded to a number that bf16 and fp16 both hold exactly; asymmetric ones to seven significant bits, so
  that ``z d`` is exact in fp16 too (GGUF's Q4_1);
* activations: symmetric INT8, ``s = absmax / 127`` per token, rounded half to even.

Weights are ``[out_features, in_features]``; scales are ``[out_features, groups]`` (``[1, 1]`` per tensor), float32.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor

from qat_plugin.errors import QatError
from qat_plugin.scheme import Scheme

# fp16's least subnormal step, and the exponent under which bf16 is finer than that step.
_FP16_STEP = 2.0**-24
_FP16_COARSE_BELOW = 2.0**-17
# The greatest number with eight significant bits that fp16 holds (65280); for asymmetric scales, the greatest seven-bit
# one whose product with any 4-bit zero point still fits.
_GREATEST_SCALE = 65280.0
_GREATEST_ASYMMETRIC_SCALE = 4064.0
ACTIVATION_QMAX = 127
_CHUNK = 1 << 20  # weights


@dataclass(frozen=True)
class Quantized:
    """A weight as integers: what training produces, kernels run and files hold.

    Attributes:
        q: int8 (symmetric) or uint8 (asymmetric) integers, [out_features, in_features].
        scale: float32, [out_features, groups], or [1, 1] per tensor.
        zero_point: uint8 like ``scale``, or ``None`` for symmetric schemes.
        scheme: the scheme these integers belong to.
    """

    q: Tensor
    scale: Tensor
    zero_point: Tensor | None
    scheme: Scheme

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The numbers the integers stand for, [out_features, in_features]; computed in float32, then rounded once."""
        return dequantize(self.q, self.scale, self.zero_point, dtype)

    def rows(self, rows: slice) -> Quantized:
        """The same for some rows, without copying."""
        if self.scheme.per_tensor:
            return Quantized(self.q[rows], self.scale, self.zero_point, self.scheme)
        zero_point = None if self.zero_point is None else self.zero_point[rows]
        return Quantized(self.q[rows], self.scale[rows], zero_point, self.scheme)


def round_scale(scale: Tensor, *, significant_bits: int = 8) -> Tensor:
    """Round to the nearest number that bf16 and fp16 both represent exactly.

    Args:
        scale: any shape; computed and returned in float32.
        significant_bits: 8 (bf16's) or fewer.

    Returns:
        A tensor of the same shape, at most 65280 in magnitude (4064 with seven bits); numbers too small for fp16's
        subnormals become 0.
    """
    limit = _GREATEST_SCALE if significant_bits == 8 else _GREATEST_ASYMMETRIC_SCALE
    scale = scale.to(torch.float32).clamp(-limit, limit)
    drop = 24 - significant_bits
    bits = scale.view(torch.int32)
    odd = (bits >> drop) & 1  # rounds half to even, as a hardware conversion to bf16 does
    rounded = ((bits + ((1 << (drop - 1)) - 1) + odd) >> drop << drop).view(torch.float32)
    coarse = torch.round(scale / _FP16_STEP) * _FP16_STEP
    return torch.where(scale.abs() >= _FP16_COARSE_BELOW, rounded, coarse) + 0.0  # NaN stays NaN by the second


def check_group_size(in_features: int, scheme: Scheme) -> None:
    """Raise unless the scheme's groups tile a row of ``in_features`` weights.

    Raises:
        QatError: naming both numbers.
    """
    if scheme.group_size is not None and in_features % scheme.group_size:
        raise QatError(
            f"in_features ({in_features}) must be divisible by the group size ({scheme.group_size}) of {scheme}; "
            "resolve it through a Policy, whose `indivisible` rule picks a divisor, keeps the layer or refuses"
        )


def to_groups(weight: Tensor, scheme: Scheme) -> Tensor:
    """View [N, K] as [N, groups, K / groups]; per tensor as [1, 1, N K].

    Raises:
        QatError: when the group size does not divide K.
    """
    if scheme.per_tensor:
        return weight.reshape(1, 1, -1)
    rows, columns = weight.shape
    if scheme.group_size is None:
        return weight.reshape(rows, 1, columns)
    check_group_size(columns, scheme)
    return weight.reshape(rows, columns // scheme.group_size, scheme.group_size)


def choose_qparams(weight: Tensor, scheme: Scheme) -> tuple[Tensor, Tensor | None]:
    """Scales and zero points of round-to-nearest quantization.

    Args:
        weight: [out_features, in_features], any float type.
        scheme: an integer scheme.

    Returns:
        ``(scale, zero_point)``: float32 [out_features, groups] ([1, 1] per tensor), and uint8 of the same shape or
        ``None``. Symmetric scales below 8 bits carry a sign; a group of zeros has scale 0.
    """
    low, high = torch.aminmax(to_groups(weight.detach(), scheme), dim=-1)
    low, high = low.to(torch.float32), high.to(torch.float32)
    if not scheme.symmetric:
        return _asymmetric_qparams(low, high, scheme)
    if scheme.weight_bits == 8:
        return round_scale(torch.maximum(high, -low) / 127), None
    signed_absmax = torch.where(high > -low, high, low)
    return round_scale(signed_absmax / -(1 << (scheme.weight_bits - 1))), None


def _asymmetric_qparams(low: Tensor, high: Tensor, scheme: Scheme) -> tuple[Tensor, Tensor]:
    low, high = low.clamp(max=0.0), high.clamp(min=0.0)
    scale = round_scale((high - low) / scheme.qmax, significant_bits=7)
    zero_point = torch.floor(-low / nonzero(scale) + 0.5).clamp(0, scheme.qmax)
    return scale, zero_point.to(torch.uint8)


def nonzero(scale: Tensor) -> Tensor:
    """Scales to divide by: 1 in place of 0, the scale of a group of zeros."""
    return torch.where(scale == 0, 1.0, scale)


def quantize(weight: Tensor, scale: Tensor, zero_point: Tensor | None, scheme: Scheme) -> Quantized:
    """Integers of ``weight`` on the grid of ``scale`` and ``zero_point``.

    Args:
        weight: [out_features, in_features].
        scale: float32 [out_features, groups], already rounded (see :func:`round_scale`).
        zero_point: as ``scale``, or ``None``.
        scheme: an integer scheme.
    """
    weight = weight.detach()
    q = torch.empty(weight.shape, dtype=torch.int8 if scheme.symmetric else torch.uint8, device=weight.device)
    for rows in row_chunks(weight):
        fixed = (
            (scale, zero_point)
            if scheme.per_tensor
            else (scale[rows], None if zero_point is None else zero_point[rows])
        )
        levels = _levels(to_groups(weight[rows], scheme), *fixed).clamp(scheme.qmin, scheme.qmax)
        q[rows] = levels.reshape(weight[rows].shape).to(q.dtype)
    return Quantized(q, scale, zero_point, scheme)


def row_chunks(weight: Tensor) -> Iterator[slice]:
    """Slices of rows that together are the weight: what is computed in float32 on the way is never large."""
    step = max(1, _CHUNK // max(1, weight.shape[-1]))
    return (slice(start, start + step) for start in range(0, weight.shape[0], step))


def _levels(groups: Tensor, scale: Tensor, zero_point: Tensor | None) -> Tensor:
    """Rounded, unclipped positions on the grid, float32, [.., groups, group size]."""
    levels = torch.floor(groups.to(torch.float32) / nonzero(scale).unsqueeze(-1) + 0.5)
    return levels if zero_point is None else levels + zero_point.to(torch.float32).unsqueeze(-1)


def _numbers(levels: Tensor, scale: Tensor, zero_point: Tensor | None) -> Tensor:
    if zero_point is not None:
        levels = levels - zero_point.to(torch.float32).unsqueeze(-1)
    return levels * scale.unsqueeze(-1)


def round_to_nearest(weight: Tensor, scheme: Scheme) -> Quantized:
    """Quantize with min-max scales: :func:`choose_qparams`, then :func:`quantize`."""
    return quantize(weight, *choose_qparams(weight, scheme), scheme)


def dequantize(q: Tensor, scale: Tensor, zero_point: Tensor | None, dtype: torch.dtype = torch.float32) -> Tensor:
    """``(q - zero_point) * scale``, rounded once to ``dtype``; shapes as in :class:`Quantized`.

    Integers of eight bits and rounded scales are exact in every float type, so that the product in ``dtype`` itself is
    the float32 product rounded once: no intermediate in float32 is needed.
    """
    groups = q.to(dtype).reshape(*scale.shape, q.numel() // max(scale.numel(), 1))  # -1 is ambiguous without rows
    if zero_point is not None:
        groups = groups - zero_point.to(dtype).unsqueeze(-1)
    return (groups * scale.to(dtype).unsqueeze(-1)).reshape(q.shape)


def fake_quantize(
    weight: Tensor, scheme: Scheme, scale: Tensor | None = None, zero_point: Tensor | None = None
) -> Tensor:
    """The weight as its integers will represent it, differentiable by the straight-through estimator.

    Equal, bit for bit, to ``quantize(...).dequantize(weight.dtype)``. The gradient passes unchanged where the grid does
    not clip and is zero where it does (arXiv:1712.05877, arXiv:1308.3432).

    Args:
        weight: [out_features, in_features], any float type.
        scheme: an integer scheme.
        scale: fixed scales; by default min-max scales of the weight itself.
        zero_point: fixed zero points, with ``scale``.
    """
    if scale is None:
        scale, zero_point = choose_qparams(weight, scheme)
    return cast(Tensor, _FakeQuantize.apply(weight, scale, zero_point, scheme))


def on_grid_numbers(groups: Tensor, scale: Tensor, zero_point: Tensor | None, scheme: Scheme) -> Tensor:
    """The grid's numbers nearest to grouped weights [.., groups, group size], float32 of that shape."""
    levels = _levels(groups, scale, zero_point).clamp_(scheme.qmin, scheme.qmax)
    return _numbers(levels, scale, zero_point)


def on_grid(weight: Tensor, scale: Tensor, zero_point: Tensor | None, scheme: Scheme) -> tuple[Tensor, Tensor]:
    """The grid's numbers nearest to ``weight``, and where it did not clip (bool): both of the weight's shape."""
    levels = _levels(to_groups(weight, scheme), scale, zero_point)
    clipped = levels.clamp(scheme.qmin, scheme.qmax)
    numbers = _numbers(clipped, scale, zero_point).reshape(weight.shape).to(weight.dtype)
    return numbers, (levels == clipped).reshape(weight.shape)


class _FakeQuantize(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weight: Tensor, scale: Tensor, zero_point: Tensor | None, scheme: Scheme) -> Tensor:
        numbers, inside = on_grid(weight, scale, zero_point, scheme)
        ctx.save_for_backward(inside)
        return numbers

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (inside,) = ctx.saved_tensors
        return grad * inside, None, None, None


def activation_scale(x: Tensor) -> Tensor:
    """Per-token scales ``absmax / 127`` of [..., features], float32, [..., 1]; 1 for a row of zeros."""
    low, high = torch.aminmax(x.detach(), dim=-1, keepdim=True)
    absmax = torch.maximum(high.to(torch.float32), -low.to(torch.float32))
    return nonzero(absmax / ACTIVATION_QMAX)


def quantize_activation(x: Tensor, scale: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Symmetric INT8 integers of an activation.

    Args:
        x: [..., features], any float type.
        scale: a fixed scale that broadcasts against ``x`` (static schemes); by default one per token.

    Returns:
        ``(q, scale)``: q holds the integers -127..127 **as float32** [..., features], rounded half to even; the scale
        is float32.
    """
    if scale is None:
        scale = activation_scale(x)
    q = torch.round(x.to(torch.float32) / scale).clamp(-ACTIVATION_QMAX, ACTIVATION_QMAX)
    return q, scale


def fake_quantize_activation(x: Tensor, scale: Tensor | None = None) -> Tensor:
    """The activation as INT8 represents it, straight-through gradient (zero where a fixed scale clips).

    Args:
        x: [..., features].
        scale: a fixed scale; by default one per token, which cannot clip.
    """
    return cast(Tensor, _FakeQuantizeActivation.apply(x, scale))


def activation_on_grid(x: Tensor, scale: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """The INT8 numbers nearest to ``x``, and where a fixed scale did not clip (bool, ``None`` without one)."""
    q, used = quantize_activation(x, scale)
    # in float32: the bound rounded to a 16-bit type would let clipped values through
    inside = None if scale is None else x.abs().to(torch.float32) <= used * (ACTIVATION_QMAX + 0.5)
    return (q * used).to(x.dtype), inside


class _FakeQuantizeActivation(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor | None) -> Tensor:
        numbers, inside = activation_on_grid(x, scale)
        ctx.clips = inside is not None
        ctx.save_for_backward(*(() if inside is None else (inside,)))
        return numbers

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, None]:
        return (grad * ctx.saved_tensors[0] if ctx.clips else grad), None


def divided_input(x: Tensor, input_scale: Tensor, scheme: Scheme) -> Tensor:
    """The input of a layer whose weight's columns are multiplied by ``input_scale``.

    Divided in float32. What the scheme rounds to INT8 stays float32 until then, so that a layer sees the same integers
    in any float type; otherwise the quotient is rounded once to the type of ``x``. Differentiable.

    Args:
        x: [..., in_features], any float type.
        input_scale: float32 [in_features], positive.
        scheme: the layer's.
    """
    quotient = x / input_scale
    return quotient if scheme.quantizes_activations else quotient.to(x.dtype)


def fake_cast(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """Round to a narrower float type and back, straight-through: what a layer kept in ``dtype`` will hold."""
    return cast(Tensor, _FakeCast.apply(weight, dtype))


class _FakeCast(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weight: Tensor, dtype: torch.dtype) -> Tensor:
        return weight.to(dtype).to(weight.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None
