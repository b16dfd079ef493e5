"""Progress of a training stage: the same bar or lines that every other long piece of work shows."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import Callback
from typing_extensions import override

from qat_plugin.measure import Progress, progressing


class TrainingProgress(Callback):
    """Shows optimizer steps done.

    Args:
        description: a few words in the present tense.
        steps: optimizer steps in all.
        progress: as for ``measure.progressing``.
    """

    def __init__(self, description: str, steps: int, progress: Progress | bool = True) -> None:
        self.description = description
        self.steps = steps
        self.progress = progress
        self._stack = ExitStack()
        self._advance: Callable[[int], None] | None = None

    @override
    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        shown = self.progress if trainer.is_global_zero else False
        self._advance = self._stack.enter_context(progressing(shown, self.description, self.steps))

    @override
    def on_train_batch_end(self, trainer: L.Trainer, *args: Any, **kwargs: Any) -> None:
        if self._advance is not None:
            self._advance(trainer.global_step)

    @override
    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._stack.close()

    @override
    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        self._stack.close()
