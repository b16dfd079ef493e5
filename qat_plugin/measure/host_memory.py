"""Host memory as the system sees it: this process's anonymous memory, its peak, and what is available.

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

import torch

from qat_plugin.errors import QatError

_STATUS: Final = Path("/proc/self/status")
_SYSTEM: Final = Path("/proc/meminfo")
_EVERY_S: Final = 0.002


def anonymous_bytes() -> int | None:
    """Anonymous resident memory of this process in bytes; ``None`` where the system does not say (not Linux)."""
    return _kib(_STATUS, "RssAnon:")


def available_bytes(device: torch.device | str = "cpu") -> int | None:
    """Memory in bytes that new tensors can have on a device; ``None`` where the system does not say."""
    place = torch.device(device)
    if place.type == "cuda":
        return int(torch.cuda.mem_get_info(place)[0])
    return _kib(_SYSTEM, "MemAvailable:")


def return_freed_memory() -> None:
    """Give freed memory back to the system, where the C library is glibc; elsewhere nothing happens.

    glibc keeps what was freed between allocations that live on: quantizing a model tensor by tensor leaves holes of
    three times the model.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if os.name == "posix" else None
    if trim is not None:
        trim(0)


class AnonymousMemory:
    """The peak of :func:`anonymous_bytes`, sampled by a thread while a block runs; a shorter peak may be missed.

    Attributes:
        start: bytes when the block was entered; ``None`` where the system does not say.
        peak: the largest sample in bytes, or ``None``.

    Args:
        interval: seconds between samples.
    """

    def __init__(self, interval: float = _EVERY_S) -> None:
        if not interval > 0:
            raise QatError(f"interval={interval} is not allowed: it is in seconds, above 0")
        self.interval = interval
        self.start: int | None = None
        self.peak: int | None = None

    @property
    def growth(self) -> int | None:
        """Bytes of the peak over the start, or ``None``."""
        return None if self.start is None or self.peak is None else self.peak - self.start

    def sample(self) -> None:
        """Look now, beside the thread's own looks: where a temporary is alive that may not live for long."""
        now = anonymous_bytes()
        if now is not None:
            self.peak = max(now, self.peak or 0)

    def __enter__(self) -> AnonymousMemory:
        self.start = self.peak = anonymous_bytes()
        if self.start is not None:
            self._ended = threading.Event()
            self._thread = threading.Thread(target=self._watch, name="anonymous-memory", daemon=True)
            self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self.start is not None:
            self._ended.set()
            self._thread.join()
            self.sample()

    def _watch(self) -> None:
        while not self._ended.wait(self.interval):
            self.sample()


def _kib(file: Path, key: str) -> int | None:
    """A line "Key:  number kB" of a file of the system, in bytes."""
    try:
        text = file.read_text(encoding="ascii")
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in text.splitlines() if line.startswith(key)), None)
