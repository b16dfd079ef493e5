"""Zero points refined without data: a robust fit of the grid to the weights, for schemes below four bits.

Half-quadratic quantization (Badri and Shaji, 2023, "Half-Quadratic Quantization of Large Machine Learning Models")
minimises the l_p norm, p < 1, of ``W - d (Q - z)`` over real zero points: errors of a few outliers are forgiven, so
that the grid fits the many. Files hold integer zero points, of which there are 4 at two bits and 8 at three: all of
them are tried, which is the exact minimum that the half-quadratic steps approach.
"""

from __future__ import annotations

from typing import Final

import torch
from torch import Tensor

from qat_plugin.grid_search import search_scales
from qat_plugin.numerics import Quantized, on_grid_numbers, quantize, row_chunks, to_groups
from qat_plugin.scheme import Scheme

_NORM: Final = 0.7
_MOST_BITS: Final = 3


@torch.no_grad()
def hqq(weight: Tensor, scheme: Scheme, importance: Tensor | None = None) -> Quantized:
    """Integers on grids whose zero points are refined; from four bits on, and without zero points, the searched ones.

    Args:
        weight: [out_features, in_features].
        scheme: an integer scheme.
        importance: mean squared inputs [in_features], for the search of the scales; by default ones.
    """
    scale, zero_point = search_scales(weight, scheme, importance)
    if zero_point is None or scheme.weight_bits > _MOST_BITS:
        return quantize(weight, scale, zero_point, scheme)
    chunks = [slice(None)] if scheme.per_tensor else row_chunks(weight)
    for rows in chunks:
        groups = to_groups(weight[rows].detach(), scheme).to(torch.float32)
        zero_point[rows] = _refined(groups, scale[rows], zero_point[rows], scheme)
    return quantize(weight, scale, zero_point, scheme)


def _refined(groups: Tensor, scale: Tensor, zero_point: Tensor, scheme: Scheme) -> Tensor:
    best, least = zero_point, _distance(groups, scale, zero_point, scheme)
    for level in range(scheme.qmax + 1):
        moved = torch.full_like(zero_point, level)
        distance = _distance(groups, scale, moved, scheme)
        better = distance < least
        best, least = torch.where(better, moved, best), torch.where(better, distance, least)
    return best


def _distance(groups: Tensor, scale: Tensor, zero_point: Tensor, scheme: Scheme) -> Tensor:
    """The l_p distance of each group to the power p, [rows, groups]."""
    return (on_grid_numbers(groups, scale, zero_point, scheme) - groups).abs().pow(_NORM).sum(-1)
