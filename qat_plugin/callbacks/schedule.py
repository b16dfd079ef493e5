"""When fake quantization starts and when its scales freeze."""

from __future__ import annotations

import math
from dataclasses import dataclass

import lightning as L

from qat_plugin.errors import ConfigError
from qat_plugin.qat import Phase


@dataclass(frozen=True)
class Steps:
    """A schedule in optimizer steps.

    Attributes:
        start: the first step that is fake-quantized.
        freeze: the first step with frozen scales, or ``None``.
        observe: whether static schemes watch activations before ``start``.
    """

    start: int
    freeze: int | None
    observe: bool

    def phase(self, step: int) -> Phase:
        """The phase at an optimizer step: a pure function, so that a resumed run is where it was."""
        if self.freeze is not None and step >= self.freeze:
            return Phase.FROZEN
        if step >= self.start:
            return Phase.FAKE_QUANTIZED
        return Phase.OBSERVING if self.observe else Phase.FLOAT


@dataclass(frozen=True)
class Schedule:
    """A schedule as a user writes it: an int counts optimizer steps, a float is a fraction of all of them.

    Raises:
        ConfigError: for a negative or out-of-range moment, or a freeze before the start.
    """

    start: int | float = 0
    freeze: int | float | None = None

    def __post_init__(self) -> None:
        _check("start", self.start)
        if self.freeze is None:
            return
        _check("freeze", self.freeze)
        if type(self.start) is type(self.freeze) and self.freeze < self.start:
            raise ConfigError(
                f"freeze={self.freeze} comes before start={self.start}: scales freeze after they were used"
            )

    def resolve(self, total: float, *, observe: bool = False) -> Steps:
        """The schedule in steps.

        Args:
            total: optimizer steps of the whole run; infinite when unknown.
            observe: whether the plan has static schemes.

        Raises:
            ConfigError: when a fraction is given of an unknown number of steps, or the start lies after the end.
        """
        start = _to_steps("start", self.start, total)
        freeze = None if self.freeze is None else _to_steps("freeze", self.freeze, total)
        if start >= total:
            raise ConfigError(
                f"start={self.start} is step {start}, and training ends after {int(total)}: fake quantization would "
                "never start. Start earlier or train longer"
            )
        if freeze is not None and freeze < start:
            raise ConfigError(
                f"freeze={self.freeze} is step {freeze}, before start={self.start}, which is step {start}"
            )
        return Steps(start, freeze, observe)


def total_steps(trainer: L.Trainer) -> float:
    """Optimizer steps of the whole run, in the unit of ``trainer.global_step`` (summed over optimizers)."""
    if trainer.max_steps >= 0 and trainer.max_epochs in (None, -1):
        return trainer.max_steps
    total = trainer.estimated_stepping_batches
    if total < 0:  # epochs of a stream: Lightning answers with max_steps, -1
        return math.inf
    if trainer.max_steps >= 0:
        return min(total, trainer.max_steps)
    return total * max(1, len(trainer.optimizers)) if not trainer.lightning_module.automatic_optimization else total


def _check(name: str, moment: object) -> None:
    allowed = "an optimizer step (int >= 0) or a fraction of training (float from 0 to 1)"
    if isinstance(moment, bool) or not isinstance(moment, (int, float)):
        raise ConfigError(f"{name}={moment!r} is not allowed: give {allowed}")
    if moment < 0 or (isinstance(moment, float) and not moment <= 1):
        raise ConfigError(f"{name}={moment} is not allowed: give {allowed}")


def _to_steps(name: str, moment: int | float, total: float) -> int:
    if isinstance(moment, int):
        return moment
    if moment == 0:
        return 0
    if math.isinf(total):
        raise ConfigError(
            f"{name}={moment} is a fraction of training, whose length is not known (no max_steps, or an endless "
            "dataset); give max_steps to the Trainer, or an int step"
        )
    return int(moment * total)
