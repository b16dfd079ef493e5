"""Better integers without training: each weight algorithm one function, and one walker that feeds layers in turn."""

from qat_plugin.ptq.awq import awq_scale
from qat_plugin.ptq.calibrate import METHODS, calibrate
from qat_plugin.ptq.scaling import ScalingNote, scale_block
from qat_plugin.ptq.smoothquant import smoothquant_scale
from qat_plugin.ptq.statistics import InputStatistics

__all__ = [
    "METHODS",
    "InputStatistics",
    "ScalingNote",
    "awq_scale",
    "calibrate",
    "scale_block",
    "smoothquant_scale",
]
