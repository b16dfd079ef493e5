"""The base weight with its adapter folded in: one arithmetic for training, merging and proof."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

_ADAPTER = "default"


def folded_weight(layer: Any) -> Tensor:
    """``W + s * B A`` of a peft LoRA layer on a float base; in float32 at least, autocast or not; differentiable.

    Training under fake quantization and merging both call this, so that the merged weight is, to the bit, the one that
    the fake quantizer saw.

    Args:
        layer: a peft LoRA layer whose base weight is a float tensor, [out, in] (or [in, out] for Conv1D).

    Returns:
        A tensor of the base weight's shape, in the base weight's type.
    """
    weight: Tensor = layer.get_base_layer().weight
    with torch.autocast(weight.device.type, enabled=False):
        delta: Tensor = layer.get_delta_weight(_ADAPTER)
        if weight.dtype == delta.dtype:
            return weight + delta
        return (weight.float() + delta.float()).to(weight.dtype)
