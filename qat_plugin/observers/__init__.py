"""Observers of activations: what a static scheme calibrates from.

An observer keeps its statistics in buffers. It watches only when asked to: during training batches, or inside
:func:`qat_plugin.qat.calibrating`; validation never moves it. Names come in when they are first used: the spelling of a
recipe's observer is checked without torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from qat_plugin.observers.distributed import synchronize
    from qat_plugin.observers.entropy import EntropyObserver
    from qat_plugin.observers.factory import make_observer, observed_scale
    from qat_plugin.observers.histogram import HistogramObserver
    from qat_plugin.observers.minmax import MinMaxObserver
    from qat_plugin.observers.moving_average import AbsMaxObserver
    from qat_plugin.observers.mse import MseObserver
    from qat_plugin.observers.observer import Observer, scale_of
    from qat_plugin.observers.percentile import PercentileObserver
    from qat_plugin.observers.spelling import KINDS, ObserverSpec

_WHERE = {
    "AbsMaxObserver": "moving_average",
    "EntropyObserver": "entropy",
    "HistogramObserver": "histogram",
    "KINDS": "spelling",
    "MinMaxObserver": "minmax",
    "MseObserver": "mse",
    "Observer": "observer",
    "ObserverSpec": "spelling",
    "PercentileObserver": "percentile",
    "make_observer": "factory",
    "observed_scale": "factory",
    "scale_of": "observer",
    "synchronize": "distributed",
}

__all__ = [
    "KINDS",
    "AbsMaxObserver",
    "EntropyObserver",
    "HistogramObserver",
    "MinMaxObserver",
    "MseObserver",
    "Observer",
    "ObserverSpec",
    "PercentileObserver",
    "make_observer",
    "observed_scale",
    "scale_of",
    "synchronize",
]


def __getattr__(name: str) -> Any:
    if name not in _WHERE:
        raise AttributeError(f"module 'qat_plugin.observers' has no attribute {name!r}")
    value = getattr(importlib.import_module(f"qat_plugin.observers.{_WHERE[name]}"), name)
    globals()[name] = value  # not asked again
    return value
