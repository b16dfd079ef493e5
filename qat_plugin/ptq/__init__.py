"""Better integers without training: each weight algorithm one function, and one walker that feeds layers in turn."""

from qat_plugin.ptq.calibrate import calibrate
from qat_plugin.ptq.clip import clip_search, search_scales
from qat_plugin.ptq.gptq import GptqOptions, gptq
from qat_plugin.ptq.hqq import hqq
from qat_plugin.ptq.methods import METHODS, method_named
from qat_plugin.ptq.results import Calibration, LayerResult, calibration_of
from qat_plugin.ptq.statistics import InputStatistics

__all__ = [
    "METHODS",
    "Calibration",
    "GptqOptions",
    "InputStatistics",
    "LayerResult",
    "calibrate",
    "calibration_of",
    "clip_search",
    "gptq",
    "hqq",
    "method_named",
    "search_scales",
]
