"""Which layers can have a scale per input feature, and what such a scale is."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

if TYPE_CHECKING:
    from qat_plugin.qat.quantizer import LayerQuantizer


def cannot_have_input_scale(quantizer: LayerQuantizer) -> str:
    """Why a layer cannot have an input scale; "" when it can."""
    layer, scheme = quantizer.layer, quantizer.scheme
    if not scheme.is_integer or layer.usage != "linear" or len(layer.shape) != 2:
        return f"{layer.name} ({scheme}) is not a linear layer of integers"
    if layer.tied_to or any(entry.tied_to == layer.name for entry in quantizer.plan):
        return f"the weight of {layer.name} is shared with another layer"
    return ""


def wrong_input_scale(quantizer: LayerQuantizer, input_scale: Tensor) -> str:
    """Why a tensor is not an input scale for this layer; "" when it is."""
    if refusal := cannot_have_input_scale(quantizer):
        return f"{refusal}, and cannot have an input scale"
    columns, shape = quantizer.layer.shape[1], tuple(input_scale.shape)
    if shape == (columns,) and bool(((input_scale > 0) & input_scale.isfinite()).all()):
        return ""
    low, high = (float(x) for x in input_scale.aminmax()) if input_scale.numel() else (0.0, 0.0)
    return (
        f"{quantizer.layer.name}: an input scale is {columns} positive finite numbers, one per input feature; this one "
        f"has shape {shape} and values from {low:g} to {high:g}"
    )
