"""Ctrl-C and SIGTERM: the step in hand is finished and saved, the second one ends the process at once.

Outside of training there is nothing to finish, and the first signal raises KeyboardInterrupt: what a run has written
so far is whole, and it is resumed at the stage it was in.
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any, Final

import lightning as L
from lightning.pytorch.callbacks import Checkpoint
from typing_extensions import override

from qat_plugin.atomic import replacing

EXIT_CODE: Final = 130
_STDERR: Final = 2  # written to by its number: Python's own streams must not be entered from a handler
_SIGNALS: Final = (signal.SIGINT, signal.SIGTERM)


class Interrupted(Exception):
    """Training was stopped between two steps, and a checkpoint was saved."""

    def __init__(self, step: int, checkpoint: Path) -> None:
        super().__init__(f"stopped after step {step}; {checkpoint} is resumable")
        self.step = step
        self.checkpoint = checkpoint


class Interruptions:
    """What the process does on SIGINT and SIGTERM while a run is under way.

    Args:
        farewell: printed to stderr before the process ends at once.
    """

    def __init__(self, farewell: str = "") -> None:
        self.farewell = farewell
        self.received = 0
        self.requested = False
        self._finishing = False

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Handle both signals inside; only the main thread can, elsewhere nothing changes."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {number: signal.signal(number, self._handle) for number in _SIGNALS}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    @contextmanager
    def finishing_steps(self) -> Iterator[None]:
        """Inside, the first signal only sets :attr:`requested`."""
        if threading.current_thread() is threading.main_thread():
            for number in _SIGNALS:  # Lightning has put a handler of its own before ours; its trainer restores
                signal.signal(number, self._handle)
        self._finishing = True
        try:
            yield
        finally:
            self._finishing = False

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self.received += 1
        if self.received > 1:
            os.write(_STDERR, f"\n{self.farewell}\n".encode())
            os._exit(EXIT_CODE)
        if not self._finishing:
            raise KeyboardInterrupt
        self.requested = True
        os.write(_STDERR, b"\nfinishing this step and saving a checkpoint; once more to stop at once\n")


class ResumableCheckpoint(Checkpoint):
    """Saves ``last.ckpt`` every so many optimizer steps, at the end, and when an interruption was requested.

    Args:
        path: the file; each save replaces it, whole or not at all.
        every: optimizer steps between saves; ``None`` for the end and interruptions only.
        interruptions: asked after each step.
    """

    def __init__(self, path: Path, *, every: int | None, interruptions: Interruptions) -> None:
        super().__init__()
        self.path = path
        self.every = every
        self.interruptions = interruptions
        self._step = 0
        self._finishing: Any = None

    @override
    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._step = trainer.global_step
        self._finishing = self.interruptions.finishing_steps()
        self._finishing.__enter__()

    @override
    def on_train_batch_end(self, trainer: L.Trainer, *args: Any, **kwargs: Any) -> None:
        if trainer.global_step == self._step:  # amid an accumulation: its gradients are in no checkpoint
            return
        self._step = trainer.global_step
        if self.interruptions.requested:
            self._save(trainer)
            raise Interrupted(self._step, self.path)
        if self.every and self._step % self.every == 0:
            self._save(trainer)

    @override
    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._leave()
        self._save(trainer)

    @override
    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        self._leave()

    def _save(self, trainer: L.Trainer) -> None:
        with replacing(self.path) as temporary:
            trainer.save_checkpoint(temporary)

    def _leave(self) -> None:
        if self._finishing is not None:
            self._finishing.__exit__(None, None, None)
            self._finishing = None
