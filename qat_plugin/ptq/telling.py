"""What a walk tells while it lasts: a line a layer, with its errors and the time that is left, and one a block."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable

from qat_plugin.measure.progress import QUIET_S, Progress, is_rank_zero
from qat_plugin.ptq.results import LayerResult
from qat_plugin.ptq.walker import Listener, Part


def teller(method: str, progress: Progress | bool) -> Listener:
    """Lines on stderr once the walk has taken two seconds, on rank zero; or the user's callback after each block."""
    if callable(progress):
        return _Callback(progress)
    return _Lines(method) if progress and is_rank_zero() else Listener()


class _Callback(Listener):
    def __init__(self, progress: Progress) -> None:
        self._progress = progress

    def part(self, part: Part) -> None:
        self._progress(part.index + 1, part.count)


class _Lines(Listener):
    """Time left is that of the layers done in this session, for each that is still to come."""

    def __init__(self, method: str, clock: Callable[[], float] = time.monotonic) -> None:
        self._method, self._clock = method, clock
        self._started, self._done = clock(), 0

    def layer(self, result: LayerResult, done: int, count: int) -> None:
        self._done += 1
        left = (self._clock() - self._started) / self._done * (count - done)
        error = "no inputs looked at"
        if result.error is not None and result.error_before is not None:
            error = f"error {result.error_before:.2e} (nearest) -> {result.error:.2e}"
        self._say(f"layer {done}/{count} {result.name}: {error}; about {left:.0f} s left")

    def part(self, part: Part) -> None:
        how = "read from an earlier session" if part.resumed else f"{part.seconds:.1f} s"
        self._say(f"{part.name} ({part.index + 1}/{part.count}): {how}")

    def _say(self, text: str) -> None:
        if self._clock() - self._started >= QUIET_S:
            print(f"{self._method}: {text}", file=sys.stderr, flush=True)
