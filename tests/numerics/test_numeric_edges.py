"""Where numerics could slip: gguf's own scales and integers, the ends of the scales' range, groups of one, clipping."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from qat_plugin.learned import fake_quantize_learned, learned_scale
from qat_plugin.numerics import (
    Quantized,
    activation_scale,
    choose_qparams,
    fake_quantize,
    fake_quantize_activation,
    quantize,
    quantize_activation,
    round_scale,
    round_to_nearest,
)
from qat_plugin.scheme import Scheme

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
FINITE = st.floats(width=32, allow_nan=False, allow_infinity=False)
# every power of two as likely as any other, far past both ends of fp16
MAGNITUDES = st.builds(
    lambda mantissa, exponent: mantissa * 2.0**exponent,
    st.floats(1, 2, width=32, exclude_max=True),
    st.integers(-40, 20),
)


def bits_of(tensor: Tensor) -> np.ndarray:
    """Raw bits, so that 0.0 and -0.0 differ."""
    return tensor.contiguous().view({4: torch.int32, 2: torch.int16}[tensor.element_size()]).numpy()


def blocks_of(values: Tensor, kind: str) -> tuple[np.ndarray, np.ndarray]:
    """What gguf stores of [N, K]: d [N, groups] and q [N, K], read out of its bytes."""
    gguf = pytest.importorskip("gguf")
    raw = gguf.quants.quantize(values.numpy(), getattr(gguf.GGMLQuantizationType, kind))
    blocks = raw.reshape(values.shape[0], values.shape[1] // 32, -1)
    d = np.ascontiguousarray(blocks[..., :2]).view(np.float16)[..., 0].astype(np.float32)
    body = np.ascontiguousarray(blocks[..., 2:])
    if kind == "Q8_0":
        return d, body.view(np.int8).reshape(values.shape)
    q = np.concatenate([body & 0xF, body >> 4], axis=-1).astype(np.int8) - 8  # low nibbles are the first 16 weights
    return d, q.reshape(values.shape)


@pytest.mark.parametrize(("spelling", "kind"), [("w4a16-g32", "Q4_0"), ("w8a16-g32", "Q8_0")])
@settings(deadline=None, max_examples=40)
@given(seed=st.integers(0, 2**31), exponent=st.floats(-3, 2))
def test_gguf_finds_our_scales_and_integers(spelling: str, kind: str, seed: int, exponent: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    ours = round_to_nearest(torch.randn(4, 96, generator=generator) * 10**exponent, Scheme.parse(spelling))
    d, q = blocks_of(ours.dequantize(), kind)
    np.testing.assert_array_equal(d, ours.scale.numpy())
    np.testing.assert_array_equal(q, ours.q.numpy())


@settings(max_examples=400, deadline=None)
@given(MAGNITUDES, st.sampled_from([8, 7]))
def test_no_number_of_the_grid_is_nearer(value: float, bits: int) -> None:
    limit = 65280.0 if bits == 8 else 4064.0
    target = min(value, limit)
    chosen = float(round_scale(torch.tensor(value), significant_bits=bits))
    exponent = np.frexp(target)[1] if target else -24
    step = max(2.0**-24, 2.0 ** int(exponent - bits))
    assert chosen / step == int(chosen / step)  # on the grid (its upper neighbour's step is a multiple of this one)
    assert abs(chosen - target) <= step / 2
    assert chosen <= limit
    assert float(np.float16(chosen)) == float(torch.tensor(chosen).bfloat16()) == chosen


@given(FINITE, st.sampled_from([8, 7]))
def test_rounding_a_scale_twice_changes_nothing_and_signs_are_symmetric(value: float, bits: int) -> None:
    once = round_scale(torch.tensor(value), significant_bits=bits)
    assert torch.equal(round_scale(once, significant_bits=bits), once)
    assert torch.equal(round_scale(-torch.tensor(value), significant_bits=bits), -once)


@given(st.one_of(FINITE, MAGNITUDES), st.integers(0, 15))
def test_any_asymmetric_scale_times_a_zero_point_is_exact_in_fp16(value: float, zero_point: int) -> None:
    product = zero_point * float(round_scale(torch.tensor(value), significant_bits=7))
    assert float(np.float16(product)) == product


@settings(deadline=None)
@given(st.integers(0, 2**31), st.floats(-9, 5), st.floats(-3, 3))
def test_chosen_zero_points_have_that_product(seed: int, exponent: float, shift: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    weight = (torch.randn(4, 64, generator=generator) + shift) * 10**exponent
    scale, zero_point = choose_qparams(weight, Scheme.parse("w4a16-g32-asym"))
    assert zero_point is not None
    product = scale.double() * zero_point.double()
    assert torch.equal(product.half().double(), product)
    assert bool((scale >= 0).all())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "spelling", ["w8a16-g1", "w4a16-g1", "w4a16-g1-asym", "w2a16-g1", "w2a16-g1-asym", "w3a16", "w8a8", "w8a8-tensor"]
)
def test_groups_of_one_keep_the_weight_to_the_scales_rounding(spelling: str, dtype: torch.dtype) -> None:
    scheme = Scheme.parse(spelling)
    weight = torch.randn(6, 5 if scheme.group_size else 1).to(dtype)
    if scheme.per_tensor:
        weight = weight[:1, :1]
    quantized = round_to_nearest(weight, scheme)
    assert quantized.scale.shape == weight.shape
    relative = ((quantized.dequantize() - weight.float()) / weight.float()).abs().max()
    # half a unit of eight (seven) significant bits; an asymmetric grid may also miss by the zero point's clipping
    assert relative <= (2.0**-8 if scheme.symmetric else 2.0**-7)
    np.testing.assert_array_equal(bits_of(fake_quantize(weight, scheme)), bits_of(quantized.dequantize(dtype)))


@settings(deadline=None, max_examples=60)
@given(
    st.sampled_from(["w8a8", "w8a8-tensor", "w8a16-g32", "w4a16-g32", "w4a16-g32-asym", "w3a16-g32", "w2a16-g32-asym"]),
    st.sampled_from(DTYPES),
    st.floats(0.2, 2.0),
    st.integers(0, 2**31),
)
def test_a_learned_scale_is_shipped_to_the_bit(spelling: str, dtype: torch.dtype, stretch: float, seed: int) -> None:
    scheme, generator = Scheme.parse(spelling), torch.Generator().manual_seed(seed)
    weight = torch.randn(3, 64, generator=generator).to(dtype)
    initial, zero_point = choose_qparams(weight, scheme)
    scale = initial * stretch
    shipped = quantize(weight, learned_scale(scale, scheme), zero_point, scheme)
    trained = fake_quantize_learned(weight, scale, zero_point, scheme)
    np.testing.assert_array_equal(bits_of(trained), bits_of(shipped.dequantize(dtype)))


def test_only_symmetric_int8_passes_every_gradient() -> None:
    """INT4's signed absmax sits at -8, and the other end may lie past 7."""
    weight = torch.tensor([[-1.0, 0.99] + [0.1] * 30])
    for spelling, passes in (("w8a8", [1.0, 1.0]), ("w4a16-g32", [1.0, 0.0])):
        trained = weight.clone().requires_grad_()
        fake_quantize(trained, Scheme.parse(spelling)).sum().backward()
        assert trained.grad is not None
        assert trained.grad[0, :2].tolist() == passes


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_calibrated_scale_stops_exactly_what_it_clips(dtype: torch.dtype) -> None:
    for scale in torch.rand(50) * 3 + 0.01:
        x = (scale * (127.5 + torch.linspace(-1, 1, 41))).to(dtype)
        x = torch.cat([x, -x]).requires_grad_()
        fake_quantize_activation(x, scale).sum().backward()
        position = x.detach().double() / scale.double()
        off_the_edge = (position.abs() - 127.5).abs() > 1e-4
        assert x.grad is not None
        expected = (position.abs() <= 127.5).to(x.grad.dtype)
        assert torch.equal(x.grad[off_the_edge], expected[off_the_edge])


