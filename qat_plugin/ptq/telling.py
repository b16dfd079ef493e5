"""What a walk tells while it lasts: one line a block, with its errors and the time that is left."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable

from qat_plugin.measure.progress import QUIET_S, Progress, is_rank_zero
from qat_plugin.ptq.results import Calibration
from qat_plugin.ptq.walker import Part


def teller(method: str, progress: Progress | bool) -> Callable[[Part], None]:
    """A line on stderr after each block once the walk has taken two seconds, on rank zero; or the user's callback."""
    if callable(progress):
        return lambda part: progress(part.index + 1, part.count)
    if not progress or not is_rank_zero():
        return lambda part: None
    started = time.monotonic()
    spent: list[float] = []

    def tell(part: Part) -> None:
        if not part.resumed:
            spent.append(part.seconds)
        if time.monotonic() - started < QUIET_S:
            return
        left = (sum(spent) / len(spent)) * (part.count - part.index - 1) if spent else 0.0
        done = Calibration(method, part.layers).summary().partition("; ")[2] or f"{len(part.layers)} layers"
        how = "read from an earlier session" if part.resumed else f"{part.seconds:.1f} s"
        print(
            f"{method}: {part.name} ({part.index + 1}/{part.count}): {done}; {how}, about {left:.0f} s left",
            file=sys.stderr, flush=True,
        )  # fmt: skip

    return tell
