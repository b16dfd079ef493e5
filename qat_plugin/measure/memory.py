"""Peaks of tensors while something runs, from torch's allocators, to the byte.

::

    cpu_allocations()    every tensor on the host; slow (torch's profiler), for a few training steps
    cuda_allocations()   every tensor on a card, and what the allocator has reserved for them; free

:mod:`qat_plugin.measure.host_memory` sees the whole process as the system does.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from qat_plugin.errors import QatError


@dataclass
class Allocations:
    """Bytes of tensors, over what there was when the block was entered; filled in when it is left.

    Attributes:
        peak: most bytes alive at one time.
        left: bytes still alive at the end.
        reserved: on CUDA, the most that torch's allocator held of the card's memory, all in all; else ``None``.
    """

    peak: int = 0
    left: int = 0
    reserved: int | None = None


@contextmanager
def cpu_allocations() -> Iterator[Allocations]:
    """Follow every allocation of torch's CPU allocator in this thread and in the autograd threads that it starts.

    Bytes are those asked of the allocator (a tensor's storage), to the byte. Freeing what was there before the block is
    not seen: it neither lowers the peak nor what is left. Scratch memory that libraries (oneDNN, MKL) take for
    themselves is no tensor; :class:`~qat_plugin.measure.host_memory.AnonymousMemory` sees it.

    Raises:
        QatError: when torch's profiler runs already, which does not nest.

    Example::

        with cpu_allocations() as memory:
            loss(model(batch)).backward()
        print(memory.peak)
    """
    if torch._C._autograd._profiler_enabled():
        raise QatError("cpu_allocations() measures with torch's profiler, which is running already and does not nest")
    found = Allocations()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiler:
        yield found
    results: Any = profiler.profiler.kineto_results
    changes = [
        (node.start_time_ns, node.typed[1].ptr, node.typed[1].alloc_size)
        for node in _nodes(results.experimental_event_tree())
        if node.name == "[memory]" and node.typed[1].device.type == "cpu"
    ]
    blocks: dict[int, int] = {}
    alive = 0
    for _, address, change in sorted(changes, key=lambda entry: entry[0]):
        if change > 0:
            blocks[address] = change
            alive += change
        else:
            alive -= blocks.pop(address, 0)  # one of an earlier profile is freed: not of this block
        found.peak = max(found.peak, alive)
    found.left = alive


@contextmanager
def cuda_allocations(device: torch.device | str | int = "cuda") -> Iterator[Allocations]:
    """Follow torch's allocator on one card; resets its peak counters.

    Args:
        device: a CUDA device.

    Raises:
        QatError: when it is none, or there is none here.
    """
    card = torch.device("cuda", device) if isinstance(device, int) else torch.device(device)
    if card.type != "cuda" or not torch.cuda.is_available():
        raise QatError(f"cuda_allocations({str(device)!r}): " + ("no CUDA device here" if card.type == "cuda" else
                       "not a CUDA device; cpu_allocations() measures the host"))  # fmt: skip
    torch.cuda.synchronize(card)
    torch.cuda.reset_peak_memory_stats(card)
    start, found = torch.cuda.memory_allocated(card), Allocations()
    yield found
    torch.cuda.synchronize(card)
    found.peak = torch.cuda.max_memory_allocated(card) - start
    found.left = torch.cuda.memory_allocated(card) - start
    found.reserved = torch.cuda.max_memory_reserved(card)


def _nodes(roots: Iterable[Any]) -> Iterator[Any]:
    """Every event of a profile."""
    waiting = list(roots)
    while waiting:
        node = waiting.pop()
        yield node
        waiting.extend(node.children)
