"""Integers found elsewhere (GPTQ, a clip search, a file) put into a prepared layer, which fake-quantizes to them."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from qat_plugin.errors import PrepareError
from qat_plugin.numerics import Quantized
from qat_plugin.qat.input_scale import wrong_input_scale
from qat_plugin.qat.layers import ATTRIBUTE, current_weight
from qat_plugin.qat.quantizer import LayerQuantizer


@torch.no_grad()
def hold(layer: nn.Module, quantized: Quantized, *, write: bool = True) -> None:
    """Make a prepared layer stand for these integers.

    With an input scale s the integers are those of W s, and the numbers written are divided by it.
    Its scales are fixed to the given ones (learned scales are set to them and learn on), and its weight becomes the
    numbers that the integers stand for, so that quantizing it on those scales gives the same integers again.

    Args:
        layer: prepared, with an integer scheme.
        quantized: integers [out_features, in_features] of the layer's weight format.
        write: write the numbers into the weight; without it only the scales are taken, and training starts from the
            float weight on that grid.

    Raises:
        PrepareError: when shapes or schemes differ, or the weight's float type cannot hold the numbers apart.
    """
    quantizer: LayerQuantizer = getattr(layer, ATTRIBUTE)
    name, scheme = quantizer.layer.name, quantizer.scheme
    if not scheme.is_integer or scheme.weight_format != quantized.scheme.weight_format:
        raise PrepareError(f"{name} is prepared as {scheme} and cannot hold integers of {quantized.scheme}")
    weight = current_weight(layer)
    rows = quantizer.rows(weight)
    if rows.shape != quantized.q.shape:
        raise PrepareError(f"{name} has a weight of {list(rows.shape)}, the integers are {list(quantized.q.shape)}")
    scale, zero_point = quantized.scale.to(weight.device), quantized.zero_point
    zero_point = None if zero_point is None else zero_point.to(weight.device)
    if write:
        numbers = quantized.dequantize(weight.dtype)
        if quantizer.input_scale is not None:
            numbers = quantized.dequantize().to(weight.device) / quantizer.input_scale
        weight.copy_(quantizer.as_weight(numbers, weight))
    quantizer.hold(scale, zero_point)
    if write and not torch.equal(quantizer.integers(weight).q, quantized.q.to(weight.device)):
        kind = str(weight.dtype).removeprefix("torch.")
        raise PrepareError(f"{name}: {kind} weights cannot hold {scheme} integers apart")


@torch.no_grad()
def set_input_scale(layer: nn.Module, input_scale: Tensor | None) -> None:
    """Let a prepared layer divide its input by a scale per feature, and quantize its weight times that scale.

    The forward pass becomes ``x / s`` times the fake-quantized ``W s`` (SmoothQuant, arXiv:2211.10438; AWQ,
    arXiv:2306.00978); the weight itself, and so the state_dict, stays the float model's. The weight's scales start
    anew, and a static scheme forgets the activations it saw: calibrate it afterwards.

    Args:
        layer: prepared.
        input_scale: [in_features], finite and positive; ``None`` for none.

    Raises:
        PrepareError: when the layer cannot have one, or the tensor is not one.
    """
    quantizer: LayerQuantizer = getattr(layer, ATTRIBUTE)
    weight = current_weight(layer)
    if input_scale is not None:
        if wrong := wrong_input_scale(quantizer, input_scale):
            raise PrepareError(wrong)
        input_scale = input_scale.detach().to(weight.device, torch.float32, copy=True)
    quantizer.input_scale = input_scale
    quantizer.start_anew(weight)
