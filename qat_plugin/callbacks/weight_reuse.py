"""When a Trainer's passes over the same weights reuse what was quantized: accumulation and evaluation."""

from __future__ import annotations

from contextlib import AbstractContextManager

import lightning as L

from qat_plugin.qat import WeightReuse, is_prepared, reusing_weights


class TrainerReuse:
    """At most two :func:`~qat_plugin.qat.reusing_weights` of a module: training's, and evaluation's inside it.

    Each evaluation starts and ends with nothing held, since callbacks that average weights swap them there through
    ``weight.data``, which torch does not count.
    """

    def __init__(self) -> None:
        self._open: list[tuple[AbstractContextManager[WeightReuse], WeightReuse]] = []

    def accumulating(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Before a training batch: reuse weights while gradients are accumulated over several."""
        if trainer.accumulate_grad_batches > 1 and not self._open:
            self._enter(pl_module)
        elif trainer.accumulate_grad_batches == 1:
            self.close()

    def evaluating(self, pl_module: L.LightningModule) -> None:
        """Before validation, a test or prediction."""
        if is_prepared(pl_module):
            self._enter(pl_module)

    def evaluated(self) -> None:
        """After it."""
        if self._open:
            self._open.pop()[0].__exit__(None, None, None)
        self.drop()

    def drop(self) -> None:
        """Before the optimizer steps: the weights will change, and their memory is free for it."""
        for _, reuse in self._open:
            reuse.drop()

    def close(self) -> None:
        """End all reuse."""
        while self._open:
            self._open.pop()[0].__exit__(None, None, None)

    def _enter(self, pl_module: L.LightningModule) -> None:
        context = reusing_weights(pl_module)
        self._open.append((context, context.__enter__()))
