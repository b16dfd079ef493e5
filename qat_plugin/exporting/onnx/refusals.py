"""What a target cannot hold."""

from __future__ import annotations

from dataclasses import replace

from qat_plugin.exporting.contents import Exportable
from qat_plugin.exporting.onnx.options import Options
from qat_plugin.exporting.refusal import Refusal
from qat_plugin.scheme import Scheme


def refusals(model: Exportable, options: Options) -> list[Refusal]:
    """None for ONNX Runtime; for TensorRT zero points, INT8 groups and activations quantized per token."""
    if options.target != "tensorrt":
        return []
    found = []
    for layer in model.layers.values():
        reason, nearest = _for_tensorrt(layer.scheme)
        if reason:
            found.append(Refusal(layer.name, str(layer.scheme), reason, str(nearest)))
    return found


def _for_tensorrt(scheme: Scheme) -> tuple[str, Scheme]:
    if not scheme.symmetric:
        return "TensorRT asks for zero points of 0", replace(scheme, symmetric=True)
    if scheme.quantizes_activations and not scheme.static:
        if scheme.weight_bits == 8 and scheme.group_size is None:
            return "TensorRT quantizes activations with calibrated scales alone", replace(scheme, static=True)
        nearest = replace(scheme, activation_bits=16)
        return "TensorRT quantizes activations with calibrated scales alone", _without_int8_groups(nearest)
    if scheme.weight_bits == 8 and scheme.group_size is not None:
        return "TensorRT has groups for INT4 alone", _without_int8_groups(scheme)
    return "", scheme


def _without_int8_groups(scheme: Scheme) -> Scheme:
    return replace(scheme, group_size=None) if scheme.weight_bits == 8 else scheme
