"""Combinations that cannot work, refused before training."""

from __future__ import annotations

import lightning as L
from lightning.pytorch.callbacks import Callback, ModelCheckpoint, StochasticWeightAveraging, WeightAveraging
from lightning.pytorch.strategies.launchers import _MultiProcessingLauncher
from torch import nn

from qat_plugin.callbacks.schedule import Schedule
from qat_plugin.errors import ConfigError
from qat_plugin.qat.folded import FoldedNorm
from qat_plugin.qat.layers import ATTRIBUTE
from qat_plugin.qat.pairs import norm_pairs

_SHARDING = ("FSDPStrategy", "ModelParallelStrategy", "DeepSpeedStrategy")


def check_strategy(trainer: L.Trainer) -> None:
    """Raise for strategies that shard parameters before a callback could extend the layers.

    Raises:
        ConfigError: naming the strategy and the way that works.
    """
    names = [base.__name__ for base in type(trainer.strategy).__mro__]
    if name := next((name for name in _SHARDING if name in names), None):
        raise ConfigError(
            f"{name} shards parameters while the module is configured, before a callback can prepare it. Call "
            "qat_plugin.prepare(self, policy) at the start of your configure_model, before sharding, and convert() the "
            "consolidated checkpoint"
        )


def check_launcher(trainer: L.Trainer) -> None:
    """Raise where training runs in processes that hand back a state_dict alone: what they converted would be lost.

    Raises:
        ConfigError: naming what works.
    """
    if isinstance(trainer.strategy.launcher, _MultiProcessingLauncher):
        raise ConfigError(
            "spawned and forked processes hand back float weights alone, and what is converted in them is lost: use "
            "strategy='ddp', which starts the script once a device"
        )


def check_other_callbacks(trainer: L.Trainer, callback: Callback) -> None:
    """Raise when a callback that copies the module is listed before ``callback``: its copy would not be quantized.

    Raises:
        ConfigError: naming both callbacks.
    """
    for other in trainer.callbacks:  # type: ignore[attr-defined]
        if other is callback:
            return
        if isinstance(other, (WeightAveraging, StochasticWeightAveraging)):
            raise ConfigError(
                f"{type(other).__name__} copies the module when it is set up: list {type(callback).__name__} before "
                "it, so that the copy is prepared too"
            )


def check_averaging(trainer: L.Trainer, model: nn.Module, schedule: Schedule) -> None:
    """Raise where BatchNorms of a prepared model are to be folded while weights are averaged over the steps.

    Raises:
        ConfigError: naming the callback, a layer and the ways that work.
    """
    averaging = (WeightAveraging, StochasticWeightAveraging)
    found = [type(other).__name__ for other in trainer.callbacks if isinstance(other, averaging)]  # type: ignore[attr-defined]
    if not found or (schedule.start == 0 and schedule.freeze is None):
        return
    for layer, norm in norm_pairs(model).items():
        quantizer = getattr(layer, ATTRIBUTE, None)
        if quantizer is not None and quantizer.scheme.static and not isinstance(norm, FoldedNorm):
            raise ConfigError(
                f"{found[0]} averages weights over the steps, and with start={schedule.start}, "
                f"freeze={schedule.freeze} the BatchNorm behind {quantizer.layer.name} ({quantizer.scheme}) is folded "
                "into it on the way: weights from before and after the fold cannot be averaged. Train from a network "
                "whose BatchNorms have seen data with start=0, or leave weight averaging out"
            )


def saves_nothing(trainer: L.Trainer) -> bool:
    """Whether this is a fast_dev_run, which disables checkpoints."""
    return bool(getattr(trainer, "fast_dev_run", False))


def best_checkpoint_callback(trainer: L.Trainer) -> ModelCheckpoint:
    """The callback whose best checkpoint holds weights and scales.

    Raises:
        ConfigError: when there is none.
    """
    for callback in trainer.checkpoint_callbacks:
        if isinstance(callback, ModelCheckpoint) and callback.monitor is not None:
            if callback.save_weights_only:
                raise ConfigError(
                    "weights='best' needs the scales that were in force, and ModelCheckpoint(save_weights_only=True) "
                    "does not save them: pass save_weights_only=False"
                )
            return callback
    raise ConfigError("weights='best' needs a ModelCheckpoint(monitor=...) among the Trainer's callbacks")
