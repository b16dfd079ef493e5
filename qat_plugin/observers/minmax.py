"""The greatest magnitude ever seen."""

from __future__ import annotations

import torch
from torch import Tensor

from qat_plugin.observers.observer import Observer
from qat_plugin.observers.spelling import ObserverSpec


class MinMaxObserver(Observer):
    """``absmax = max(absmax, max|x|)``: nothing seen is clipped, and one outlier decides.

    Args:
        channels: one statistic for each of so many channels; by default one for the whole tensor.
        axis: the dimension that counts channels.
    """

    def __init__(self, channels: int | None = None, axis: int = -1) -> None:
        super().__init__(ObserverSpec("minmax"), channels, axis)

    def take(self, x: Tensor, largest: Tensor) -> None:
        """See :meth:`Observer.take`."""
        self.absmax.copy_(torch.maximum(self.absmax, largest))
