"""Sub-byte integers in bytes."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qat_plugin.kernels.packing import pack, packed_columns, unpack


@settings(deadline=None)
@given(st.sampled_from([8, 4, 3, 2]), st.booleans(), st.integers(1, 4), st.integers(1, 70), st.integers(0, 9999))
def test_unpacking_inverts_packing(bits: int, signed: bool, rows: int, columns: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    low, high = (-(1 << (bits - 1)), (1 << (bits - 1))) if signed else (0, 1 << bits)
    q = torch.randint(low, high, (rows, columns), generator=generator).to(torch.int8 if signed else torch.uint8)
    packed = pack(q, bits)
    assert packed.shape == (rows, packed_columns(columns, bits))
    assert torch.equal(unpack(packed, bits, columns, signed=signed), q)


@pytest.mark.parametrize(("bits", "size"), [(8, 24), (4, 12), (3, 9), (2, 6)])
def test_no_bit_is_wasted(bits: int, size: int) -> None:
    assert packed_columns(24, bits) == size


def test_the_order_is_little_end_first() -> None:
    assert pack(torch.tensor([[1, 2, 15, 0]], dtype=torch.uint8), 4).tolist() == [[0x21, 0x0F]]
    assert pack(torch.tensor([[1, 2, 3, 0]], dtype=torch.uint8), 2).tolist() == [[0b00111001]]
    assert pack(torch.tensor([[-1, -8]], dtype=torch.int8), 4).tolist() == [[0x8F]]
