"""GPTQ: weights are rounded one input at a time, and those still to come make up for the error (arXiv:2210.17323).

What is minimised is the squared error of the layer's output, ``tr(E H E^T)`` with ``E = W' - W`` and ``H`` the mean of
``x x^T``. Beyond the paper: the grid of each group is the one that a search finds best under ``diag H``, and sweeps of
coordinate descent over the integers and the scales follow, each of which only lowers that same error (the integer
sweep is QuantEase's, arXiv:2309.01885). A row for which all that is no better than rounding to nearest keeps the
rounding, so that the layer's error on its calibration data never ends above it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, cast

import torch
from torch import Tensor

from qat_plugin.errors import ConfigError, QatError
from qat_plugin.grid_search import search_scales
from qat_plugin.learned import learned_scale
from qat_plugin.numerics import Quantized, choose_qparams, round_to_nearest
from qat_plugin.ptq.output_error import row_errors
from qat_plugin.ptq.statistics import InputStatistics
from qat_plugin.scheme import Scheme

_BLOCK: Final = 128
_RETRIES: Final = 12
_CORRECTION_DAMPING: Final = 0.01


@dataclass(frozen=True)
class GptqOptions:
    """What GPTQ does.

    Attributes:
        damping: share of the mean diagonal that is added to the diagonal of H; ten times more after each failed
            Cholesky decomposition.
        correct: aim at the output of the float layer on the float model's inputs, not on those that quantized
            predecessors left (asymmetric calibration, arXiv:2504.02692); a share from 0 to 1, as the whole way fits
            the calibration data too closely.
        act_order: round the inputs with the largest second moments first.
        clip: search each group's grid instead of taking the min-max one.
        sweeps: rounds of coordinate descent afterwards; 0 is the paper's algorithm.
    """

    damping: float = 0.1
    correct: float = 0.5
    act_order: bool = True
    clip: bool = True
    sweeps: int = 4

    def __post_init__(self) -> None:
        if not self.damping > 0:
            raise ConfigError(f"GPTQ's damping is {self.damping}; it must be above 0 (0.01 to 0.1 is usual)")
        if not 0 <= self.correct <= 1:
            raise ConfigError(f"GPTQ's correct is {self.correct}; it is a share from 0 to 1")
        if self.sweeps < 0:
            raise ConfigError(f"GPTQ's sweeps are {self.sweeps}; they must not be negative")


@torch.no_grad()
def gptq(
    weight: Tensor, statistics: InputStatistics, scheme: Scheme, options: GptqOptions = GptqOptions()
) -> Quantized:
    """Integers of a weight that keep its layer's output on the calibration data.

    Groups are static: their scales are chosen before the first weight is rounded.

    Args:
        weight: [out_features, in_features], any float type.
        statistics: of the layer's input, with its second moment.
        scheme: an integer scheme.
        options: see there.

    Raises:
        QatError: when H has no Cholesky decomposition even with heavy damping (it holds NaN or infinity).
    """
    plain = round_to_nearest(weight.detach().to(torch.float32), scheme)
    if statistics.rows == 0:
        return plain
    moment, work = statistics.second_moment / statistics.rows, aim(weight, statistics, options.correct)
    scale, zero_point = search_scales(work, scheme, moment.diagonal()) if options.clip else choose_qparams(work, scheme)
    q = _rounded(work, moment, scale, zero_point, scheme, options)
    sweep = _Sweeps(work, moment, q, scale, zero_point, scheme)
    for _ in range(options.sweeps):
        sweep.integers()
        sweep.scales()
    found = Quantized(sweep.q.to(plain.q.dtype), sweep.scale, zero_point, scheme)
    return _better_rows(work, moment, found, plain)


def aim(weight: Tensor, statistics: InputStatistics, share: float = 1.0) -> Tensor:
    """The float weight that gives on the inputs seen what the float model gives on its own: W + W E[(x_f - x) x^T] / H.

    Args:
        weight: [out_features, in_features].
        statistics: with or without drift; without it the weight itself is the aim.
        share: of the way to go.

    Returns:
        float32 of the weight's shape.
    """
    weight = weight.detach().to(torch.float32)
    if statistics.drift is None or not share or not statistics.rows:
        return weight
    moment, drift = statistics.second_moment / statistics.rows, statistics.drift / statistics.rows
    diagonal = moment.diagonal()
    damped = moment + torch.diag(_CORRECTION_DAMPING * diagonal.mean() + (diagonal <= 0) * diagonal.mean().clamp(min=1))
    moved: Tensor = weight + share * torch.linalg.solve(damped, (weight @ drift).t()).t()
    return moved


def _better_rows(weight: Tensor, moment: Tensor, found: Quantized, plain: Quantized) -> Quantized:
    mine, nearest = (row_errors(quantized.dequantize() - weight, moment) for quantized in (found, plain))
    if found.scheme.per_tensor:
        return plain if bool(mine.sum() > nearest.sum()) else found
    worse = (mine > nearest).unsqueeze(-1)
    zero_point = found.zero_point
    if zero_point is not None and plain.zero_point is not None:
        zero_point = torch.where(worse, plain.zero_point, zero_point)
    return Quantized(
        torch.where(worse, plain.q, found.q), torch.where(worse, plain.scale, found.scale), zero_point, found.scheme
    )


def _rounded(
    weight: Tensor, moment: Tensor, scale: Tensor, zero_point: Tensor | None, scheme: Scheme, options: GptqOptions
) -> Tensor:
    """The paper's algorithm: float32 integers [out_features, in_features] on fixed grids."""
    columns = weight.shape[1]
    grid = _Columns(scale, zero_point, scheme, columns)
    order = torch.arange(columns, device=weight.device)
    if options.act_order:
        order = torch.argsort(moment.diagonal(), descending=True, stable=True)
    factor = inverse_factor(moment[order][:, order], options.damping)
    left = weight[:, order]
    q = torch.empty_like(left)
    for start in range(0, columns, _BLOCK):
        stop = min(start + _BLOCK, columns)
        errors = torch.empty(len(left), stop - start, dtype=left.dtype, device=left.device)
        part, local = left[:, start:stop], factor[start:stop, start:stop]
        for i in range(stop - start):
            d, z = grid.of(order[start + i])
            levels = grid.levels(part[:, i], d, z)
            q[:, start + i] = levels
            errors[:, i] = (part[:, i] - (levels - z) * d) / local[i, i]
            part[:, i + 1 :] -= errors[:, i : i + 1] * local[i, i + 1 :]
        left[:, stop:] -= errors @ factor[start:stop, stop:]
    result = torch.empty_like(q)
    result[:, order] = q
    return result


