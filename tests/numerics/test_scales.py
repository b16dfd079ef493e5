"""Scales that every target holds exactly."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from qat_plugin.numerics import choose_qparams, round_scale
from qat_plugin.scheme import Scheme

FLOATS = st.floats(width=32, allow_nan=False, allow_infinity=False)


@given(FLOATS)
def test_a_scale_is_exact_in_bf16_and_fp16(value: float) -> None:
    scale = round_scale(torch.tensor([value]))
    assert torch.equal(scale.to(torch.bfloat16).float(), scale)
    assert torch.equal(scale.to(torch.float16).float(), scale)


@given(st.floats(min_value=2.0**-14, max_value=65000.0, width=32))
def test_it_is_the_nearest_bf16_where_fp16_is_normal(value: float) -> None:
    given_scale = torch.tensor([value])
    assert torch.equal(round_scale(given_scale), given_scale.to(torch.bfloat16).float())
    assert torch.equal(round_scale(-given_scale), -given_scale.to(torch.bfloat16).float())


@given(st.floats(min_value=0.0, max_value=2.0**-17, width=32))
def test_below_that_it_is_the_nearest_multiple_of_fp16s_step(value: float) -> None:
    assert round_scale(torch.tensor([value])).item() == float(np.float16(value))


@pytest.mark.parametrize(("value", "expected"), [(1e9, 65280.0), (-1e9, -65280.0), (0.0, 0.0), (1e-9, 0.0)])
def test_ends_of_the_range(value: float, expected: float) -> None:
    assert round_scale(torch.tensor(value)).item() == expected


@given(st.floats(min_value=2.0**-12, max_value=4000.0, width=32), st.integers(0, 15))
def test_seven_bits_times_a_zero_point_is_exact_in_fp16(value: float, zero_point: int) -> None:
    scale = round_scale(torch.tensor(value), significant_bits=7)
    product = zero_point * float(scale)
    assert float(np.float16(product)) == product
    assert abs(float(scale) - value) <= value * 2.0**-7


@pytest.mark.parametrize("spelling", ["w8a8", "w8a16-g32", "w4a16-g32", "w4a16-g32-asym", "w2a16-g16", "w8a8-tensor"])
def test_shapes(spelling: str) -> None:
    scheme = Scheme.parse(spelling)
    scale, zero_point = choose_qparams(torch.randn(6, 64), scheme)
    groups = {"tensor": (1, 1), "channel": (6, 1)}.get(scheme.granularity, (6, 64 // (scheme.group_size or 64)))
    assert scale.shape == groups
    assert (zero_point is None) == scheme.symmetric
    if zero_point is not None:
        assert zero_point.dtype == torch.uint8
        assert zero_point.max() <= scheme.qmax
