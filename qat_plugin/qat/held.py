"""Integers found elsewhere (GPTQ, a clip search, a file) put into a prepared layer, which fake-quantizes to them."""

from __future__ import annotations

import torch
from torch import nn

from qat_plugin.errors import PrepareError
from qat_plugin.numerics import Quantized
from qat_plugin.qat.layers import ATTRIBUTE, current_weight
from qat_plugin.qat.quantizer import LayerQuantizer


@torch.no_grad()
def hold(layer: nn.Module, quantized: Quantized, *, write: bool = True) -> None:
    """Make a prepared layer stand for these integers.

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
        weight.copy_(quantizer.as_weight(quantized.dequantize(weight.dtype), weight))
    quantizer.hold(scale, zero_point)
    if write and not torch.equal(quantizer.integers(weight).q, quantized.q.to(weight.device)):
        kind = str(weight.dtype).removeprefix("torch.")
        raise PrepareError(f"{name}: {kind} weights cannot hold {scheme} integers apart")
