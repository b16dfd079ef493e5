"""Clip where INT8 keeps most of the distribution's information."""

from __future__ import annotations

from typing import Final

import torch
from torch import Tensor

from qat_plugin.observers.histogram import HistogramObserver
from qat_plugin.observers.spelling import ObserverSpec

_BINS: Final = 2048
_LEVELS: Final = 128
_EQUAL: Final = 1e-12  # nats


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
        divergences = _divergences(histogram, sizes)
        best = int((divergences <= divergences.min() + _EQUAL).nonzero().max())
        return float(sizes[best]) * merged * width


def _divergences(histogram: Tensor, sizes: Tensor) -> Tensor:
    """KL(P || Q) of the first ``size`` bins, in nats; float64 [sizes].

    With h the counts, H their sum and m the mean count of a level's bins that are not empty, P is h / H and Q is m over
    the sum of the kept h, so that both terms of the divergence are differences of running sums.
    """
    sums, members = _running(histogram), _running((histogram > 0).to(histogram.dtype))
    h_log_h = _running(torch.special.xlogy(histogram, histogram))
    total, kept, last = sums[-1], sums[sizes], histogram[sizes - 1]
    above = total - kept
    bounds = (torch.arange(_LEVELS + 1) * sizes.unsqueeze(1) + _LEVELS - 1) // _LEVELS  # bin j has level 128 j // size
    pooled, filled = sums[bounds].diff(dim=1), members[bounds].diff(dim=1)
    mean = pooled / filled.clamp(min=1)
    level = ((sizes - 1) * _LEVELS // sizes).unsqueeze(1)
    of_p = h_log_h[sizes - 1] + torch.special.xlogy(last + above, last + above) - total * total.log()
    in_q = torch.special.xlogy(pooled, mean).sum(1) + torch.special.xlogy(above, mean.gather(1, level).squeeze(1))
    impossible = (kept == 0) | ((above > 0) & (last == 0))  # P where Q has nothing
    return torch.where(impossible, torch.inf, (of_p - in_q) / total + kept.log())


def _running(values: Tensor) -> Tensor:
    return torch.nn.functional.pad(values.cumsum(0), (1, 0))
