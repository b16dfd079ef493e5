"""Clip where the squared error of INT8 is least."""

from __future__ import annotations

import math
from typing import Final

import torch
from torch import Tensor

from qat_plugin.numerics import ACTIVATION_QMAX
from qat_plugin.observers.histogram import HistogramObserver
from qat_plugin.observers.spelling import ObserverSpec

_RATIO: Final = 1.01  # between candidates: within a hundredth of the best scale the error is flat
_CHUNK: Final = 32


class MseObserver(HistogramObserver):
    """The scale that minimises the squared error of symmetric INT8, rounding and clipping together, over the histogram.

    Candidates go down from the greatest magnitude in steps of a hundredth, to the grid whose step is two bins.
    """

    def __init__(self) -> None:
        super().__init__(ObserverSpec("mse"))

    def clip_at(self, counts: Tensor, width: float, greatest: float) -> float:
        """See :meth:`HistogramObserver.clip_at`."""
        (filled,) = counts.nonzero(as_tuple=True)
        weights = counts[filled].to(torch.float64)
        magnitudes = (filled.to(torch.float64) + 0.5) * width
        least = min(2 * width * ACTIVATION_QMAX, greatest)
        number = 1 + int(math.log(greatest / least) / math.log(_RATIO))
        limits = greatest * _RATIO ** -torch.arange(number, dtype=torch.float64)
        errors = torch.cat([_squared_errors(magnitudes, weights, part) for part in limits.split(_CHUNK)])
        return float(limits[errors.argmin()])


def _squared_errors(magnitudes: Tensor, weights: Tensor, limits: Tensor) -> Tensor:
    """Sum of squared errors of INT8 for each limit, float64 [limits]."""
    scales = (limits / ACTIVATION_QMAX).unsqueeze(1)
    numbers = torch.round(magnitudes / scales).clamp(max=ACTIVATION_QMAX) * scales
    return (numbers - magnitudes).square() @ weights
