"""Observers of activations: what a static scheme calibrates from.

An observer keeps its statistics in buffers. It watches only when asked to: during training batches, or inside
:func:`qat_plugin.qat.calibrating`; validation never moves it.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from qat_plugin.numerics import ACTIVATION_QMAX


class AbsMaxObserver(nn.Module):
    """Largest magnitude of the activations seen, as a moving average over batches.

    ``absmax = m absmax + (1 - m) max|x|`` with momentum ``m``; the first batch sets it (as in arXiv:1712.05877,
    section 3.1).

    Args:
        momentum: in [0, 1); 0 keeps the last batch only.
    """

    absmax: Tensor
    batches: Tensor

    def __init__(self, momentum: float = 0.9) -> None:
        super().__init__()
        self.momentum = momentum
        self.register_buffer("absmax", torch.zeros(()))
        self.register_buffer("batches", torch.zeros((), dtype=torch.int64))

    def forward(self, x: Tensor) -> None:
        """Take one batch of activations of any shape into account; an empty one counts as nothing."""
        if x.numel() == 0:
            return
        largest = x.detach().abs().amax().to(torch.float32)
        mixed = self.momentum * self.absmax + (1 - self.momentum) * largest
        self.absmax.copy_(torch.where(self.batches == 0, largest, mixed))
        self.batches += 1

    @property
    def has_data(self) -> bool:
        """Whether any batch was seen."""
        return bool(self.batches > 0)

    def scale(self) -> Tensor:
        """Scale of symmetric INT8, ``absmax / 127``, float32 scalar; 1 when only zeros were seen."""
        return scale_of(self.absmax)


def scale_of(absmax: Tensor) -> Tensor:
    """The scale that an observed ``absmax`` stands for: float32 of the same shape."""
    return torch.where(absmax > 0, absmax / ACTIVATION_QMAX, 1.0)
