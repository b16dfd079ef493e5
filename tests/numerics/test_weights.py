"""Integers of weights, against float64, gguf and torchao."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from qat_plugin.errors import QatError
from qat_plugin.numerics import choose_qparams, fake_quantize, quantize, round_scale, round_to_nearest
from qat_plugin.scheme import Scheme

SPELLINGS = [
    "w8a8", "w8a8-tensor", "w8a16-g32", "w8a16-asym", "w4a16-g32", "w4a16", "w4a16-g32-asym", "w3a16-g16",
    "w3a16-g16-asym", "w2a16-g32", "w2a16-g32-asym",
]  # fmt: skip


def by_hand(weight: Tensor, scheme: Scheme) -> tuple[np.ndarray, np.ndarray]:
    """Integers and numbers of round-to-nearest, group by group in float64."""
    rows = weight.double().numpy()
    size = rows.size if scheme.per_tensor else (scheme.group_size or rows.shape[1])
    integers, numbers = [], []
    for group in rows.reshape(-1, size):
        if scheme.symmetric:
            largest = group[np.argmax(np.abs(group))]
            raw = abs(largest) / 127 if scheme.weight_bits == 8 else largest / -(2 ** (scheme.weight_bits - 1))
            zero = 0.0
        else:
            raw = (max(group.max(), 0) - min(group.min(), 0)) / scheme.qmax
            zero = None
        step = float(round_scale(torch.tensor(raw), significant_bits=8 if scheme.symmetric else 7))
        if zero is None:
            zero = float(np.clip(np.floor(-min(group.min(), 0) / step + 0.5), 0, scheme.qmax))
        q = np.clip(np.floor(group / step + 0.5) + zero, scheme.qmin, scheme.qmax)
        integers.append(q)
        numbers.append((q - zero) * step)
    return np.concatenate(integers).reshape(rows.shape), np.concatenate(numbers).reshape(rows.shape)


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_against_float64(spelling: str) -> None:
    scheme, weight = Scheme.parse(spelling), torch.randn(16, 64)
    quantized = round_to_nearest(weight, scheme)
    integers, numbers = by_hand(weight, scheme)
    # a value within float32's rounding of a tie may fall on either side
    assert np.mean(quantized.q.numpy() != integers) < 1e-3
    same = quantized.q.numpy() == integers
    np.testing.assert_array_equal(quantized.dequantize().double().numpy()[same], numbers[same])


@settings(deadline=None, max_examples=60)
@given(
    st.sampled_from(SPELLINGS),
    st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    st.integers(1, 5),
    st.integers(1, 3),
    st.floats(-6, 3),
    st.integers(0, 2**31),
)
def test_fake_quantization_is_the_integers_to_the_bit(
    spelling: str, dtype: torch.dtype, rows: int, groups: int, exponent: float, seed: int
) -> None:
    scheme = Scheme.parse(spelling)
    generator = torch.Generator().manual_seed(seed)
    weight = (torch.randn(rows, 32 * groups, generator=generator) * 10**exponent).to(dtype)
    quantized = round_to_nearest(weight, scheme)
    assert torch.equal(fake_quantize(weight, scheme), quantized.dequantize(dtype))
    exact = quantized.dequantize(torch.float64).to(torch.float32).to(dtype)
    assert torch.equal(exact, quantized.dequantize(dtype))
    assert quantized.q.min() >= scheme.qmin
    assert quantized.q.max() <= scheme.qmax


@pytest.mark.parametrize("spelling", [s for s in SPELLINGS if "asym" not in s])
def test_quantizing_twice_changes_nothing(spelling: str) -> None:
    scheme = Scheme.parse(spelling)
    once = round_to_nearest(torch.randn(32, 64), scheme)
    again = round_to_nearest(once.dequantize(), scheme)
    assert torch.equal(once.q, again.q)
    assert torch.equal(once.scale, again.scale)


@pytest.mark.parametrize(("spelling", "kind"), [("w4a16-g32", "Q4_0"), ("w8a16-g32", "Q8_0")])
@pytest.mark.parametrize("tails", ["normal", "heavy"])
def test_gguf_quantizes_our_weights_to_our_own_integers(spelling: str, kind: str, tails: str) -> None:
    gguf = pytest.importorskip("gguf")
    draw = torch.randn(64, 256) if tails == "normal" else torch.distributions.StudentT(3.0).sample((64, 256))
    weight = draw * 0.02
    ours = round_to_nearest(weight, Scheme.parse(spelling))
    packed = gguf.quants.quantize(ours.dequantize().numpy(), getattr(gguf.GGMLQuantizationType, kind))
    theirs = gguf.quants.dequantize(packed, getattr(gguf.GGMLQuantizationType, kind))
    np.testing.assert_array_equal(theirs, ours.dequantize().numpy())


def test_our_int4_grid_is_as_good_as_ggufs() -> None:
    gguf = pytest.importorskip("gguf")
    weight = torch.randn(256, 256)
    kind = gguf.GGMLQuantizationType.Q4_0
    theirs = torch.from_numpy(gguf.quants.dequantize(gguf.quants.quantize(weight.numpy(), kind), kind))
    ours = fake_quantize(weight, Scheme.parse("w4a16-g32"))
    absmax = weight.unflatten(1, (-1, 32)).abs().amax(-1, keepdim=True) / 7.5
    naive = ((weight.unflatten(1, (-1, 32)) / absmax).round().clamp(-8, 7) * absmax).flatten(1)

    def error(other: Tensor) -> float:
        return float((other - weight).norm() / weight.norm())

    assert error(ours) == pytest.approx(error(theirs), rel=5e-3)
    assert error(ours) < error(naive)


@pytest.mark.parametrize("spelling", ["w8a16-g32", "w4a16-g32", "w4a16-g32-asym"])
def test_torchao_dequantizes_our_integers_to_our_numbers(spelling: str) -> None:
    from torchao.quantization.quant_primitives import dequantize_affine, quantize_affine

    scheme, weight = Scheme.parse(spelling), torch.randn(16, 128)
    ours = round_to_nearest(weight, scheme)
    zero = torch.zeros_like(ours.scale, dtype=torch.int32) if ours.zero_point is None else ours.zero_point.int()
    theirs = dequantize_affine(
        ours.q, (1, 32), ours.scale, zero, ours.q.dtype, scheme.qmin, scheme.qmax, output_dtype=torch.float32
    )
    assert torch.equal(theirs, ours.dequantize())
    integers = quantize_affine(ours.dequantize(), (1, 32), ours.scale, zero, ours.q.dtype, scheme.qmin, scheme.qmax)
    assert torch.equal(integers, ours.q)


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_a_group_of_zeros_is_zero(spelling: str) -> None:
    weight = torch.randn(4, 64)
    weight[1] = 0
    quantized = round_to_nearest(weight, Scheme.parse(spelling))
    assert torch.equal(quantized.dequantize()[1], torch.zeros(64))
    assert torch.isfinite(quantized.dequantize()).all()
    assert torch.equal(fake_quantize(torch.zeros(2, 64), Scheme.parse(spelling)), torch.zeros(2, 64))


def test_given_scales_are_used() -> None:
    scheme, weight = Scheme.parse("w4a16-g32"), torch.randn(4, 64)
    scale = torch.full((4, 2), 0.125)
    expected = torch.floor(weight / 0.125 + 0.5).clamp(-8, 7)
    assert torch.equal(quantize(weight, scale, None, scheme).q.float(), expected)
    assert torch.equal(fake_quantize(weight, scheme, scale), expected * 0.125)


def test_a_group_that_does_not_divide_names_both_numbers() -> None:
    with pytest.raises(QatError, match=r"in_features \(172\).*group size \(32\)"):
        choose_qparams(torch.randn(4, 172), Scheme.parse("w4a16-g32"))
