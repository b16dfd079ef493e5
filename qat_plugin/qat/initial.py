"""Where learned scales begin: the range of the weights, or the grid with the least squared error."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final, Literal, get_args

import torch
from torch import Tensor

from qat_plugin.errors import ConfigError
from qat_plugin.numerics import choose_qparams, nonzero, on_grid, round_scale, row_chunks, to_groups
from qat_plugin.scheme import Scheme

Initial = Literal["minmax", "mse"]
_SHRUNK: Final = 60  # candidate ranges
_WIDEST: Final = 1.15  # symmetric grids reach one level further on one side: wider than min-max can be better


@torch.no_grad()
def initial_scales(weight: Tensor, scheme: Scheme, method: Initial = "mse") -> tuple[Tensor, Tensor | None]:
    """Scales and zero points for a weight.

    ``"mse"`` tries, for each group by itself, 60 ranges between the weights' own and a fifth of it (an eighth at 2
    bits), asymmetric ones with several zero points each, symmetric ones with both signs; every candidate is rounded as
    it will ship. The best in squared error is kept; min-max is among them, so that none is worse.

    Args:
        weight: [out_features, in_features], any float type.
        scheme: an integer scheme.
        method: ``"minmax"`` or ``"mse"``.

    Returns:
        As :func:`~qat_plugin.numerics.choose_qparams`: scales float32 [out_features, groups], zero points uint8 or
        ``None``.

    Raises:
        ConfigError: for another method.
    """
    check_initial(method)
    if method == "minmax":
        return choose_qparams(weight, scheme)
    if scheme.per_tensor:
        return _searched(weight, scheme)
    parts = [_searched(weight[rows], scheme) for rows in row_chunks(weight)]
    if not parts:  # a weight without rows
        return choose_qparams(weight, scheme)
    scales, zero_points = zip(*parts, strict=True)
    return torch.cat(scales), None if scheme.symmetric else torch.cat(zero_points)


def check_initial(method: str) -> None:
    """Raise unless it is a method of :func:`initial_scales`.

    Raises:
        ConfigError: listing them.
    """
    if method not in get_args(Initial):
        raise ConfigError(f"initial={method!r} is not one of {', '.join(get_args(Initial))}")


def _searched(weight: Tensor, scheme: Scheme) -> tuple[Tensor, Tensor | None]:
    wide = weight.to(torch.float32)
    scale, zero_point = choose_qparams(wide, scheme)
    least = _error(wide, scale, zero_point, scheme)
    for other_scale, other_zero in _candidates(wide, scheme):
        error = _error(wide, other_scale, other_zero, scheme)
        better = error < least
        least = torch.where(better, error, least)
        scale = torch.where(better, other_scale, scale)
        if zero_point is not None and other_zero is not None:
            zero_point = torch.where(better, other_zero, zero_point)
    return scale, zero_point


def _error(weight: Tensor, scale: Tensor, zero_point: Tensor | None, scheme: Scheme) -> Tensor:
    numbers, _ = on_grid(weight, scale, zero_point, scheme)
    return to_groups(numbers.sub_(weight).square_(), scheme).sum(-1)


def _candidates(weight: Tensor, scheme: Scheme) -> Iterator[tuple[Tensor, Tensor | None]]:
    shares = torch.linspace(_WIDEST, 1 / 8 if scheme.weight_bits == 2 else 1 / 5, _SHRUNK).tolist()
    if scheme.symmetric:
        widest, _ = choose_qparams(weight, scheme)
        signs = (1.0,) if scheme.weight_bits == 8 else (1.0, -1.0)
        yield from ((round_scale(widest * (share * sign)), None) for share in shares for sign in signs)
        return
    low, high = torch.aminmax(to_groups(weight, scheme), dim=-1)
    low, high = low.clamp(max=0.0), high.clamp(min=0.0)
    for share in shares:
        scale = round_scale((high - low) * (share / scheme.qmax), significant_bits=7)
        centred = torch.floor(scheme.qmax / 2 - (high + low) / (2 * nonzero(scale)) + 0.5)
        for shift in range(-1, 2):
            yield scale, (centred + shift).clamp(0, scheme.qmax).to(torch.uint8)
