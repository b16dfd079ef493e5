"""Zero points refined without data: a robust fit of the grid to the weights, for schemes below four bits.

Half-quadratic quantization (Badri and Shaji, 2023, "Half-Quadratic Quantization of Large Machine Learning Models")
minimises the l_p norm, p < 1, of ``W - d (Q - z)``: errors of a few outliers are forgiven, so that the grid fits the
many. Our zero points are integers, as files hold them, so that each step ends on the integer nearest to the real one,
and a group keeps the best it met.
"""

from __future__ import annotations

from typing import Final

import torch
from torch import Tensor

from qat_plugin.numerics import Quantized, on_grid_numbers, quantize, row_chunks, to_groups
from qat_plugin.ptq.clip import search_scales
from qat_plugin.scheme import Scheme

_NORM: Final = 0.7
_STEPS: Final = 20
_BETA: Final = 10.0
_KAPPA: Final = 1.01


@torch.no_grad()
def hqq(weight: Tensor, scheme: Scheme, importance: Tensor | None = None) -> Quantized:
    """Integers on grids whose zero points are refined; symmetric schemes, which have none, keep the searched scales.

    Args:
        weight: [out_features, in_features].
        scheme: an integer scheme.
        importance: mean squared inputs [in_features], for the search of the scales; by default ones.
    """
    scale, zero_point = search_scales(weight, scheme, importance)
    if zero_point is None:
        return quantize(weight, scale, None, scheme)
    chunks = [slice(None)] if scheme.per_tensor else row_chunks(weight)
    for rows in chunks:
        groups = to_groups(weight[rows].detach(), scheme).to(torch.float32)
        zero_point[rows] = _refined(groups, scale[rows], zero_point[rows], scheme)
    return quantize(weight, scale, zero_point, scheme)


def _refined(groups: Tensor, scale: Tensor, zero_point: Tensor, scheme: Scheme) -> Tensor:
    best, least = zero_point, _distance(groups, scale, zero_point, scheme)
    beta, d = _BETA, torch.where(scale == 0, 1.0, scale).unsqueeze(-1)
    current = zero_point
    for _ in range(_STEPS):
        numbers = on_grid_numbers(groups, scale, current, scheme)
        forgiven = _shrunk(groups - numbers, beta)
        levels = numbers / d + current.to(torch.float32).unsqueeze(-1)
        wanted = (levels - (groups - forgiven) / d).mean(-1)
        moved = torch.floor(wanted + 0.5).clamp(0, scheme.qmax).to(torch.uint8)
        distance = _distance(groups, scale, moved, scheme)
        better = distance < least
        best, least = torch.where(better, moved, best), torch.where(better, distance, least)
        if torch.equal(moved, current):
            break
        current, beta = moved, beta * _KAPPA
    return best


def _shrunk(error: Tensor, beta: float) -> Tensor:
    """The proximal operator of the l_p norm, generalised soft thresholding."""
    magnitude = error.abs()
    threshold = magnitude.clamp(min=1e-8).pow(_NORM - 1) / beta
    return error.sign() * (magnitude - threshold).clamp(min=0)


def _distance(groups: Tensor, scale: Tensor, zero_point: Tensor, scheme: Scheme) -> Tensor:
    """The l_p distance of each group, [rows, groups]."""
    return (on_grid_numbers(groups, scale, zero_point, scheme) - groups).abs().pow(_NORM).sum(-1)
