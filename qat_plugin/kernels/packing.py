"""Sub-byte integers in bytes, row by row: the storage that files and the portable kernel share."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

# bits -> (values, bytes) of the least pack of whole bytes
_PACKS = {8: (1, 1), 4: (2, 1), 3: (8, 3), 2: (4, 1)}


def packed_columns(columns: int, bits: int) -> int:
    """Bytes that one row of ``columns`` integers takes."""
    values, size = _PACKS[bits]
    return -(-columns // values) * size


def pack(q: Tensor, bits: int) -> Tensor:
    """Pack integers of ``bits`` bits, little end first.

    Args:
        q: int8 (two's complement) or uint8 integers, [..., columns].
        bits: 8, 4, 3 or 2.

    Returns:
        uint8 [..., packed_columns(columns, bits)]; for 8 bits the integers themselves.
    """
    if bits == 8:
        return q.contiguous()
    values, size = _PACKS[bits]
    field = q.to(torch.uint8) & ((1 << bits) - 1)
    field = F.pad(field, (0, -field.shape[-1] % values)).unflatten(-1, (-1, values))
    if size == 1:
        packed: Tensor = field[..., 0]
        for i in range(1, values):
            packed = packed | (field[..., i] << (i * bits))
        return packed.contiguous()
    shifts = torch.arange(values, device=q.device, dtype=torch.int32) * bits
    word = (field.to(torch.int32) << shifts).sum(-1, dtype=torch.int32)
    split = torch.arange(size, device=q.device, dtype=torch.int32) * 8
    spread: Tensor = (word.unsqueeze(-1) >> split) & 0xFF
    return spread.to(torch.uint8).flatten(-2).contiguous()


def unpack(packed: Tensor, bits: int, columns: int, *, signed: bool) -> Tensor:
    """The inverse of :func:`pack`.

    Args:
        packed: uint8 [..., packed_columns(columns, bits)].
        bits: 8, 4, 3 or 2.
        columns: integers of one row.
        signed: whether they are two's complement.

    Returns:
        int8 (signed) or uint8 [..., columns].
    """
    if bits == 8:
        return packed
    values, size = _PACKS[bits]
    if size == 1:
        field = torch.stack([(packed >> (i * bits)) & ((1 << bits) - 1) for i in range(values)], dim=-1)
    else:
        split = torch.arange(size, device=packed.device, dtype=torch.int32) * 8
        word = (packed.unflatten(-1, (-1, size)).to(torch.int32) << split).sum(-1, dtype=torch.int32)
        shifts = torch.arange(values, device=packed.device, dtype=torch.int32) * bits
        field = ((word.unsqueeze(-1) >> shifts) & ((1 << bits) - 1)).to(torch.uint8)
    field = field.flatten(-2)[..., :columns]
    if not signed:
        return field.contiguous()
    sign = 1 << (bits - 1)
    return ((field ^ sign).to(torch.int8) - sign).contiguous()
