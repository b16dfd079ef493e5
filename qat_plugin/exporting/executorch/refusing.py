"""What a ``.pte`` cannot hold exactly."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from torch import nn

from qat_plugin.exporting.contents import Exportable, Layer
from qat_plugin.exporting.executorch.columns import GROUP
from qat_plugin.exporting.executorch.options import Options
from qat_plugin.exporting.executorch.rounding import Rounding
from qat_plugin.exporting.executorch.skeleton import PREFIX
from qat_plugin.exporting.refusal import Refusal
from qat_plugin.qat.folded import FOLD
from qat_plugin.qat.layers import has_stock_forward
from qat_plugin.scheme import Scheme

_MOST_PADDING = 2


def refusals(model: Exportable, options: Options) -> list[Refusal]:
    """Quantized layers for which XNNPACK has no kernel that computes them as they were trained."""
    found = []
    modules = dict(model.network.named_modules())
    for layer in model.layers.values():
        module = modules.get(layer.name)
        told = ("it is not the weight of a module of the network", "fp32") if module is None else _of(layer, module)
        if told is not None:
            found.append(Refusal(layer.name, str(layer.scheme), *told))
    return found


def _of(layer: Layer, module: nn.Module) -> tuple[str, str] | None:
    """The reason and the nearest scheme."""
    scheme, usage = layer.scheme, layer.weight.usage
    if usage in ("embedding", "both"):
        shared = " (it is tied to the head)" if usage == "both" else ""
        return f"ExecuTorch looks quantized embeddings up by no operator of its default build{shared}", "fp16"
    nearest = _nearest(scheme, layer.weight.in_features, conv=usage == "conv")
    if not scheme.symmetric:
        return "XNNPACK's weights have no zero points", nearest
    if scheme.activation_bits != 8:
        return "XNNPACK multiplies no integer weights by float activations here", nearest
    if usage == "conv" and not scheme.static:
        return "convolutions are lowered with calibrated INT8 inputs only", nearest
    if usage == "conv" and getattr(module, "padding_mode", "zeros") != "zeros":
        return f"padding_mode={module.padding_mode!r} is not lowered", "fp32"
    if scheme.weight_bits == 8 and scheme.group_size is not None:
        return "XNNPACK's INT8 weights have a scale per channel, not per group", nearest
    if scheme.group_size is not None and not _fits(scheme.group_size):
        return f"XNNPACK's groups are multiples of {GROUP}; padded to that, INT4 would be no smaller than INT8", nearest
    if scheme.static and scheme.weight_bits != 8:
        return "XNNPACK's static kernels take INT8 weights", nearest
    return (
        None
        if _stock(module)
        else (f"{type(module).__name__} has a forward of its own, which lowering replaces", "fp32")
    )


def unchained(model: Exportable, roundings: Mapping[str, Rounding]) -> list[Refusal]:
    """Convolutions in groups whose output XNNPACK would have to round on a scale that was not trained."""
    found = []
    for layer in model.layers.values():
        rounding = roundings.get(f"{PREFIX}{layer.name}")
        if layer.scheme.static and rounding is None:
            found.append(
                Refusal(layer.name, str(layer.scheme), "no call of it was found in the traced network", "w8a8")
            )
        elif rounding is not None and not rounding.chained and layer.weight.groups > 1:
            reason = "in groups, and not followed by a ReLU and one other quantized layer, whose scale XNNPACK needs"
            found.append(Refusal(layer.name, str(layer.scheme), reason, "fp32"))
    return found


def _nearest(scheme: Scheme, features: int, *, conv: bool) -> str:
    if conv:
        return "w8a8-static"
    if scheme.weight_bits == 8:
        return "w8a8"
    aim = scheme.group_size or GROUP
    groups = [g for g in range(1, features + 1) if features % g == 0 and _fits(g)]
    return f"w{scheme.weight_bits}a8-g{min(groups, key=lambda g: abs(g - aim))}" if groups else "w8a8"


def _fits(group: int) -> bool:
    """Whether a group is padded to less than twice its size: INT4 would be no smaller than INT8 otherwise."""
    return math.ceil(group / GROUP) * GROUP < _MOST_PADDING * group


def _stock(module: nn.Module) -> bool:
    fold: Any = module.__dict__.get(FOLD)
    if fold is not None and fold.absorbed:
        return True  # only stock layers are
    return has_stock_forward(module) or _is_gpt2_linear(module)


def _is_gpt2_linear(module: nn.Module) -> bool:
    if not type(module).__module__.startswith("transformers."):
        return False
    from transformers.pytorch_utils import Conv1D

    return type(module) is Conv1D
