"""Clip what is greater than nearly all."""

from __future__ import annotations

import torch
from torch import Tensor

from qat_plugin.observers.histogram import HistogramObserver
from qat_plugin.observers.spelling import ObserverSpec


class PercentileObserver(HistogramObserver):
    """The magnitude that a share of all magnitudes does not exceed (one of the calibrations of arXiv:2004.09602).

    Magnitudes are taken to spread evenly within a bin, so that the result is at most one bin off.

    Args:
        percentile: in (0, 100]; 100 is the greatest magnitude.
    """

    def __init__(self, percentile: float = 99.99) -> None:
        super().__init__(ObserverSpec("percentile", percentile))
        self.percentile = percentile

    def clip_at(self, counts: Tensor, width: float, greatest: float) -> float:
        """See :meth:`HistogramObserver.clip_at`."""
        if self.percentile == 100:
            return greatest
        upto = counts.cumsum(0).to(torch.float64)
        wanted = float(upto[-1]) * self.percentile / 100
        index = min(int(torch.searchsorted(upto, wanted)), len(counts) - 1)
        inside = float(counts[index])
        below = float(upto[index]) - inside
        return width * (index + ((wanted - below) / inside if inside else 1.0))
