"""The peak of a process's anonymous host memory while something runs.

Anonymous memory is what the process has allocated itself. Resident memory as a whole also counts the pages of files
that are mapped (the safetensors being read), which the kernel takes back when it needs them.
"""

from __future__ import annotations

import ctypes
import os
import threading
from pathlib import Path
from types import TracebackType
from typing import Final

_STATUS: Final = Path("/proc/self/status")
_EVERY_S: Final = 0.002


def anonymous_bytes() -> int | None:
    """Anonymous resident memory of this process, in bytes; ``None`` where the system does not say (not Linux)."""
    try:
        text = _STATUS.read_text(encoding="ascii")
    except OSError:
        return None
    for line in text.splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) * 1024
    return None


def return_freed_memory() -> None:
    """Give freed memory back to the system, where the C library is glibc; elsewhere nothing happens.

    glibc keeps what was freed between allocations that live on: quantizing a model tensor by tensor leaves holes of
    three times the model.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if os.name == "posix" else None
    if trim is not None:
        trim(0)


class PeakHostMemory:
    """Samples :func:`anonymous_bytes` in a thread between entering and leaving.

    Attributes:
        start: bytes at the start; ``None`` where the system does not say.
        peak: the largest sample.
    """

    def __init__(self) -> None:
        self.start: int | None = None
        self.peak: int | None = None
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="peak-host-memory", daemon=True)

    @property
    def growth(self) -> int | None:
        """Bytes by which the peak lies above the start; ``None`` where the system does not say."""
        return None if self.start is None or self.peak is None else self.peak - self.start

    def sample(self) -> None:
        """Look now, beside the thread's own looks: where a temporary is alive that may not live for long."""
        now = anonymous_bytes()
        if now is not None:
            self.peak = max(now, self.peak or 0)

    def __enter__(self) -> PeakHostMemory:
        self.start = anonymous_bytes()
        self.peak = self.start
        if self.start is not None:
            self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._ended.set()
        if self._thread.is_alive():
            self._thread.join()
            self.sample()

    def _watch(self) -> None:
        while not self._ended.wait(_EVERY_S):
            self.sample()
