"""GGUF's blocks of 32 weights: integers and scales packed into bytes, and back, without any arithmetic on the weights.

==== ===== ======================================= =========================
type bytes layout of a block                       number of weight i
==== ===== ======================================= =========================
Q8_0 34    fp16 d, 32 int8 q                       ``q[i] d``
Q4_0 18    fp16 d, 16 bytes of two 4-bit u         ``(u[i] - 8) d``
Q4_1 20    fp16 d, fp16 m, 16 bytes of two 4-bit u ``u[i] d + m``
==== ===== ======================================= =========================

Byte j of a 4-bit block holds weight j in its low half and weight j + 16 in its high half (ggml's ``block_q4_0``). A
zero point z of ours is ``m = -z d``. Arrays may be numpy's or tensors on the CPU; what is returned is numpy's.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from qat_plugin.errors import ExportError

WEIGHTS = 32
"""Weights in one block."""
BYTES = {"Q8_0": 34, "Q4_0": 18, "Q4_1": 20}
"""Bytes of one block, by GGUF's name of its type."""

Bytes = NDArray[np.uint8]
Integers = NDArray[Any]
Numbers = NDArray[np.float32]


def pack_q8_0(q: Any, scale: Any) -> Bytes:
    """Bytes [rows, columns / 32 * 34] of int8 integers.

    Args:
        q: [rows, columns], int8.
        scale: [rows, groups] or [1, 1], float32; repeated over the blocks of a group.

    Raises:
        ExportError: when blocks do not tile the groups, or fp16 does not hold a scale exactly.
    """
    q = np.asarray(q)
    out = _empty("Q8_0", q)
    _half(out, 0, block_scales(scale, q.shape))
    out[..., 2:] = q.astype(np.int8, copy=False).reshape(*out.shape[:2], WEIGHTS).view(np.uint8)
    return out.reshape(len(q), -1)


def pack_q4_0(q: Any, scale: Any) -> Bytes:
    """Bytes [rows, columns / 32 * 18] of integers -8..7 (or of fewer bits); otherwise as :func:`pack_q8_0`."""
    q = np.asarray(q)
    out = _empty("Q4_0", q)
    d = block_scales(scale, q.shape)
    _half(out, 0, np.where(d == 0, np.float32(-0.0), d))  # the zero that ggml's own quantizer writes
    _nibbles(out, 2, (q.astype(np.int8, copy=False) + np.int8(8)).view(np.uint8))
    return out.reshape(len(q), -1)


def pack_q4_1(q: Any, scale: Any, zero_point: Any) -> Bytes:
    """Bytes [rows, columns / 32 * 20] of integers 0..15 with zero points of the scale's shape.

    Raises:
        ExportError: as :func:`pack_q8_0`, and when fp16 does not hold ``zero_point * scale`` exactly.
    """
    q = np.asarray(q)
    out = _empty("Q4_1", q)
    d = block_scales(scale, q.shape)
    z = block_scales(np.asarray(zero_point).astype(np.float32), q.shape)
    _half(out, 0, d)
    _half(out, 2, 0.0 - z * d)  # 0 - 0 is +0
    _nibbles(out, 4, q.astype(np.uint8, copy=False))
    return out.reshape(len(q), -1)


def unpack_q8_0(packed: Any) -> tuple[Integers, Numbers]:
    """``(q, d)``: int8 [rows, columns] and float32 [rows, columns / 32] of bytes [rows, bytes a row]."""
    blocks = _blocks("Q8_0", packed)
    q = np.ascontiguousarray(blocks[..., 2:]).view(np.int8)
    return q.reshape(len(blocks), -1), _read_half(blocks, 0)


def unpack_q4_0(packed: Any) -> tuple[Integers, Numbers]:
    """``(q, d)``: int8 integers -8..7 [rows, columns] and float32 [rows, columns / 32]."""
    blocks = _blocks("Q4_0", packed)
    q = _read_nibbles(blocks, 2).view(np.int8) - np.int8(8)
    return q, _read_half(blocks, 0)


