"""Importing torchao without its noise.

On a machine without CUDA its import logs, on two loggers, that CUDA libraries do not load and that an enum's
registration is deprecated; bitsandbytes' logs that an optional kernel was not found. A filter drops those known texts
during our own import only; ``qat task=doctor`` shows what was dropped. transformers and peft import torchao too: where
a script imports them before this package does, their noise is not ours to silence. On a CUDA machine nothing is
filtered: there a library that does not load matters.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType

import torch

_KNOWN = {
    "torchao": ("Failed to load", "Skipping import of cpp extensions"),
    "torch.utils._pytree": ("is an Enum subclass and is now natively supported",),
    "bitsandbytes.backends.cpu.ops": ("from kernels-community",),  # an optional inference kernel of a hub
}
dropped: list[str] = []


class _DropKnown(logging.Filter):
    def __init__(self, texts: tuple[str, ...]) -> None:
        super().__init__()
        self.texts = texts

    def filter(self, record: logging.LogRecord) -> bool:
        message = record.getMessage()
        if any(text in message for text in self.texts):
            dropped.append(f"{record.name}: {message}")
            return False
        return True


@contextmanager
def known_noise_dropped() -> Iterator[None]:
    """Drop the known texts during the imports inside; transformers imports parts of torchao too."""
    if torch.cuda.is_available():
        yield
        return
    filters = [(logging.getLogger(name), _DropKnown(texts)) for name, texts in _KNOWN.items()]
    for logger, text_filter in filters:
        logger.addFilter(text_filter)
    try:
        yield
    finally:
        for logger, text_filter in filters:
            logger.removeFilter(text_filter)


def import_torchao() -> ModuleType:
    """Import torchao, and the base class of its tensors, quietly on CPU machines."""
    with known_noise_dropped():
        import torchao
        import torchao.utils

    module: ModuleType = torchao
    return module
