"""The greatest magnitude of a batch, averaged over batches."""

from __future__ import annotations

import torch
from torch import Tensor

from qat_plugin.observers.observer import Observer
from qat_plugin.observers.spelling import ObserverSpec


class AbsMaxObserver(Observer):
    """Largest magnitude of the activations seen, as a moving average over batches.

    ``absmax = m absmax + (1 - m) max|x|`` with momentum ``m``; the first batch sets it (as in arXiv:1712.05877,
    section 3.1). It follows activations that training changes. Ranks that synchronise after each batch average the
    greatest magnitude of the global batch.

    Args:
        momentum: in [0, 1); 0 keeps the last batch only.
        channels: one statistic for each of so many channels; by default one for the whole tensor.
        axis: the dimension that counts channels.
    """

    def __init__(self, momentum: float = 0.9, channels: int | None = None, axis: int = -1) -> None:
        super().__init__(ObserverSpec("moving-average", momentum), channels, axis)
        self.momentum = momentum

    def take(self, x: Tensor, largest: Tensor) -> None:
        """See :meth:`Observer.take`."""
        mixed = self.momentum * self.absmax + (1 - self.momentum) * largest
        self.absmax.copy_(torch.where(self.batches == 0, largest, mixed))
