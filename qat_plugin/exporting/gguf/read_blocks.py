"""Blocks of 32 weights as integers and scales: Q4_0, Q4_1 and Q8_0, as ggml lays them out.

======  =====================================================  ==========================
type    bytes of a block                                       numbers
======  =====================================================  ==========================
Q4_0    d fp16, 16 bytes: low nibbles 0..15, high ones 16..31  ``(nibble - 8) d``
Q4_1    d fp16, m fp16, 16 bytes likewise                      ``nibble d + m``
Q8_0    d fp16, 32 bytes of int8                               ``byte d``
======  =====================================================  ==========================
"""

from __future__ import annotations

from typing import Any, Final

import numpy as np
import numpy.typing as npt
import torch

from qat_plugin.exporting.gguf.read_cursor import Bytes
from qat_plugin.numerics import Quantized
from qat_plugin.scheme import Scheme

SCHEMES: Final = {"Q4_0": "w4a16-g32", "Q4_1": "w4a16-g32-asym", "Q8_0": "w8a16-g32"}
_SIZES: Final = {"Q4_0": 18, "Q4_1": 20, "Q8_0": 34}
_CHUNK = 1 << 15  # blocks


def off_grid(data: Bytes, kind: str) -> str:
    """Why the blocks are not integers of the type's scheme; empty when they are.

    Args:
        data: of the tensor, mapped; read a piece at a time.
        kind: ``"Q4_0"``, ``"Q4_1"`` or ``"Q8_0"``.

    Returns:
        A few words. A scale that is no finite number begins them with ``"damaged"``.
    """
    blocks = data.reshape(-1, _SIZES[kind])
    for at in range(0, len(blocks), _CHUNK):
        if reason := _reason(blocks[at : at + _CHUNK], kind, at):
            return reason
    return ""


def _reason(blocks: Bytes, kind: str, at: int) -> str:
    scale = _halves(blocks, 0)
    least = _halves(blocks, 2) if kind == "Q4_1" else scale
    if len(wrong := np.flatnonzero(~(np.isfinite(scale) & np.isfinite(least)))):
        return f"damaged: block {at + int(wrong[0])} has a scale that is no finite number"
    if kind == "Q8_0" and (blocks[:, 2:] == 0x80).any():
        return "integers of -128, outside symmetric INT8"
    if kind == "Q4_1":
        zero = _zero_points(scale, least)
        if (scale < 0).any() or ((zero < 0) | (zero > 15) | (zero * scale != -least)).any():
            return "minima that are no integer zero point times the scale"
    return ""


def unpack_blocks(data: Bytes, kind: str, shape: tuple[int, int]) -> Quantized:
    """The integers, exactly.

    Args:
        data: of the tensor.
        kind: ``"Q4_0"``, ``"Q4_1"`` or ``"Q8_0"``, of blocks that :func:`off_grid` has nothing against.
        shape: [out_features, in_features], the latter a multiple of 32.

    Returns:
        int8 (Q4_0: -8..7; Q8_0) or uint8 (Q4_1: 0..15) integers, float32 scales [out_features, in_features / 32], and
        zero points of Q4_1.
    """
    blocks, (rows, columns) = data.reshape(-1, _SIZES[kind]), shape
    scheme = Scheme.parse(SCHEMES[kind])
    scale = _halves(blocks, 0)
    zero_point = None
    if kind == "Q8_0":
        q: npt.NDArray[Any] = blocks[:, 2:].copy().view(np.int8)
    else:
        nibbles = blocks[:, 2 if kind == "Q4_0" else 4 :]
        q = np.concatenate([nibbles & 15, nibbles >> 4], axis=1)
        if kind == "Q4_0":
            q = q.view(np.int8)
            q -= 8
        else:
            zero = _zero_points(scale, _halves(blocks, 2)).astype(np.uint8)
            zero_point = torch.from_numpy(zero.reshape(rows, columns // 32))
    return Quantized(
        torch.from_numpy(q.reshape(rows, columns)),
        torch.from_numpy(scale.reshape(rows, columns // 32)),
        zero_point,
        scheme,
    )


def _halves(blocks: Bytes, at: int) -> npt.NDArray[np.float32]:
    """The fp16 number at a byte of each block, float32 (exact)."""
    return np.ascontiguousarray(blocks[:, at : at + 2]).view("<f2").reshape(-1).astype(np.float32)


def _zero_points(scale: npt.NDArray[np.float32], least: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    """``-least / scale``, rounded; 0 where the scale is. Products with fp16 scales are exact in float32."""
    with np.errstate(over="ignore"):
        zero = np.rint(-least / np.where(scale == 0, np.float32(1), scale))
    return np.where(scale == 0, np.float32(0), zero)
