"""One set of statistics on all ranks.

Each rank sees its own batches. A scale must be the same on all of them, so that they reduce at moments that all reach:
after a training batch, at the end of a calibration, before freezing. First the greatest magnitudes, from which the bins
of every histogram follow; then the counts that are new since the last time.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from qat_plugin.observers.histogram import HistogramObserver
from qat_plugin.observers.observer import Observer


def synchronize(observers: Iterable[Observer], group: dist.ProcessGroup | None = None) -> None:
    """Give every rank the statistics of all; without ``torch.distributed``, or alone, nothing happens.

    Histograms and greatest magnitudes are then those of all data, whoever saw it; a moving average is the greatest
    among ranks, which after each batch is that of the global batch. Doing it twice changes nothing.

    Args:
        observers: the same ones, in the same order, on every rank; each rank must call.
        group: the ranks; by default all.
    """
    watched = list(observers)
    alone = not dist.is_available() or not dist.is_initialized() or dist.get_world_size(group) == 1
    if alone or not watched:
        return
    maxima = _reduced([observer.maxima() for observer in watched], dist.ReduceOp.MAX, group)
    for observer, values in zip(watched, maxima, strict=True):
        observer.agree(values)
    histograms = [observer for observer in watched if isinstance(observer, HistogramObserver)]
    counts = _reduced([observer.pending() for observer in histograms], dist.ReduceOp.SUM, group)
    for histogram, pending in zip(histograms, counts, strict=True):
        histogram.settle(pending)


def _reduced(parts: Sequence[Tensor], how: dist.ReduceOp.RedOpType, group: dist.ProcessGroup | None) -> list[Tensor]:
    """All ranks' tensors reduced in one message, each on the device that it was on."""
    if not parts:
        return []
    on_device = dist.get_backend(group) == dist.Backend.NCCL
    device = torch.device("cuda", torch.cuda.current_device()) if on_device else torch.device("cpu")
    message = torch.cat([part.to(device) for part in parts])
    dist.all_reduce(message, how, group)
    pieces = message.split([len(part) for part in parts])
    return [piece.to(part.device) for piece, part in zip(pieces, parts, strict=True)]
