"""Blocks against the gguf package's own quantizer and dequantizer."""

from __future__ import annotations

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as Type
from hypothesis import given, settings
from hypothesis import strategies as st

from qat_plugin.errors import ExportError
from qat_plugin.exporting.gguf.blocks import (
    BYTES,
    fp16_holds,
    pack_q4_0,
    pack_q4_1,
    pack_q8_0,
    unpack_q4_0,
    unpack_q4_1,
    unpack_q8_0,
    zero_points,
)
from qat_plugin.numerics import Quantized, round_to_nearest
from qat_plugin.scheme import Scheme


def quantized(scheme: str, columns: int = 256, rows: int = 5, seed: int = 0) -> Quantized:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, columns, generator=generator) * torch.rand(rows, 1, generator=generator).exp()
    return round_to_nearest(weight, Scheme.parse(scheme))


@pytest.mark.parametrize("scheme", ["w8a16-g32", "w8a16-g128", "w8a16", "w8a8", "w8a16-tensor"])
def test_q8_0_holds_the_numbers_of_int8(scheme: str) -> None:
    held = quantized(scheme)
    packed = pack_q8_0(held.q, held.scale)
    assert packed.shape == (5, 256 // 32 * BYTES["Q8_0"])
    assert np.array_equal(gguf.dequantize(packed, Type.Q8_0), held.dequantize().numpy())
    q, d = unpack_q8_0(packed)
    assert np.array_equal(q, held.q.numpy()) and d.shape == (5, 8)


@pytest.mark.parametrize("scheme", ["w4a16-g32", "w4a8-g64", "w4a16", "w3a16-g32", "w2a16-g32", "w4a16-tensor"])
def test_q4_0_holds_the_numbers_of_int4_and_less(scheme: str) -> None:
    held = quantized(scheme)
    packed = pack_q4_0(held.q, held.scale)
    assert np.array_equal(gguf.dequantize(packed, Type.Q4_0), held.dequantize().numpy())
    assert np.array_equal(unpack_q4_0(packed)[0], held.q.numpy())


@pytest.mark.parametrize("scheme", ["w4a16-g32-asym", "w4a16-asym", "w3a16-g64-asym", "w2a16-g32-asym"])
def test_q4_1_holds_the_numbers_with_zero_points(scheme: str) -> None:
    held = quantized(scheme)
    assert held.zero_point is not None
    packed = pack_q4_1(held.q, held.scale, held.zero_point)
    assert np.array_equal(gguf.dequantize(packed, Type.Q4_1), held.dequantize().numpy())
    u, d, m = unpack_q4_1(packed)
    z, exact = zero_points(d, m)
    assert exact and np.array_equal(u, held.q.numpy())
    groups = held.zero_point.shape[1]
    assert np.array_equal(
        z.reshape(5, groups, -1), np.broadcast_to(held.zero_point[..., None], (5, groups, 8 // groups))
    )


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 2**31), size=st.floats(-2, 4))
def test_ggufs_own_quantizer_gives_the_same_bytes_where_groups_are_blocks(seed: int, size: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(3, 64, generator=generator) * 10**size
    four, eight = (round_to_nearest(weight, Scheme.parse(name)) for name in ("w4a16-g32", "w8a16-g32"))
    assert np.array_equal(gguf.quantize(four.dequantize().numpy(), Type.Q4_0), pack_q4_0(four.q, four.scale))
    assert np.array_equal(gguf.quantize(eight.dequantize().numpy(), Type.Q8_0), pack_q8_0(eight.q, eight.scale))


def test_scales_that_fp16_does_not_hold_are_an_error() -> None:
    held = quantized("w8a16-g32")
    with pytest.raises(ExportError, match="fp16 does not hold"):
        pack_q8_0(held.q, held.scale * (1 + 2**-12))
    with pytest.raises(ExportError, match="fp16 does not hold"):
        pack_q4_0(held.q.clamp(-8, 7), torch.full_like(held.scale, 3e-8))
    with pytest.raises(ExportError, match="do not tile"):
        pack_q8_0(quantized("w8a16-g32", columns=96).q[:, :43], held.scale[:, :1])
    assert fp16_holds(np.float32(2**-24)) and not fp16_holds(np.float32(2**-25)) and not fp16_holds(np.float32(1e6))


def test_minima_of_other_makers_are_told_from_ours() -> None:
    d = np.full((1, 2), 0.5, np.float32)
    assert zero_points(d, np.array([[-1.5, 0]], np.float32))[1]
    assert not zero_points(d, np.array([[-1.4, 0]], np.float32))[1]
    assert not zero_points(d, np.array([[0.5, 0]], np.float32))[1]
    assert not zero_points(np.zeros((1, 1), np.float32), np.ones((1, 1), np.float32))[1]


def test_bytes_that_are_no_blocks_are_an_error() -> None:
    with pytest.raises(ExportError, match="no rows of Q4_0 blocks"):
        unpack_q4_0(np.zeros((2, 19), np.uint8))
