"""The Lightning face: thin hooks over the rooms above."""

from qat_plugin.callbacks.mixed_precision import MixedPrecision
from qat_plugin.callbacks.monitors import QuantizationMonitor
from qat_plugin.callbacks.ptq import PostTrainingQuantization
from qat_plugin.callbacks.qat import QuantizationAwareTraining
from qat_plugin.callbacks.qlora import QLoRAFinetuning
from qat_plugin.callbacks.resume import ExactResume
from qat_plugin.callbacks.schedule import Schedule

__all__ = [
    "ExactResume",
    "MixedPrecision",
    "PostTrainingQuantization",
    "QLoRAFinetuning",
    "QuantizationAwareTraining",
    "QuantizationMonitor",
    "Schedule",
]
