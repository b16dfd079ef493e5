"""Our integers as compressed-tensors stores them: nothing is rounded on the way.

* ``pack-quantized``, for weights alone: integers as unsigned fields of their bits in int32 words, the first in the
  lowest bits, rows padded to whole words; zero points packed the same way along the output features.
* ``int-quantized``, where activations are quantized too: one int8 a weight, whatever its bits.

Both hold signed integers (asymmetric ones, and their zero points, are lower by 2^(bits - 1) than here); packed, they
are offset by as much again, which gives the unsigned ones back.
https://github.com/vllm-project/compressed-tensors
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from qat_plugin.kernels.packing import pack
from qat_plugin.numerics import Quantized, row_chunks
from qat_plugin.scheme import Scheme

PACKED, INTEGERS = "pack-quantized", "int-quantized"
_WORD = 32


def format_of(scheme: Scheme) -> str:
    """The format that compressed-tensors itself gives a layer of this scheme."""
    return INTEGERS if scheme.quantizes_activations else PACKED


def group_of(scheme: Scheme, targets: list[str]) -> dict[str, Any]:
    """One entry of ``config_groups``.

    Args:
        scheme: an integer scheme.
        targets: names of layers, or ``["Linear"]``.
    """
    strategy = {"tensor": "tensor", "channel": "channel", "group": "group"}[scheme.granularity]
    weights = {
        "num_bits": scheme.weight_bits, "type": "int", "symmetric": scheme.symmetric, "strategy": strategy,
        "group_size": scheme.group_size, "dynamic": False,
    }  # fmt: skip
    activations = None
    if scheme.quantizes_activations:
        activations = {
            "num_bits": 8, "type": "int", "symmetric": True, "strategy": "tensor" if scheme.static else "token",
            "dynamic": not scheme.static,
        }  # fmt: skip
    return {"targets": targets, "weights": weights, "input_activations": activations, "format": format_of(scheme)}


def tensors_of(
    stem: str, held: Quantized, dtype: torch.dtype, activation_scale: Tensor | None = None
) -> dict[str, Tensor]:
    """What the file holds of one layer.

    Args:
        stem: the layer's name.
        held: [out_features, in_features]; on the meta device shapes and types alone.
        dtype: the float type of the layer, in which scales are stored (they are exact in each).
        activation_scale: float32 scalar, of static schemes.
    """
    bits, scale = held.scheme.weight_bits, held.scale.to(dtype)
    found = {"weight_scale": scale.reshape(-1) if held.scheme.per_tensor else scale}
    if format_of(held.scheme) == PACKED:
        rows = [_words(_raised(held.q[rows], bits), bits) for rows in row_chunks(held.q)]
        found["weight_packed"] = torch.cat(rows)
        found["weight_shape"] = torch.tensor(held.q.shape, device="cpu").to(held.q.device)
        if held.zero_point is not None:
            found["weight_zero_point"] = _words(held.zero_point.t(), bits).t().contiguous()
    else:
        found["weight"] = held.q if held.zero_point is None else _lowered(held.q, bits)
        if held.zero_point is not None:
            zero_point = _lowered(held.zero_point, bits)
            found["weight_zero_point"] = zero_point.reshape(-1) if held.scheme.per_tensor else zero_point
        if activation_scale is not None:
            found["input_scale"] = activation_scale.reshape(1).to(torch.float32)
    return {f"{stem}.{part}": tensor for part, tensor in found.items()}


def _raised(q: Tensor, bits: int) -> Tensor:
    return q if q.dtype is torch.uint8 else (q.to(torch.int16) + (1 << (bits - 1))).to(torch.uint8)


def _lowered(q: Tensor, bits: int) -> Tensor:
    return (q.to(torch.int16) - (1 << (bits - 1))).to(torch.int8)


def _words(unsigned: Tensor, bits: int) -> Tensor:
    """uint8 [rows, columns] as int32 [rows, ceil(columns * bits / 32)]."""
    rows, columns = unsigned.shape
    packed = pack(F.pad(unsigned, (0, -columns % _WORD)), bits)
    words: Tensor = packed.flatten().view(torch.int32).unflatten(0, (rows, -1))
    return words[:, : -(-columns * bits // _WORD)].contiguous()
