"""Signal to quantization-noise ratio, whole tensors and layer by layer."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch

from qat_plugin.errors import QatError, did_you_mean

_CHUNK = 1 << 22  # elements taken to float64 at a time: 32 MB however large the weight


def sqnr(reference: torch.Tensor, other: torch.Tensor) -> float:
    """Signal to quantization-noise ratio in dB: ``10 log10(sum(reference^2) / sum((reference - other)^2))``.

    Computed in float64. Equal tensors give ``inf``, two zero tensors included; a zero reference against anything else
    gives ``-inf``. Every 6.02 dB is one bit.

    Args:
        reference, other: tensors of the same shape, any dtype and device; quantized tensor subclasses are dequantized.

    Raises:
        QatError: when the shapes differ or a value is NaN or infinite.
    """
    if reference.shape != other.shape:
        raise QatError(f"SQNR compares tensors of one shape, got {tuple(reference.shape)} and {tuple(other.shape)}")
    clean, noisy = _plain(reference).reshape(-1), _plain(other).reshape(-1)
    signal = noise = 0.0
    for start in range(0, clean.numel(), _CHUNK):
        x = clean[start : start + _CHUNK].to("cpu", torch.float64)
        y = noisy[start : start + _CHUNK].to("cpu", torch.float64)
        signal += x.square().sum().item()
        noise += (x - y).square().sum().item()
    if not (math.isfinite(signal) and math.isfinite(noise)):
        raise QatError("SQNR is not defined: a tensor has NaN or infinite values; look for them before quantizing")
    if noise == 0.0:
        return math.inf
    return 10.0 * math.log10(signal / noise) if signal > 0.0 else -math.inf


def sqnr_by_layer(reference: Mapping[str, torch.Tensor], other: Mapping[str, torch.Tensor]) -> dict[str, float]:
    """SQNR in dB of each tensor of ``reference`` against the tensor of that name in ``other``, in reference's order.

    ``other`` may hold more than ``reference`` asks for, so a whole state_dict will do there.

    Raises:
        QatError: when ``other`` lacks a name, or a pair cannot be compared; the message names the layer.
    """
    result: dict[str, float] = {}
    for name, tensor in reference.items():
        if name not in other:
            raise QatError(f"no tensor named {name!r} to compare with.{did_you_mean(name, other)}")
        try:
            result[name] = sqnr(tensor, other[name])
        except QatError as error:
            raise QatError(f"{name}: {error}") from error
    return result


def _plain(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor of ordinary numbers, quantized subclasses dequantized."""
    tensor = tensor.detach()
    if hasattr(tensor, "__tensor_flatten__") and hasattr(tensor, "dequantize"):
        plain: torch.Tensor = tensor.dequantize()
        return plain
    return tensor
