from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torchao.quantization import Int8WeightOnlyConfig, quantize_

import qat_plugin.measure.distortion as distortion
from qat_plugin.errors import QatError
from qat_plugin.measure import sqnr, sqnr_by_layer


def in_float64(reference: torch.Tensor, other: torch.Tensor) -> float:
    x, y = reference.double().numpy(), other.double().numpy()
    return float(20 * np.log10(np.linalg.norm(x) / np.linalg.norm(x - y)))


@settings(max_examples=50, deadline=None)
@given(seed=st.integers(0, 2**31), noise=st.floats(1e-4, 10), size=st.integers(1, 300))
def test_it_is_the_ratio_of_norms_in_decibels(seed: int, noise: float, size: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    reference = torch.randn(size, generator=generator)
    other = reference + noise * torch.randn(size, generator=generator)
    assert sqnr(reference, other) == pytest.approx(in_float64(reference, other), abs=1e-6)


def test_one_more_bit_is_worth_six_decibels() -> None:
    signal = torch.rand(200_000) * 2 - 1
    eight, nine = ((signal * 2**bits).round() / 2**bits for bits in (7, 8))
    assert sqnr(signal, nine) - sqnr(signal, eight) == pytest.approx(20 * math.log10(2), abs=0.1)


def test_equal_tensors_are_infinitely_close_whatever_their_dtype() -> None:
    x = torch.randn(4, 5).bfloat16()
    assert sqnr(x, x.float()) == math.inf


def test_a_zero_reference_is_defined() -> None:
    zero = torch.zeros(3)
    assert sqnr(zero, zero) == math.inf
    assert sqnr(zero, torch.ones(3)) == -math.inf
    assert sqnr(torch.ones(3), zero) == 0.0


def test_chunks_do_not_change_the_result(monkeypatch: pytest.MonkeyPatch) -> None:
    x, y = torch.randn(50, 7), torch.randn(50, 7)
    whole = sqnr(x, y)
    monkeypatch.setattr(distortion, "_CHUNK", 11)
    assert sqnr(x, y) == pytest.approx(whole, rel=1e-12)


def test_strided_and_quantized_tensors_are_compared_by_their_values() -> None:
    model = nn.Sequential(nn.Linear(32, 16, bias=False))
    weight = model[0].weight.detach().clone()
    quantize_(model, Int8WeightOnlyConfig())
    expected = in_float64(weight, model[0].weight.dequantize())
    assert 40 < expected < 60
    assert sqnr(weight, model[0].weight) == pytest.approx(expected, abs=1e-6)
    assert sqnr(weight.T, model[0].weight.dequantize().T) == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_tensor_that_is_not_finite_is_refused(bad: float) -> None:
    with pytest.raises(QatError, match="NaN or infinite"):
        sqnr(torch.ones(2), torch.tensor([1.0, bad]))


def test_shapes_must_agree() -> None:
    with pytest.raises(QatError, match=r"\(2, 3\) and \(3, 2\)"):
        sqnr(torch.ones(2, 3), torch.ones(3, 2))


def test_layers_come_in_the_order_of_the_reference_and_others_are_ignored() -> None:
    reference = {"b": torch.ones(2), "a": torch.ones(2)}
    other = {"a": torch.zeros(2), "b": torch.ones(2), "c": torch.ones(9)}
    assert list(sqnr_by_layer(reference, other).items()) == [("b", math.inf), ("a", 0.0)]


def test_a_missing_or_unfit_layer_is_named() -> None:
    with pytest.raises(QatError, match=r"'fc\.weight'.*'fc1\.weight'"):
        sqnr_by_layer({"fc.weight": torch.ones(1)}, {"fc1.weight": torch.ones(1)})
    with pytest.raises(QatError, match=r"^fc: .*NaN"):
        sqnr_by_layer({"fc": torch.ones(1)}, {"fc": torch.tensor([math.nan])})
