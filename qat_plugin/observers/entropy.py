"""Clip where INT8 keeps most of the distribution's information."""

from __future__ import annotations

from typing import Final

import torch
from torch import Tensor

from qat_plugin.observers.histogram import HistogramObserver
from qat_plugin.observers.spelling import ObserverSpec

_BINS: Final = 2048
_LEVELS: Final = 128
_CHUNK: Final = 128


class EntropyObserver(HistogramObserver):
    """The threshold of least Kullback-Leibler divergence: TensorRT's entropy calibration.

    S. Migacz, "8-bit Inference with TensorRT", GTC 2017, over 2048 bins as there. For each number of bins i, P is the
    histogram's first i bins with all that lies above added to the last, and Q the first i bins pooled into 128 levels,
    each spread evenly over its bins that are not empty; the i of least KL(P || Q) wins, the largest among equals. The
    first bin counts as much as the second, as in NVIDIA's own calibrators: zeros of a ReLU would decide everything.
    """

    def __init__(self) -> None:
        super().__init__(ObserverSpec("entropy"))

    def clip_at(self, counts: Tensor, width: float, greatest: float) -> float:
        """See :meth:`HistogramObserver.clip_at`."""
        merged = len(counts) // _BINS
        histogram = counts.reshape(_BINS, merged).sum(1).to(torch.float64)
        histogram[0] = histogram[1]
        if not bool(histogram.any()):
            return greatest
        last = int(histogram.nonzero().max()) + 1
        sizes = torch.arange(min(_LEVELS, last), last + 1)
        divergences = torch.cat([_divergences(histogram, part) for part in sizes.split(_CHUNK)])
        best = int((divergences == divergences.min()).nonzero().max())
        return float(sizes[best]) * merged * width


def _divergences(histogram: Tensor, sizes: Tensor) -> Tensor:
    """KL(P || Q) of the first ``size`` bins, in nats; float64 [sizes]."""
    position, size = torch.arange(len(histogram)), sizes.unsqueeze(1)
    inside = position < size
    kept = torch.where(inside, histogram, 0.0)
    level = (position * _LEVELS // size).clamp(max=_LEVELS - 1)
    pooled = _by_level(kept, level)
    filled = _by_level((kept > 0).to(kept.dtype), level)
    candidate = torch.where(kept > 0, (pooled / filled.clamp(min=1)).gather(1, level), 0.0)
    reference = kept.scatter_add(1, size - 1, torch.where(inside, 0.0, histogram).sum(1, keepdim=True))
    p = reference / reference.sum(1, keepdim=True)
    q = candidate / candidate.sum(1, keepdim=True)
    return torch.where(p > 0, p * (p.log() - q.log()), 0.0).sum(1)


def _by_level(values: Tensor, level: Tensor) -> Tensor:
    return values.new_zeros(len(values), _LEVELS).scatter_add_(1, level, values)
