"""A histogram of magnitudes whose range follows the data, and the scale that a criterion finds in it.

The range is the power of two above the greatest magnitude. When that grows, neighbouring bins merge pairwise, as often
as it doubled; both are exact. So the counts are a function of the multiset of activations alone: not of the order of
the batches, of how they were cut, nor of the rank that saw them::

    |x|  0        w       2w                          2^e > greatest |x|
         |--------|--------|-- ... --|--------|--------|       BINS bins of w = 2^e / BINS
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Final

import torch
from torch import Tensor

from qat_plugin.observers.observer import Observer, scale_of
from qat_plugin.observers.spelling import ObserverSpec

_BITS: Final = 13
BINS: Final = 1 << _BITS
"""At least 32 bins for each step of the widest INT8 grid."""
_LEAST_EXPONENT: Final = -100  # smaller magnitudes share the first bin; 2^(13 + 100) is still a float32
_CHUNK: Final = 1 << 22


class HistogramObserver(Observer):
    """Counts of magnitudes; a subclass says where to clip.

    Attributes:
        counts: magnitudes in each bin, int64 [BINS].
    """

    counts: Tensor

    def __init__(self, spec: ObserverSpec) -> None:
        super().__init__(spec)
        self.register_buffer("counts", torch.zeros(BINS, dtype=torch.int64))
        self._agreed: Tensor | None = None  # the part of the counts that all ranks hold already
        self._scale: Tensor | None = None

    @torch.compiler.disable
    def forward(self, x: Tensor) -> None:
        """See :meth:`Observer.forward`."""
        super().forward(x)

    def take(self, x: Tensor, largest: Tensor) -> None:
        """See :meth:`Observer.take`; of a batch that is not finite nothing is counted, ``absmax`` remembers it."""
        grown = torch.maximum(self.absmax, largest)
        if bool(torch.isfinite(grown)):
            self._widen(grown)
            for part in x.reshape(-1).split(_CHUNK):
                self.counts += _counted(part, _exponent(grown))
        self.absmax.copy_(grown)
        self._scale = None

    @torch.compiler.disable
    def scale(self) -> Tensor:
        """Scale of symmetric INT8, float32 scalar; 1 when only zeros were seen. Searched once after new data."""
        if self._scale is None:
            greatest = float(self.absmax)
            found = greatest
            if greatest > 0 and math.isfinite(greatest):
                found = min(self.clip_at(self.counts.cpu(), 2.0 ** _exponent(self.absmax) / BINS, greatest), greatest)
            self._scale = scale_of(torch.tensor(found, dtype=torch.float32))
        return self._scale.to(self.absmax.device)

    def clip_at(self, counts: Tensor, width: float, greatest: float) -> float:
        """The magnitude that the greatest integer stands for.

        Args:
            counts: int64 [BINS], on the CPU, not all in the first bin by being zeros.
            width: of a bin, in the unit of the activations.
            greatest: the greatest magnitude seen, above 0.
        """
        raise NotImplementedError

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """See :meth:`Observer.restore`."""
        super().restore(state)
        self._agreed, self._scale = self.counts.clone(), None

    def agree(self, maxima: Tensor) -> None:
        """See :meth:`Observer.agree`; the bins are then the same on all ranks."""
        grown = maxima[0].to(torch.float32)
        if bool(torch.isfinite(grown)):
            self._widen(grown)
        super().agree(maxima)
        self._scale = None

    def pending(self) -> Tensor:
        """Counts since ranks last agreed, int64 [BINS]."""
        return self.counts if self._agreed is None else self.counts - self._agreed.to(self.counts.device)

    def settle(self, pending: Tensor) -> None:
        """Take the sum of all ranks' :meth:`pending`."""
        before = 0 if self._agreed is None else self._agreed.to(self.counts.device)
        self.counts.copy_(before + pending.to(self.counts.device))
        self._agreed, self._scale = self.counts.clone(), None

    def _widen(self, grown: Tensor) -> None:
        doublings = _exponent(grown) - _exponent(self.absmax)
        self.counts.copy_(_merged(self.counts, doublings))
        if self._agreed is not None:
            self._agreed = _merged(self._agreed, doublings)


def _exponent(absmax: Tensor) -> int:
    """The least e with ``2^e > absmax`` that the bins can express."""
    return max(math.frexp(float(absmax))[1], _LEAST_EXPONENT) if absmax > 0 else _LEAST_EXPONENT


def _counted(x: Tensor, exponent: int) -> Tensor:
    """Counts of |x| < 2^exponent; multiplying by a power of two is exact, so that each falls into its very bin."""
    bins = (x.abs().to(torch.float32) * 2.0 ** (_BITS - exponent)).to(torch.int64)
    return torch.bincount(bins, minlength=BINS)


def _merged(counts: Tensor, doublings: int) -> Tensor:
    """The counts after the range doubled so many times."""
    merged = counts.reshape(-1, 1 << min(doublings, _BITS)).sum(1)
    return torch.nn.functional.pad(merged, (0, BINS - len(merged)))
