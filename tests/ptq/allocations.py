"""The bytes that torch's CPU allocator holds at most while something runs: counted, not sampled."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch.profiler import ProfilerActivity, profile


def peak_bytes(function: Callable[[], Any]) -> int:
    """The peak of live allocations above those before the call, temporaries inside of operators among them."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        result = function()
    events = recorded.profiler.kineto_results.events()  # type: ignore[union-attr]
    del result
    live = peak = 0
    for event in sorted((e for e in events if e.name() == "[memory]"), key=lambda e: e.start_ns()):
        live += event.nbytes()
        peak = max(peak, live)
    return peak
