"""The grid of one weight while it is learned: scales and zero points as an optimizer can move them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Final, cast

import torch
from torch import Tensor, nn

from qat_plugin.learned import learned_scale, learned_zero_point
from qat_plugin.scheme import Scheme

_LEAST, _GREATEST = 2.0**-6, 2.0**6
RELATIVE: Final = ("unit", "relative_scale", "zero_start", "zero_shift")


class LearnedGrid(nn.Module):
    """Scales and zero points relative to where they began, so that any optimizer's step has a sensible size.

    Adam's step is about the learning rate whatever the gradient's size: a rate of 1e-3 would move a scale of 0.02 by
    5% at each step. Here a scale is ``unit * relative_scale``, with a Parameter that begins at 1: the same rate moves
    it by 0.1%. A learned zero point is ``zero_start + qmax * zero_shift``, with a Parameter that begins at 0 and moves
    in shares of the whole range. Products are the same to the bit on every device, which an exponential would not be.

    A relative scale is taken as between 1/64 and 64: no step turns a scale to zero or its sign around.

    Args:
        scale: float32 [out_features, groups], to begin from; a group of zeros (scale 0) begins at the others' mean
            magnitude, on which its weights are zeros as well.
        zero_point: uint8 of that shape, or ``None``.
        scheme: an integer scheme.
        learn_zero_points: learn these too; otherwise they stay.
    """

    unit: Tensor
    zero_start: Tensor | None

    def __init__(self, scale: Tensor, zero_point: Tensor | None, scheme: Scheme, *, learn_zero_points: bool) -> None:
        super().__init__()
        self.scheme = scheme
        self.register_buffer("unit", _without_zeros(scale), persistent=False)
        self.register_buffer("zero_start", zero_point, persistent=False)
        self.relative_scale = nn.Parameter(torch.ones_like(scale))
        learned = learn_zero_points and zero_point is not None
        self.zero_shift = nn.Parameter(torch.zeros_like(scale)) if learned else None

    def scale(self) -> Tensor:
        """The scales, float32 [out_features, groups], not rounded; differentiable."""
        return self.unit * cast(Tensor, _Bounded.apply(self.relative_scale))

    def zero_point(self) -> Tensor | None:
        """The zero points, of that shape: uint8 where they stay; learned, float32, not rounded and differentiable."""
        if self.zero_start is None or self.zero_shift is None:
            return self.zero_start
        return self.zero_start + self.scheme.qmax * self.zero_shift

    @torch.no_grad()
    def qparams(self) -> tuple[Tensor, Tensor | None]:
        """What is in force: the rounded scales, and integer zero points, uint8."""
        zero_point = self.zero_point()
        rounded = None if zero_point is None else learned_zero_point(zero_point, self.scheme)
        return learned_scale(self.scale(), self.scheme), rounded

    @torch.no_grad()
    def saturated(self) -> Tensor:
        """Groups at the end of what can be learned, bool [out_features, groups]."""
        ended = (self.relative_scale <= _LEAST) | (self.relative_scale >= _GREATEST)
        zero_point = self.zero_point()
        if zero_point is not None and self.zero_shift is not None:
            ended = ended | (zero_point < -0.5) | (zero_point > self.scheme.qmax + 0.5)
        return ended

    @torch.no_grad()
    def hold(self, scale: Tensor, zero_point: Tensor | None) -> None:
        """Begin from these instead."""
        self.unit.copy_(_without_zeros(scale))
        self.relative_scale.fill_(1.0)
        if self.zero_start is not None and zero_point is not None:
            self.zero_start.copy_(zero_point)
        if self.zero_shift is not None:
            self.zero_shift.zero_()

    @torch.no_grad()
    def follow(self, gain: Tensor) -> None:
        """Stay the grid of a weight whose rows were multiplied, so that its integers stay (or are mirrored).

        Args:
            gain: [out_features], of either sign; where it is 0, the row begins as a group of zeros does.
        """
        factor = gain.to(self.unit).unsqueeze(1)
        signed = self.scheme.symmetric and self.scheme.weight_bits < 8
        self.unit.copy_(_without_zeros(self.unit * (factor if signed else factor.abs())))
        if self.zero_start is not None:
            mirrored = self.scheme.qmax - self.zero_start
            self.zero_start.copy_(torch.where(factor < 0, mirrored, self.zero_start))
        if self.zero_shift is not None:
            self.zero_shift.copy_(torch.where(factor < 0, -self.zero_shift, self.zero_shift))

    @torch.no_grad()
    def export_state(self) -> dict[str, Tensor]:
        """``scale`` and ``zero_point``, the scales not rounded, the zero points rounded, and their parts."""
        scale, zero_point = self.scale(), self.qparams()[1]
        return {
            "scale": scale,
            **({} if zero_point is None else {"zero_point": zero_point}),
            **{name: tensor for name in RELATIVE if (tensor := getattr(self, name)) is not None},
        }

    @torch.no_grad()
    def import_state(self, state: Mapping[str, Tensor]) -> None:
        """The inverse of :meth:`export_state`; Parameters stay the same objects."""
        for name in RELATIVE:
            if (tensor := getattr(self, name)) is not None:
                tensor.copy_(state[name])

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        """Nothing: a prepared model's state_dict is the float model's."""

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        """Nothing is missing, nothing is read."""

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> LearnedGrid:
        """To a device, never to a narrower float type."""

        def move(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            return moved if moved.dtype == tensor.dtype else tensor.to(moved.device)

        super()._apply(move, recurse)
        return self


class _Bounded(torch.autograd.Function):
    """A clamp whose gradient also passes outside where a step against it leads back in."""

    @staticmethod
    def forward(ctx: Any, relative: Tensor) -> Tensor:
        ctx.save_for_backward(relative)
        return relative.clamp(_LEAST, _GREATEST)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (relative,) = ctx.saved_tensors
        leaving = ((relative <= _LEAST) & (grad > 0)) | ((relative >= _GREATEST) & (grad < 0))
        return grad.masked_fill(leaving, 0.0)


def _without_zeros(scale: Tensor) -> Tensor:
    magnitude = scale.abs()
    used = magnitude > 0
    mean = magnitude.sum() / used.sum().clamp(min=1)
    return torch.where(used, scale, torch.where(mean > 0, mean, torch.ones_like(mean)))
