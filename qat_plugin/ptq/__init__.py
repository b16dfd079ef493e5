"""Better integers without training: each weight algorithm one function, and one walker that feeds layers in turn."""

from qat_plugin.grid_search import clip_search, search_scales
from qat_plugin.ptq.awq import awq_scale
from qat_plugin.ptq.calibrate import calibrate
from qat_plugin.ptq.gptq import GptqOptions, gptq
from qat_plugin.ptq.hqq import hqq
from qat_plugin.ptq.methods import METHODS, method_named
from qat_plugin.ptq.results import Calibration, LayerResult, calibration_of
from qat_plugin.ptq.scaling import ScalingNote, scale_block
from qat_plugin.ptq.smoothquant import smoothquant_scale
from qat_plugin.ptq.statistics import InputStatistics

__all__ = [
    "METHODS",
    "Calibration",
    "GptqOptions",
    "InputStatistics",
    "LayerResult",
    "ScalingNote",
    "awq_scale",
    "calibrate",
    "calibration_of",
    "clip_search",
    "gptq",
    "hqq",
    "method_named",
    "scale_block",
    "search_scales",
    "smoothquant_scale",
]
