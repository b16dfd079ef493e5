"""Scales by search: the grid of each group that leaves the least squared error, instead of the one that spans it.

Clipping a few large weights buys a finer grid for all others. It is where learned scales may begin, and what GPTQ and
the other methods without training round on.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

import torch
from torch import Tensor

from qat_plugin.numerics import (
    Quantized,
    choose_qparams,
    nonzero,
    on_grid_numbers,
    quantize,
    round_scale,
    row_chunks,
    to_groups,
)
from qat_plugin.scheme import Scheme

_SHRUNK: Final = 60  # candidate ranges
_WIDEST: Final = 1.15  # symmetric grids reach one level further on one side: wider than min-max can be better


@torch.no_grad()
def search_scales(weight: Tensor, scheme: Scheme, importance: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
    """Scales and zero points that minimise ``sum_k h_k (w_k - w'_k)^2`` of each group.

    Tried are, for each group by itself, 60 ranges between somewhat more than the weights' own and a fifth of it (an
    eighth at 2 bits), asymmetric ones with several zero points each, symmetric ones with both signs; every candidate is
    rounded as it will ship. Min-max is among them, so that none is worse.

    Args:
        weight: [out_features, in_features], any float type.
        scheme: an integer scheme.
        importance: h, float32 [in_features], all at least 0 (mean squared inputs); by default ones.

    Returns:
        As :func:`~qat_plugin.numerics.choose_qparams`: scales float32 [out_features, groups], zero points uint8 or
        ``None``.
    """
    if scheme.per_tensor:
        return _searched(weight, scheme, importance)
    parts = [_searched(weight[rows], scheme, importance) for rows in row_chunks(weight)]
    if not parts:  # a weight without rows
        return choose_qparams(weight, scheme)
    scales, zero_points = zip(*parts, strict=True)
    return torch.cat(scales), None if scheme.symmetric else torch.cat(zero_points)


def clip_search(weight: Tensor, scheme: Scheme, importance: Tensor | None = None) -> Quantized:
    """Round to nearest on the scales of :func:`search_scales`."""
    return quantize(weight, *search_scales(weight, scheme, importance), scheme)


def _searched(weight: Tensor, scheme: Scheme, importance: Tensor | None) -> tuple[Tensor, Tensor | None]:
    groups = to_groups(weight.to(torch.float32), scheme)
    weights = None
    if importance is not None:
        weights = to_groups(importance.to(torch.float32).expand_as(weight), scheme)
    scale, zero_point = choose_qparams(weight, scheme)
    least = _error(groups, scale, zero_point, scheme, weights)
    for other_scale, other_zero in _candidates(groups, scale, scheme):
        error = _error(groups, other_scale, other_zero, scheme, weights)
        better = (error < least) & (other_scale != 0)
        least = torch.where(better, error, least)
        scale = torch.where(better, other_scale, scale)
        if zero_point is not None and other_zero is not None:
            zero_point = torch.where(better, other_zero, zero_point)
    return scale, zero_point


def _error(
    groups: Tensor, scale: Tensor, zero_point: Tensor | None, scheme: Scheme, importance: Tensor | None
) -> Tensor:
    squares = on_grid_numbers(groups, scale, zero_point, scheme).sub_(groups).square_()
    return (squares if importance is None else squares.mul_(importance)).sum(-1)


def _candidates(groups: Tensor, widest: Tensor, scheme: Scheme) -> Iterator[tuple[Tensor, Tensor | None]]:
    narrowest = 1 / 8 if scheme.weight_bits == 2 else 1 / 5
    shares = torch.linspace(_WIDEST, narrowest, _SHRUNK, dtype=torch.float32).tolist()
    if scheme.symmetric:
        signs = (1.0,) if scheme.weight_bits == 8 else (1.0, -1.0)
        yield from ((round_scale(widest * (share * sign)), None) for share in shares for sign in signs)
        return
    low, high = torch.aminmax(groups, dim=-1)
    low, high = low.clamp(max=0.0), high.clamp(min=0.0)
    for share in shares:
        scale = round_scale((high - low) * (share / scheme.qmax), significant_bits=7)
        centred = torch.floor(scheme.qmax / 2 - (high + low) / (2 * nonzero(scale)) + 0.5)
        for shift in range(-1, 2):
            yield scale, (centred + shift).clamp(0, scheme.qmax).to(torch.uint8)
