"""Scales by search: the grid of each group that leaves the least squared error, instead of the one that spans it.

Clipping a few large weights buys a finer grid for all others. The candidates of a group are ranges shrunk from the
min-max one; each is rounded to the scales that files can hold and judged on the integers it really gives.
"""

from __future__ import annotations

from typing import Final

import torch
from torch import Tensor

from qat_plugin.numerics import Quantized, choose_qparams, on_grid_numbers, quantize, round_scale, row_chunks, to_groups
from qat_plugin.scheme import Scheme

_SHRINKS: Final = tuple(1.0 - 0.02 * step for step in range(41))  # 1.00, 0.98 ... 0.20
_REFINEMENTS: Final = 2


@torch.no_grad()
def search_scales(weight: Tensor, scheme: Scheme, importance: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
    """Scales and zero points that minimise ``sum_k h_k (w_k - w'_k)^2`` of each group.

    Never worse than :func:`qat_plugin.numerics.choose_qparams`, which is the first candidate. Asymmetric ranges are
    shrunk on both sides together, then on each side alone.

    Args:
        weight: [out_features, in_features].
        scheme: an integer scheme.
        importance: h, float32 [in_features], all at least 0 (the mean squared inputs); by default ones.

    Returns:
        ``(scale, zero_point)`` as :func:`qat_plugin.numerics.choose_qparams` returns them.
    """
    scale, zero_point = choose_qparams(weight, scheme)
    if scheme.per_tensor:
        return _searched(weight, scheme, importance, scale, zero_point)
    for rows in row_chunks(weight):
        best = _searched(
            weight[rows], scheme, importance, scale[rows], None if zero_point is None else zero_point[rows]
        )
        scale[rows] = best[0]
        if zero_point is not None and best[1] is not None:
            zero_point[rows] = best[1]
    return scale, zero_point


def clip_search(weight: Tensor, scheme: Scheme, importance: Tensor | None = None) -> Quantized:
    """Round to nearest on the scales of :func:`search_scales`."""
    return quantize(weight, *search_scales(weight, scheme, importance), scheme)


def _searched(
    weight: Tensor, scheme: Scheme, importance: Tensor | None, scale: Tensor, zero_point: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    groups = to_groups(weight.detach(), scheme).to(torch.float32)
    weights = None
    if importance is not None:
        weights = to_groups(importance.to(torch.float32).expand_as(weight), scheme)
    search = _Search(groups, weights, scheme, scale, zero_point)
    if scheme.symmetric:
        largest = groups.abs().amax(-1)
        for shrink in _SHRINKS[1:]:
            for sign in (1.0,) if scheme.weight_bits == 8 else (1.0, -1.0):
                steps = scheme.qmax if scheme.weight_bits == 8 else -scheme.qmin
                search.consider(round_scale(sign * shrink * largest / steps), None)
        return search.scale, None
    low, high = groups.amin(-1).clamp(max=0.0), groups.amax(-1).clamp(min=0.0)
    best = [torch.ones_like(low), torch.ones_like(high)]
    for shrink in _SHRINKS[1:]:
        _shrunk(search, best, low, high, (shrink * torch.ones_like(low), shrink * torch.ones_like(high)))
    for _ in range(_REFINEMENTS):
        for side in (0, 1):
            other = best[1 - side].clone()
            for shrink in _SHRINKS[::2]:
                moved = shrink * torch.ones_like(low)
                _shrunk(search, best, low, high, (moved, other) if side == 0 else (other, moved))
    return search.scale, search.zero_point


def _shrunk(search: _Search, best: list[Tensor], low: Tensor, high: Tensor, shrinks: tuple[Tensor, Tensor]) -> None:
    """Consider the ranges from ``shrinks[0] low`` to ``shrinks[1] high``; ``best`` keeps the shrinks that won."""
    low, high = shrinks[0] * low, shrinks[1] * high
    scale = round_scale((high - low) / search.scheme.qmax, significant_bits=7)
    zero_point = torch.floor(-low / torch.where(scale == 0, 1.0, scale) + 0.5).clamp(0, search.scheme.qmax)
    won = search.consider(scale, zero_point.to(torch.uint8))
    for kept, tried in zip(best, shrinks, strict=True):
        kept[won] = tried[won]


class _Search:
    """The best grid of each group so far."""

    def __init__(
        self, groups: Tensor, importance: Tensor | None, scheme: Scheme, scale: Tensor, zero_point: Tensor | None
    ) -> None:
        self.groups, self.importance, self.scheme = groups, importance, scheme
        self.scale, self.zero_point = scale.clone(), None if zero_point is None else zero_point.clone()
        self.error = self._error(scale, zero_point)

    def consider(self, scale: Tensor, zero_point: Tensor | None) -> Tensor:
        """Take a grid where it is better; returns where, bool [rows, groups]."""
        error = self._error(scale, zero_point)
        better = (error < self.error) & (scale != 0)
        self.error = torch.where(better, error, self.error)
        self.scale = torch.where(better, scale, self.scale)
        if self.zero_point is not None and zero_point is not None:
            self.zero_point = torch.where(better, zero_point, self.zero_point)
        return better

    def _error(self, scale: Tensor, zero_point: Tensor | None) -> Tensor:
        difference = on_grid_numbers(self.groups, scale, zero_point, self.scheme).sub_(self.groups).square_()
        if self.importance is not None:
            difference.mul_(self.importance)
        return difference.sum(-1)