@settings(deadline=None, max_examples=60)
@given(st.sampled_from(DTYPES), st.floats(-6, 4), st.booleans(), st.integers(0, 2**31))
def test_activations_are_the_nearest_integers(dtype: torch.dtype, exponent: float, static: bool, seed: int) -> None:
    x = (torch.randn(3, 33, generator=torch.Generator().manual_seed(seed)) * 10**exponent).to(dtype)
    if not bool(torch.isfinite(x).all()):
        return
    q, scale = quantize_activation(x, torch.tensor(10.0**exponent / 100) if static else None)
    position = (x.double() / scale.double()).clamp(-127, 127)
    assert float((q.double() - position).abs().max()) <= 0.5 + 1e-4
    assert torch.equal(fake_quantize_activation(x, scale if static else None), (q * scale).to(dtype))


def test_the_scale_of_a_token_is_its_largest_magnitude_whatever_its_sign() -> None:
    x = torch.tensor([[-5.0, 1.0], [3.0, -2.0], [0.0, 0.0]])
    assert torch.equal(activation_scale(x), torch.tensor([[5 / 127], [3 / 127], [1.0]]))


@pytest.mark.parametrize("spelling", ["w8a8", "w8a8-tensor", "w4a16-g32", "w4a16-g32-asym"])
def test_no_rows_are_no_numbers(spelling: str) -> None:
    whole = round_to_nearest(torch.randn(4, 64), Scheme.parse(spelling))
    zero_point = None if whole.zero_point is None else whole.zero_point[:0]
    scale = whole.scale if whole.scale.shape == (1, 1) else whole.scale[:0]
    assert Quantized(whole.q[:0], scale, zero_point, whole.scheme).dequantize().shape == (0, 64)


def test_nan_is_not_hidden() -> None:
    weight = torch.randn(2, 64)
    weight[0, 3] = torch.nan
    for spelling in ("w8a8", "w4a16-g32", "w4a16-g32-asym"):
        fake = fake_quantize(weight, Scheme.parse(spelling))
        assert bool(fake[0].isnan().any())
        assert not bool(fake[1].isnan().any())
