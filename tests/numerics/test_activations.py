"""Integers of activations."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qat_plugin.numerics import activation_scale, fake_quantize_activation, quantize_activation


@settings(deadline=None, max_examples=50)
@given(
    st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    st.integers(1, 7),
    st.integers(1, 65),
    st.integers(0, 9999),
)
def test_per_token_against_float64(dtype: torch.dtype, tokens: int, features: int, seed: int) -> None:
    x = torch.randn(2, tokens, features, generator=torch.Generator().manual_seed(seed)).to(dtype)
    q, scale = quantize_activation(x)
    rows = x.double().numpy()
    step = scale.double().numpy()
    np.testing.assert_allclose(step[..., 0], np.abs(rows).max(-1) / 127, rtol=1e-6)
    position = rows / step
    off = np.abs(q.numpy() - np.round(position))  # NumPy rounds half to even
    tie = np.abs(position - np.floor(position) - 0.5) < 1e-4  # within float32's rounding of a tie either side is right
    assert off.max() <= 1
    assert not off[~tie].any()
    assert q.abs().max() <= 127
    assert torch.equal(fake_quantize_activation(x), (q * scale).to(dtype))


def test_halves_go_to_even() -> None:
    q, _ = quantize_activation(torch.tensor([0.5, 1.5, 2.5, -0.5, -1.5]), torch.tensor(1.0))
    assert q.tolist() == [0, 2, 2, 0, -2]


def test_a_row_of_zeros_has_scale_one_and_stays_zero() -> None:
    x = torch.stack([torch.zeros(8), torch.randn(8)])
    assert activation_scale(x)[0].item() == 1.0
    assert torch.equal(fake_quantize_activation(x)[0], torch.zeros(8))


@pytest.mark.parametrize("shape", [(0, 8), (2, 0, 8)])
def test_no_tokens(shape: tuple[int, ...]) -> None:
    assert fake_quantize_activation(torch.empty(shape)).shape == shape


def test_tokens_do_not_touch_each_other() -> None:
    x = torch.randn(4, 16)
    alone = torch.cat([fake_quantize_activation(row[None]) for row in x])
    assert torch.equal(fake_quantize_activation(x), alone)


def test_a_calibrated_scale_clips() -> None:
    q, scale = quantize_activation(torch.tensor([[-300.0, 0.4, 300.0]]), torch.tensor(2.0))
    assert q.tolist() == [[-127.0, 0.0, 127.0]]
    assert scale.item() == 2.0
