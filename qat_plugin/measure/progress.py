"""Progress of work that takes more than two seconds: a bar on a terminal, plain lines elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch.distributed

Progress = Callable[[int, int | None], None]
"""Called with (done, total) after each unit of work; total is None when it is not known."""

QUIET_S = 2.0
"""Work that ends sooner shows nothing."""

_LINE_EVERY_S = 10.0


@contextmanager
def progressing(progress: Progress | bool, description: str, total: int | None) -> Iterator[Callable[[int], None]]:
    """Yield ``advance(done)`` to be called with the number of units done so far.

    Args:
        progress: ``True`` shows progress on stderr once the work has taken two seconds, on rank zero only; ``False``
            shows nothing; a callable is called with (done, total) each time and nothing is shown.
        description: what is being done, a few words in the present tense.
        total: number of units, or ``None`` when it is not known beforehand.
    """
    if callable(progress):
        yield lambda done: progress(done, total)
    elif not progress or not is_rank_zero():
        yield lambda done: None
    elif sys.stderr.isatty():
        with _bar(description, total) as advance:
            yield advance
    else:
        yield _lines(description, total)


@contextmanager
def _bar(description: str, total: int | None) -> Iterator[Callable[[int], None]]:
    from rich.console import Console
    from rich.progress import Progress as Bar

    started = time.monotonic()
    bar = Bar(console=Console(stderr=True), transient=True)
    task = bar.add_task(description, total=total)

    def advance(done: int) -> None:
        if not bar.live.is_started and time.monotonic() - started >= QUIET_S:
            bar.start()
        bar.update(task, completed=done)

    try:
        yield advance
    finally:
        bar.stop()


def _lines(description: str, total: int | None) -> Callable[[int], None]:
    started = time.monotonic()
    next_line = started + QUIET_S

    def advance(done: int) -> None:
        nonlocal next_line
        now = time.monotonic()
        if now >= next_line:
            next_line = now + _LINE_EVERY_S
            share = f"{done}/{total} ({100 * done // total}%)" if total else f"{done}"
            print(f"{description}: {share} after {now - started:.0f} s", file=sys.stderr, flush=True)

    return advance


def is_rank_zero() -> bool:
    """Whether this process speaks for all of them."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return torch.distributed.get_rank() == 0
    return True
