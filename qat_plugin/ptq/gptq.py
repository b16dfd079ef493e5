"""GPTQ: weights are rounded one input at a time, and those still to come make up for the error (arXiv:2210.17323).

What is minimised is the squared error of the layer's output, ``tr(E H E^T)`` with ``E = W' - W`` and ``H`` the mean of
``x x^T``. Beyond the paper: the grid of each group is the one that a search finds best under ``diag H``, and sweeps of
coordinate descent over the integers and the scales follow, each of which only lowers that same error (the integer
sweep is QuantEase's, arXiv:2309.01885). A row for which all that is no better than rounding to nearest keeps the
rounding, so that the layer's error on its calibration data never ends above it.

Of K x K numbers, K the layer's inputs, two are held at a time: the second moment, and one factor of it (for the aim
then for the integers). All else is done for a million weights at a time.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

from qat_plugin.errors import ConfigError
from qat_plugin.grid_search import search_scales
from qat_plugin.measure.host_memory import return_freed_memory
from qat_plugin.numerics import Quantized, choose_qparams, round_to_nearest, row_chunks
from qat_plugin.ptq.descent import Descent
from qat_plugin.ptq.factor import lower_factor
from qat_plugin.ptq.output_error import row_errors
from qat_plugin.ptq.statistics import InputStatistics
from qat_plugin.scheme import Scheme

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
    weight: Tensor,
    statistics: InputStatistics,
    scheme: Scheme,
    options: GptqOptions = GptqOptions(),
    wanted: Tensor | None = None,
) -> Quantized:
    """Integers of a weight that keep its layer's output on the calibration data.

    Groups are static: their scales are chosen before the first weight is rounded.

    Args:
        weight: [out_features, in_features], any float type.
        statistics: of the layer's input, with its second moment.
        scheme: an integer scheme.
        options: see there.
        wanted: what :func:`aim` gave, where it is known already.

    Raises:
        QatError: when H has no Cholesky decomposition even with heavy damping (it holds NaN or infinity).
    """
    weight = weight.detach().to(torch.float32)
    plain = round_to_nearest(weight, scheme)
    if statistics.rows == 0:
        return plain
    work, moment = aim(weight, statistics, options.correct) if wanted is None else wanted, statistics.second_moment
    importance = moment.diagonal() / statistics.rows
    scale, zero_point = search_scales(work, scheme, importance) if options.clip else choose_qparams(work, scheme)
    order = torch.arange(len(moment), device=moment.device)
    if options.act_order:
        order = torch.argsort(importance, descending=True, stable=True)
    order = order.flip(0)  # the last is rounded first
    found = Quantized(torch.empty_like(plain.q), scale, zero_point, scheme)
    return_freed_memory()
    lower = lower_factor(moment, options.damping, order)
    for rows in row_chunks(work):
        part = found.rows(rows)
        descent = Descent(work[rows], moment, part.scale, part.zero_point, scheme)
        descent.round(lower, order)
        for _ in range(options.sweeps):
            descent.sweep()
        part.q.copy_(descent.q.t())
        part.scale.copy_(descent.scale.t())
        del descent
    del lower
    return_freed_memory()
    return _better_rows(work, moment, found, plain)


def aim(weight: Tensor, statistics: InputStatistics, share: float = 1.0, *, spent: bool = False) -> Tensor:
    """The float weight that gives on the inputs seen what the float model gives on its own: W + W E[(x_f - x) x^T] / H.

    Args:
        weight: [out_features, in_features].
        statistics: with or without drift, which may be this weight's own; without it the weight itself is the aim.
        share: of the way to go.
        spent: nobody needs the statistics' drift after this; it is given up, and its memory.

    Returns:
        float32 of the weight's shape.
    """
    weight = weight.detach().to(torch.float32)
    if statistics.drift is None or not share or not statistics.rows:
        return weight
    met = statistics.through is not None
    moved = weight @ statistics.drift if not met else statistics.drift if spent else statistics.drift.clone()
    if spent:
        statistics.drift = None
    lower = lower_factor(statistics.second_moment, _CORRECTION_DAMPING)
    for rows in row_chunks(weight):
        part = torch.linalg.solve_triangular(lower.mT, moved[rows], upper=True, left=False)
        part = torch.linalg.solve_triangular(lower, part, upper=False, left=False)
        torch.add(weight[rows], part, alpha=share, out=moved[rows])
    return moved


def _better_rows(weight: Tensor, moment: Tensor, found: Quantized, plain: Quantized) -> Quantized:
    """Of each row, or of the whole per tensor, the better integers."""
    mine, nearest = (_errors(quantized, weight, moment) for quantized in (found, plain))
    if found.scheme.per_tensor:
        return plain if bool(mine.sum() > nearest.sum()) else found
    worse = (mine > nearest).unsqueeze(-1)
    zero_point = found.zero_point
    if zero_point is not None and plain.zero_point is not None:
        zero_point = torch.where(worse, plain.zero_point, zero_point)
    return Quantized(
        torch.where(worse, plain.q, found.q), torch.where(worse, plain.scale, found.scale), zero_point, found.scheme
    )


def _errors(quantized: Quantized, weight: Tensor, moment: Tensor) -> Tensor:
    parts = [row_errors(quantized.rows(rows).dequantize().sub_(weight[rows]), moment) for rows in row_chunks(weight)]
    return torch.cat(parts) if parts else weight.new_zeros(0)
