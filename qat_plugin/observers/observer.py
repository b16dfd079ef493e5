"""What all observers have in common: the greatest magnitude seen, how many batches, and the scale that follows."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from qat_plugin.errors import DataError
from qat_plugin.numerics import ACTIVATION_QMAX
from qat_plugin.observers.spelling import ObserverSpec


class Observer(nn.Module):
    """Statistics of the activations seen, in buffers.

    Args:
        spec: what it is, for checkpoints and messages.
        channels: one statistic for each of so many channels; by default one for the whole tensor.
        axis: the dimension that counts channels.

    Attributes:
        absmax: greatest magnitude, or its moving average; float32 scalar, or [channels]. NaN or infinite once an
            activation was.
        batches: number of non-empty tensors seen; int64 scalar.
    """

    absmax: Tensor
    batches: Tensor

    def __init__(self, spec: ObserverSpec, channels: int | None = None, axis: int = -1) -> None:
        super().__init__()
        self.spec, self.channels, self.axis = spec, channels, axis
        self.register_buffer("absmax", torch.zeros(() if channels is None else (channels,), dtype=torch.float32))
        self.register_buffer("batches", torch.zeros((), dtype=torch.int64))

    def forward(self, x: Tensor) -> None:
        """Take one batch of activations of any shape into account; an empty one counts as nothing.

        Raises:
            DataError: when the tensor has another number of channels.
        """
        if x.numel() == 0:
            return
        x = x.detach()
        self.take(x, self._greatest(x))
        self.batches += 1

    def take(self, x: Tensor, largest: Tensor) -> None:
        """Take one batch into account.

        Args:
            x: of any shape, not empty.
            largest: its greatest magnitude, float32 of the shape of ``absmax``.
        """
        raise NotImplementedError

    def scale(self) -> Tensor:
        """Scale of symmetric INT8, float32 of the shape of ``absmax``; 1 where only zeros were seen."""
        return scale_of(self.absmax)

    @property
    def has_data(self) -> bool:
        """Whether any batch was seen."""
        return bool(self.batches > 0)

    @property
    def is_finite(self) -> bool:
        """Whether no activation was NaN or infinite."""
        return bool(torch.isfinite(self.absmax).all())

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Set the buffers to a state's entries of the same names; others are left alone."""
        for name, buffer in self.named_buffers():
            buffer.copy_(state[name])

    def maxima(self) -> Tensor:
        """What ranks agree on by taking the greatest, float64 [n]; NaN as infinity, which a maximum keeps."""
        values = torch.cat([self.absmax.reshape(-1).to(torch.float64), self.batches.reshape(1).to(torch.float64)])
        return torch.nan_to_num(values, nan=torch.inf, posinf=torch.inf)

    def agree(self, maxima: Tensor) -> None:
        """Take the greatest of all ranks' :meth:`maxima`."""
        self.absmax.copy_(maxima[:-1].reshape(self.absmax.shape))
        self.batches.copy_(maxima[-1])

    def extra_repr(self) -> str:
        """Its spelling."""
        return str(self.spec)

    def _greatest(self, x: Tensor) -> Tensor:
        if self.channels is None:
            return x.abs().amax().to(torch.float32)
        if x.shape[self.axis] != self.channels:
            raise DataError(f"the observer counts {self.channels} channels, and the tensor has {list(x.shape)}")
        return x.abs().movedim(self.axis, -1).reshape(-1, self.channels).amax(0).to(torch.float32)


def scale_of(absmax: Tensor) -> Tensor:
    """The scale that an observed ``absmax`` stands for: float32 of the same shape; a NaN stays one."""
    scale = absmax / ACTIVATION_QMAX
    return torch.where(scale == 0, 1.0, scale)
