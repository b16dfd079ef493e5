"""Blocks of Q4_0, Q4_1 and Q8_0 as integers of a scheme here, or why they are not."""

from __future__ import annotations

from typing import Final

import numpy as np
import numpy.typing as npt
import torch

from qat_plugin.exporting.gguf.blocks import BYTES, unpack_q4_0, unpack_q4_1, unpack_q8_0, zero_points
from qat_plugin.exporting.gguf.read_cursor import Bytes
from qat_plugin.numerics import Quantized
from qat_plugin.scheme import Scheme

SCHEMES: Final = {"Q4_0": "w4a16-g32", "Q4_1": "w4a16-g32-asym", "Q8_0": "w8a16-g32"}
_CHUNK = 1 << 15  # blocks


def off_grid(data: Bytes, kind: str) -> str:
    """Why the blocks are not integers of the type's scheme; empty when they are.

    Args:
        data: of the tensor, mapped; read a piece at a time.
        kind: ``"Q4_0"``, ``"Q4_1"`` or ``"Q8_0"``.

    Returns:
        A few words. A scale that is no finite number begins them with ``"damaged"``.
    """
    blocks = data.reshape(-1, BYTES[kind])
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
    if kind == "Q4_1" and ((scale < 0).any() or not zero_points(scale, least)[1]):
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
    data, scheme = data.reshape(shape[0], -1), Scheme.parse(SCHEMES[kind])
    zero_point = None
    if kind == "Q4_1":
        q, scale, least = unpack_q4_1(data)
        zero_point = torch.from_numpy(zero_points(scale, least)[0])
    else:
        q, scale = (unpack_q8_0 if kind == "Q8_0" else unpack_q4_0)(data)
    return Quantized(torch.from_numpy(q), torch.from_numpy(scale), zero_point, scheme)


def _halves(blocks: Bytes, at: int) -> npt.NDArray[np.float32]:
    """The fp16 number at a byte of each block, float32 (exact)."""
    return np.ascontiguousarray(blocks[:, at : at + 2]).view("<f2").reshape(-1).astype(np.float32)
