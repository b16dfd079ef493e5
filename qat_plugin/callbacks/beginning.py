"""Where learned scales begin when fake quantization starts: at the weights' range, at the least error, or by GPTQ."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Literal, get_args

import lightning as L
import torch
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn

from qat_plugin.callbacks.calibration_data import TransferredBatches, first_batches, network_of, training_source
from qat_plugin.errors import ConfigError
from qat_plugin.ptq import GptqOptions, calibrate
from qat_plugin.ptq.results import Calibration, calibration_of
from qat_plugin.qat import Initial, Phase, begin_scales, get_phase, set_phase

Beginning = Literal["minmax", "mse", "gptq"]
_INSTEAD = "calibrate the prepared module before the fit (qat_plugin.calibrate), or take initial='mse'"


@dataclass(frozen=True)
class Beginnings:
    """How learned scales begin.

    Attributes:
        method: ``minmax`` and ``mse`` look at the weights alone (:func:`qat_plugin.qat.initial_scales`); ``gptq``
            calibrates on training batches, and weights become the numbers that its integers stand for.
        batches: training batches to calibrate on, at most.
        gptq: GPTQ's options.

    Raises:
        ConfigError: for another method, or no batches.
    """

    method: Beginning = "minmax"
    batches: int = 32
    gptq: GptqOptions | None = None

    def __post_init__(self) -> None:
        if self.method not in get_args(Beginning):
            raise ConfigError(f"initial={self.method!r} is not one of {', '.join(get_args(Beginning))}")
        if isinstance(self.batches, bool) or not isinstance(self.batches, int) or self.batches < 1:
            raise ConfigError(
                f"calibration_batches={self.batches!r} is not allowed: give a number of batches, at least 1"
            )

    @property
    def initial(self) -> Initial:
        """Where the layers' own scales begin, until GPTQ has found better ones."""
        return "mse" if self.method == "gptq" else self.method

    @property
    def calibrates(self) -> bool:
        """Whether data is looked at."""
        return self.method == "gptq"

    def check(self, trainer: L.Trainer) -> None:
        """Raise where calibrating would leave ranks with weights that differ.

        Raises:
            ConfigError: for more than one process.
        """
        if self.calibrates and trainer.world_size > 1:
            raise ConfigError(
                f"initial='gptq' calibrates in one process, and this trainer has {trainer.world_size}, each with data "
                f"of its own: {_INSTEAD}"
            )

    def wait(self, pl_module: L.LightningModule) -> None:
        """Back to float until the first step, where GPTQ has data.

        It is a phase that a checkpoint holds, so that a run which is resumed after that step does not calibrate again.

        Raises:
            ConfigError: for a module that has no ``forward`` to calibrate through.
        """
        if self.calibrates:
            network_of(pl_module)
            set_phase(pl_module, Phase.FLOAT)

    def warn_if_late(self, pl_module: L.LightningModule) -> None:
        """Say that a module which somebody prepared, and did not calibrate, does not begin by GPTQ."""
        if not self.calibrates or get_phase(pl_module) in (Phase.FLOAT, Phase.OBSERVING):
            return
        if not isinstance(getattr(network_of(pl_module), "_qat_calibration", None), Calibration):
            rank_zero_warn(
                "the module was prepared and fake-quantized before this fit: its scales go on from where they are, "
                "and initial='gptq' does nothing"
            )

    def __call__(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Let the scales begin from the weights as they are now; call it right before fake quantization starts.

        The batches are those of a pass that begins with Lightning's global seed (``seed_everything``; 0 without it),
        whenever that is: a run that was stopped before this moment and resumed takes the same ones.

        Raises:
            DataError: when there is no training batch, or the module does not take it.
        """
        if not self.calibrates:
            begin_scales(pl_module)
            return
        source = training_source(trainer, instead=_INSTEAD)
        batches = TransferredBatches(first_batches(source, self.batches, seed=_seed()), trainer, pl_module)
        network = network_of(pl_module)
        with torch.inference_mode(False), torch.no_grad(), trainer.precision_plugin.forward_context():
            calibrate(network, None, batches, method=self.method, gptq=self.gptq, progress=trainer.is_global_zero)
        found = calibration_of(network).summary()
        rank_zero_info(f"scales begin by {found}; on {len(batches)} batches of {source.name}")


def _seed() -> int:
    return int(os.environ.get("PL_GLOBAL_SEED", "0"))
