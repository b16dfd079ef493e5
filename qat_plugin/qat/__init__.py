"""Fake quantization in place: weights keep their names and Parameter objects, phases are state."""

from qat_plugin.qat.advice import low_bit_advice
from qat_plugin.qat.folded import folds
from qat_plugin.qat.folding import fold_norms
from qat_plugin.qat.held import hold, set_input_scale
from qat_plugin.qat.initial import Initial, check_initial, initial_scales
from qat_plugin.qat.prepare import (
    begin_scales,
    get_phase,
    grid_parameters,
    is_prepared,
    plan_of,
    prepare,
    prepared_layers,
    quantizers,
    set_phase,
    unprepare,
)
from qat_plugin.qat.quantizer import LayerQuantizer, Phase
from qat_plugin.qat.reuse import WeightReuse, reusing_weights
from qat_plugin.qat.state import load_quantizer_state, quantizer_state
from qat_plugin.qat.watching import (
    calibrating,
    capture_inputs,
    check_observed,
    observe_with,
    observer_of,
    observing,
    synchronize_observers,
)

__all__ = [
    "Initial",
    "LayerQuantizer",
    "Phase",
    "WeightReuse",
    "begin_scales",
    "calibrating",
    "capture_inputs",
    "check_initial",
    "check_observed",
    "fold_norms",
    "folds",
    "get_phase",
    "grid_parameters",
    "hold",
    "initial_scales",
    "is_prepared",
    "load_quantizer_state",
    "low_bit_advice",
    "observe_with",
    "observer_of",
    "observing",
    "plan_of",
    "prepare",
    "prepared_layers",
    "quantizer_state",
    "quantizers",
    "reusing_weights",
    "set_input_scale",
    "set_phase",
    "synchronize_observers",
    "unprepare",
]
