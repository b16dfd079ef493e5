"""What callbacks that change the module have in common: exact resume inside, and a moment to change it in."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import Callback
from typing_extensions import override

from qat_plugin.callbacks.resume import ExactResume


class ResumingCallback(Callback):
    """A callback that carries an :class:`~qat_plugin.callbacks.ExactResume` along.

    Args:
        exact_resume: save generators and data position, so that a resumed run continues to the bit.
    """

    def __init__(self, *, exact_resume: bool) -> None:
        super().__init__()
        self._resume = ExactResume() if exact_resume else None

    @override
    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if self._resume is not None:
            self._resume.on_train_start(trainer, pl_module)

    @override
    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if self._resume is not None:
            self._resume.on_train_epoch_start(trainer, pl_module)

    @override
    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if self._resume is not None:
            self._resume.on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)

    @override
    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        if self._resume is not None:
            self._resume.teardown(trainer, pl_module, stage)

    def resume_state(self) -> dict[str, Any]:
        """What exact resume puts into a checkpoint; empty without it."""
        return {} if self._resume is None else self._resume.state_dict()

    def load_resume_state(self, state: dict[str, Any]) -> None:
        """The inverse of :meth:`resume_state`."""
        if self._resume is not None:
            self._resume.load_state_dict(state)


def after_configure_model(pl_module: L.LightningModule, then: Callable[[], None]) -> None:
    """Call ``then`` once, right after the module's ``configure_model``: the last moment before weights are restored,
    the optimizer is built and the module is moved. Lightning has no hook there."""
    own = pl_module.configure_model
    wrapped_before = "configure_model" in pl_module.__dict__

    def configure_model() -> None:
        if wrapped_before:
            pl_module.__dict__["configure_model"] = own
        else:
            pl_module.__dict__.pop("configure_model", None)
        own()
        then()

    pl_module.__dict__["configure_model"] = configure_model