def inverse_factor(moment: Tensor, damping: float) -> Tensor:
    """Upper Cholesky factor of ``(H + damping mean(diag H) I)^-1``, float32 [K, K].

    Inputs that were always zero count as having the mean second moment: their weights are rounded to nearest.

    Raises:
        QatError: for NaN or infinity, or when no damping helps.
    """
    if not bool(torch.isfinite(moment).all()):
        raise QatError(f"the second moment of the inputs ({len(moment)} features) holds NaN or infinity")
    diagonal = moment.diagonal()
    dead = diagonal <= 0
    mean = float(diagonal[~dead].mean()) if bool((~dead).any()) else 1.0
    share = damping
    for _ in range(_RETRIES):
        damped = moment + torch.diag(torch.where(dead, mean, share * mean))
        lower, failed = torch.linalg.cholesky_ex(damped)
        if not failed:
            upper, failed = torch.linalg.cholesky_ex(torch.cholesky_inverse(lower), upper=True)
            if not failed and bool(torch.isfinite(upper).all()):
                return cast(Tensor, upper)
        share *= 10
    raise QatError(
        f"the second moment of the inputs ({len(moment)} features) has no Cholesky decomposition, even with "
        f"{share / 10:g} of its mean diagonal added"
    )


class _Columns:
    """The grid of each column."""

    def __init__(self, scale: Tensor, zero_point: Tensor | None, scheme: Scheme, columns: int) -> None:
        self.scale, self.scheme = scale, scheme
        self.zero_point = torch.zeros_like(scale) if zero_point is None else zero_point.to(torch.float32)
        self.size = columns if scheme.group_size is None else scheme.group_size

    def of(self, column: Tensor | int) -> tuple[Tensor, Tensor]:
        """Scales and zero points of one column, float32 [out_features] (or [1] per tensor)."""
        group = int(column) // self.size
        return self.scale[:, group], self.zero_point[:, group]

    def levels(self, weight: Tensor, scale: Tensor, zero_point: Tensor) -> Tensor:
        """Integers of one column, as numerics rounds them."""
        levels = torch.floor(weight / torch.where(scale == 0, 1.0, scale) + 0.5) + zero_point
        return levels.clamp_(self.scheme.qmin, self.scheme.qmax)


