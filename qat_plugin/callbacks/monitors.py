"""Watching quantized weights while they are trained: what flips, oscillates, clips and saturates."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from dataclasses import astuple, fields
from typing import Any, Final

import lightning as L
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities import rank_zero_info
from typing_extensions import override

from qat_plugin.errors import ConfigError
from qat_plugin.qat import is_prepared, prepared_layers, quantizers
from qat_plugin.qat.drift import Drift, DriftWatch

_LOOKS_KEPT: Final = 40
_LATE: Final = 0.1
_MUCH: Final = {"saturated": 0.01, "oscillating": 0.03, "clipped": 0.2}
_NAMES: Final = tuple(entry.name for entry in fields(Drift))


class QuantizationMonitor(Callback):
    """Logs how integers and scales behave, every so many steps, and says at the end what to do about it.

    Logged to the Trainer's loggers, whatever their own interval, and to ``trainer.callback_metrics``, as shares from 0
    to 1, means over the layers by their weights::

        quantization/flipped      weights whose integer changed since the last look
        quantization/oscillating  weights whose integer went back the way it came (arXiv:2203.11086)
        quantization/clipped      weights beyond the end of their grid
        quantization/saturated    groups whose scale is zero or at the end of what it can be

    Put it beside :class:`QuantizationAwareTraining`, or over a module that was prepared by hand. What it compares with
    is in its checkpoint state, so that a resumed run logs the same.

    Args:
        every: optimizer steps between looks.
        weights: looked at in each layer, at most; whole rows, evenly spread. Memory is two bytes for each.

    Raises:
        ConfigError: for a number below 1.
    """

    def __init__(self, every: int = 50, *, weights: int = 65_536) -> None:
        super().__init__()
        for name, value in (("every", every), ("weights", weights)):
            if value < 1:
                raise ConfigError(f"{name}={value} is not allowed: it is at least 1")
        self.every, self.weights = every, weights
        self._watches: dict[str, DriftWatch] = {}
        self._looked = -1
        self._looks: deque[tuple[int, dict[str, tuple[float, ...]]]] = deque(maxlen=_LOOKS_KEPT)
        self._loaded: dict[str, Any] | None = None

    @property
    @override
    def state_key(self) -> str:
        return self._generate_state_key(every=self.every)

    @override
    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if not is_prepared(pl_module):
            raise ConfigError(
                f"QuantizationMonitor found no quantized layer in {type(pl_module).__name__}: put "
                "QuantizationAwareTraining(...) among the callbacks, or prepare() the module"
            )
        layers = prepared_layers(pl_module)
        self._watches = {
            name: DriftWatch(layers[name], self.weights)
            for name, quantizer in quantizers(pl_module).items()
            if quantizer.scheme.is_integer and quantizer.layer.tied_to is None
        }
        if self._loaded is not None:
            self._restore(self._loaded)
        elif trainer.global_step != self._looked:
            self._look(trainer.global_step)  # what later looks compare with

    @override
    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        step = trainer.global_step
        if step // self.every <= self._looked // self.every:
            return
        self._look(step)
        metrics = {f"quantization/{name}": value for name, value in self._means().items()}
        for name, value in metrics.items():
            pl_module.log(name, value, logger=False, on_step=True, on_epoch=False)
        for logger in trainer.loggers:
            logger.log_metrics(metrics, step=step)

    @override
    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        rank_zero_info(f"QuantizationMonitor: {self.advice}")

    @property
    def advice(self) -> str:
        """One line on the looks in the last tenth of the run so far."""
        late = [look for step, look in self._looks if step >= (1 - _LATE) * self._looked and step > 0]
        if not late:
            return f"no look yet: training was shorter than every={self.every} steps"
        found: dict[str, Drift] = {}
        for layer in late[-1]:
            columns = zip(*(look[layer] for look in late), strict=True)
            found[layer] = Drift(*(sum(column) / len(late) for column in columns))
        for name, much in _MUCH.items():
            worst = max(found, key=lambda layer: float(getattr(found[layer], name)))
            share = float(getattr(found[worst], name))
            if share > much:
                return _said(name, worst, share)
        return _quiet(self._means())

    @override
    def state_dict(self) -> dict[str, Any]:
        if not self._watches:
            return {} if self._loaded is None else self._loaded
        return {
            "looked": self._looked,
            "looks": [
                {"step": step, "layers": {name: list(drift) for name, drift in look.items()}}
                for step, look in self._looks
            ],
            "layers": {name: watch.export_state() for name, watch in self._watches.items()},
        }

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._loaded = state_dict or None

    def _restore(self, state: Mapping[str, Any]) -> None:
        self._looked = int(state["looked"])
        self._looks.clear()
        for look in state["looks"]:
            drifts = {name: tuple(drift) for name, drift in look["layers"].items()}
            self._looks.append((int(look["step"]), drifts))
        for name, watch in self._watches.items():
            watch.import_state(state["layers"].get(name, {}))
        self._loaded = None

    def _look(self, step: int) -> None:
        self._looks.append((step, {name: astuple(watch.look()) for name, watch in self._watches.items()}))
        self._looked = step

    def _means(self) -> dict[str, float]:
        """The last look, over all layers, by their numbers of weights."""
        _, look = self._looks[-1]
        sizes = {name: watch.quantizer.layer.shape for name, watch in self._watches.items()}
        weights = {name: rows * columns for name, (rows, columns) in sizes.items()}
        total = max(1, sum(weights.values()))
        return {
            name: sum(look[layer][index] * weights[layer] for layer in look) / total
            for index, name in enumerate(_NAMES)
        }


def _said(name: str, layer: str, share: float) -> str:
    if name == "saturated":
        return f"{share:.1%} of the scales of {layer} are at the end of their range: lower scale_learning_rate"
    if name == "oscillating":
        return (
            f"{share:.1%} of the weights of {layer} oscillate between two integers in the last tenth of training: "
            "freeze=0.9, or let the learning rate decay further"
        )
    return (
        f"{share:.1%} of the weights of {layer} lie beyond the end of their grid and do not learn: begin from "
        'initial="mse", learn_scales=True, or raise scale_learning_rate'
    )


def _quiet(means: Mapping[str, float]) -> str:
    if not means["flipped"]:
        return "no integer changed at the last look: the learning rate is too low for training to move the weights"
    return (
        f"nothing stands out: {means['flipped']:.1%} of the integers changed since the look before the last, "
        f"{means['oscillating']:.1%} oscillate, {means['clipped']:.1%} are clipped"
    )
