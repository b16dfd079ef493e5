"""Observers from their spelling."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from qat_plugin.errors import ConfigError
from qat_plugin.observers.entropy import EntropyObserver
from qat_plugin.observers.minmax import MinMaxObserver
from qat_plugin.observers.moving_average import AbsMaxObserver
from qat_plugin.observers.mse import MseObserver
from qat_plugin.observers.observer import Observer
from qat_plugin.observers.percentile import PercentileObserver
from qat_plugin.observers.spelling import ObserverSpec


def make_observer(spec: str | ObserverSpec, *, channels: int | None = None, axis: int = -1) -> Observer:
    """An observer from its spelling.

    Args:
        spec: ``minmax``, ``moving-average`` (``:momentum``), ``percentile`` (``:99.99``), ``mse`` or ``entropy``.
        channels: one statistic for each of so many channels (``minmax`` and ``moving-average``); by default one for the
            whole tensor.
        axis: the dimension that counts channels.

    Raises:
        ConfigError: for an unknown spelling, or channels of a kind that keeps a histogram.
    """
    spec = ObserverSpec.parse(spec)
    if spec.kind == "minmax":
        return MinMaxObserver(channels, axis)
    if spec.kind == "moving-average":
        return AbsMaxObserver(0.9 if spec.value is None else spec.value, channels, axis)
    if channels is not None:
        raise ConfigError(
            f"observer={spec} keeps one histogram of the whole tensor; per channel there are minmax and moving-average"
        )
    if spec.kind == "percentile":
        return PercentileObserver(99.99 if spec.value is None else spec.value)
    return MseObserver() if spec.kind == "mse" else EntropyObserver()


def observed_scale(spec: str | ObserverSpec, state: Mapping[str, Tensor]) -> Tensor:
    """The activation scale that a saved observer stands for, float32 scalar on the CPU.

    Args:
        spec: what observed.
        state: a layer's entry of a quantizer state, which holds the observer's buffers by name.
    """
    observer = make_observer(spec)
    observer.restore(state)
    return observer.scale()