class _Sweeps:
    """Coordinate descent on ``tr(E H E^T)`` from integers and scales that are there; every step lowers it."""

    def __init__(
        self, weight: Tensor, moment: Tensor, q: Tensor, scale: Tensor, zero_point: Tensor | None, scheme: Scheme
    ) -> None:
        self.moment, self.q, self.scale, self.scheme = moment, q, scale.clone(), scheme
        self.grid = _Columns(self.scale, zero_point, scheme, weight.shape[1])
        self.gradient = (self._numbers() - weight) @ moment  # E H, kept up to date

    def _numbers(self) -> Tensor:
        size = self.grid.size
        parts = [
            (self.q[:, start : start + size] - z.unsqueeze(-1)) * d.unsqueeze(-1)
            for start in range(0, self.q.shape[1], size)
            for d, z in [self.grid.of(start)]
        ]
        return torch.cat(parts, dim=-1)

    def integers(self) -> None:
        """Move each weight to the grid's best number, all others fixed."""
        diagonal = self.moment.diagonal()
        for start in range(0, self.q.shape[1], _BLOCK):
            stop = min(start + _BLOCK, self.q.shape[1])
            gradient, local = self.gradient[:, start:stop], self.moment[start:stop, start:stop]
            moved = torch.zeros_like(gradient)
            for i in range(stop - start):
                if not diagonal[start + i] > 0:
                    continue
                d, z = self.grid.of(start + i)
                old = self.q[:, start + i]
                new = self.grid.levels((old - z) * d - gradient[:, i] / diagonal[start + i], d, z)
                moved[:, i] = (new - old) * d
                self.q[:, start + i] = new
                gradient += moved[:, i : i + 1] * local[i]
            self.gradient[:, :start] += moved @ self.moment[start:stop, :start]
            self.gradient[:, stop:] += moved @ self.moment[start:stop, stop:]

    def scales(self) -> None:
        """Move each group's scale to its best value that files can hold, integers fixed."""
        if self.scheme.per_tensor:
            return
        size = self.grid.size
        for group in range(self.scale.shape[1]):
            part = slice(group * size, (group + 1) * size)
            old, zero_point = self.grid.of(group * size)
            levels = self.q[:, part] - zero_point.unsqueeze(-1)
            curvature = ((levels @ self.moment[part, part]) * levels).sum(-1)
            slope = (levels * self.gradient[:, part]).sum(-1)
            best = old - slope / torch.where(curvature > 0, curvature, 1.0)
            new = learned_scale(best, self.scheme)
            nearer = (curvature > 0) & (new != 0) & ((new - best).abs() < (old - best).abs())
            new = torch.where(nearer, new, old)
            self.gradient += ((new - old).unsqueeze(-1) * levels) @ self.moment[part]
            self.scale[:, group] = new
