"""Quantization for PyTorch training: what you trained is what you ship.

Importing this package is cheap and prints nothing: torch, Lightning and the rest come in when a name is first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from qat_plugin.callbacks import (
        ExactResume,
        MixedPrecision,
        PostTrainingQuantization,
        QLoRAFinetuning,
        QuantizationAwareTraining,
        QuantizationMonitor,
    )
    from qat_plugin.conversion import load_converted, save_converted
    from qat_plugin.conversion.convert import convert, is_converted, proof_of
    from qat_plugin.errors import QatError
    from qat_plugin.exporting.reading import load
    from qat_plugin.inference import compile_for_inference
    from qat_plugin.policy import Plan, Policy
    from qat_plugin.ptq.calibrate import calibrate
    from qat_plugin.qat import Phase, calibrating, capture_inputs
    from qat_plugin.qat.prepare import prepare, set_phase, unprepare
    from qat_plugin.runs.exporting import export
    from qat_plugin.scheme import Scheme
    from qat_plugin.sensitivity import auto_policy, rank_layers

_WHERE = {
    "ExactResume": "callbacks",
    "MixedPrecision": "callbacks",
    "PostTrainingQuantization": "callbacks",
    "QLoRAFinetuning": "callbacks",
    "QuantizationAwareTraining": "callbacks",
    "QuantizationMonitor": "callbacks",
    "convert": "conversion",
    "is_converted": "conversion",
    "load_converted": "conversion",
    "proof_of": "conversion",
    "save_converted": "conversion",
    "QatError": "errors",
    "export": "runs.exporting",
    "load": "exporting",
    "compile_for_inference": "inference",
    "Plan": "policy",
    "Policy": "policy",
    "calibrate": "ptq",
    "Phase": "qat",
    "calibrating": "qat",
    "capture_inputs": "qat",
    "prepare": "qat",
    "set_phase": "qat",
    "unprepare": "qat",
    "Scheme": "scheme",
    "auto_policy": "sensitivity",
    "rank_layers": "sensitivity",
}

__all__ = [
    "ExactResume",
    "MixedPrecision",
    "Phase",
    "Plan",
    "Policy",
    "PostTrainingQuantization",
    "QLoRAFinetuning",
    "QatError",
    "QuantizationAwareTraining",
    "QuantizationMonitor",
    "Scheme",
    "__version__",
    "auto_policy",
    "calibrate",
    "calibrating",
    "capture_inputs",
    "compile_for_inference",
    "convert",
    "export",
    "is_converted",
    "load",
    "load_converted",
    "prepare",
    "proof_of",
    "rank_layers",
    "save_converted",
    "set_phase",
    "unprepare",
]


def __getattr__(name: str) -> Any:
    if name not in _WHERE:
        raise AttributeError(f"module 'qat_plugin' has no attribute {name!r}")
    value = getattr(importlib.import_module(f"qat_plugin.{_WHERE[name]}"), name)
    globals()[name] = value  # not asked again
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *_WHERE])