def unpack_q4_1(packed: Any) -> tuple[Integers, Numbers, Numbers]:
    """``(u, d, m)``: uint8 integers 0..15 [rows, columns] and float32 [rows, columns / 32] of both halves."""
    blocks = _blocks("Q4_1", packed)
    return _read_nibbles(blocks, 4), _read_half(blocks, 0), _read_half(blocks, 2)


def zero_points(d: Any, m: Any) -> tuple[NDArray[np.uint8], bool]:
    """Integer zero points of Q4_1's minima, and whether all of them are ours: ``m = -z d`` exactly with z in 0..15.

    Blocks with ``d = 0`` hold the number m everywhere; z is 0 there, and exact for ``m = 0`` alone.
    """
    d, m = np.asarray(d, np.float32), np.asarray(m, np.float32)
    with np.errstate(invalid="ignore"):
        z = np.nan_to_num(np.rint(-m / np.where(d == 0, np.float32(1), d)), nan=0.0, posinf=0.0, neginf=0.0)
    z = np.where(d == 0, 0, np.clip(z, 0, 15)).astype(np.float32)
    return z.astype(np.uint8), bool(np.all(0.0 - z * d == m))


def block_scales(scale: Any, shape: tuple[int, ...]) -> Numbers:
    """Scales [rows, groups] (or [1, 1]) for each block of a weight of ``shape``: [rows, columns / 32].

    Raises:
        ExportError: when 32 does not divide the groups.
    """
    scale = np.asarray(scale, np.float32)
    rows, columns = shape
    blocks = columns // WEIGHTS
    groups = scale.shape[1]
    if columns % WEIGHTS or blocks % groups:
        raise ExportError(f"rows of {columns} weights in {groups} groups do not tile blocks of {WEIGHTS}")
    return np.broadcast_to(np.repeat(scale, blocks // groups, axis=1), (rows, blocks))


def fp16_holds(numbers: Any) -> bool:
    """Whether fp16 holds each number exactly."""
    numbers = np.asarray(numbers, np.float32)
    with np.errstate(over="ignore"):
        return bool(np.array_equal(numbers.astype(np.float16).astype(np.float32), numbers))


def _empty(kind: str, q: Integers) -> Bytes:
    rows, columns = q.shape
    return np.empty((rows, columns // WEIGHTS, BYTES[kind]), np.uint8)


def _blocks(kind: str, packed: Any) -> Bytes:
    packed = np.asarray(packed, np.uint8)
    if packed.ndim != 2 or packed.shape[1] % BYTES[kind]:
        raise ExportError(f"bytes of shape {packed.shape} are no rows of {kind} blocks ({BYTES[kind]} bytes each)")
    blocks: Bytes = packed.reshape(len(packed), -1, BYTES[kind])
    return blocks


def _half(out: Bytes, at: int, numbers: Numbers) -> None:
    if not fp16_holds(numbers):
        raise ExportError("fp16 does not hold every scale (or zero point times scale) of this weight exactly")
    out[..., at : at + 2] = np.ascontiguousarray(numbers).astype("<f2").view(np.uint8).reshape(*out.shape[:2], 2)


def _read_half(blocks: Bytes, at: int) -> Numbers:
    halves = np.ascontiguousarray(blocks[..., at : at + 2]).view("<f2")
    return halves.reshape(blocks.shape[:2]).astype(np.float32)


def _nibbles(out: Bytes, at: int, unsigned: Bytes) -> None:
    pairs = unsigned.reshape(*out.shape[:2], 2, WEIGHTS // 2)
    np.bitwise_or(pairs[..., 0, :], pairs[..., 1, :] << np.uint8(4), out=out[..., at:])


def _read_nibbles(blocks: Bytes, at: int) -> Bytes:
    pairs = blocks[..., at:]
    return np.stack([pairs & 15, pairs >> 4], axis=2).reshape(len(blocks), -1)
