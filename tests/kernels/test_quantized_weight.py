"""Quantized weights as tensors: copied, moved, compiled, never trained."""

from __future__ import annotations

import copy
import io

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from qat_plugin import Scheme
from qat_plugin.errors import ConversionError
from qat_plugin.kernels.weight import CastWeight, QuantizedWeight
from qat_plugin.numerics import round_to_nearest

SCHEMES = ["w8a8", "w8a16", "w8a16-g32", "w4a16-g32", "w4a8-g32", "w2a16-g32-asym"]


def layer_of(spelling: str, dtype: torch.dtype = torch.float32) -> nn.Linear:
    layer = nn.Linear(64, 64, dtype=dtype)
    weight = QuantizedWeight.from_integers(round_to_nearest(layer.weight.detach(), Scheme.parse(spelling)), dtype)
    layer.weight = nn.Parameter(weight, requires_grad=False)
    return layer.requires_grad_(False)


@pytest.mark.parametrize("spelling", SCHEMES)
def test_a_copy_is_equal_and_its_own(spelling: str) -> None:
    layer, x = layer_of(spelling), torch.randn(3, 64)
    twin = copy.deepcopy(layer)
    assert isinstance(twin.weight, nn.Parameter)
    assert twin.weight is not layer.weight
    assert torch.equal(twin(x), layer(x))
    assert torch.equal(layer.weight.clone().dequantize(), layer.weight.dequantize())


@pytest.mark.parametrize("spelling", SCHEMES)
def test_another_float_type_keeps_the_integers(spelling: str) -> None:
    layer = layer_of(spelling)
    before = layer.weight.integers()
    layer.to(torch.bfloat16)
    assert layer.weight.dtype == torch.bfloat16
    assert layer(torch.randn(2, 64, dtype=torch.bfloat16)).dtype == torch.bfloat16
    layer.float()
    assert torch.equal(layer.weight.integers().q, before.q)
    assert torch.equal(layer.weight.integers().scale, before.scale)


@pytest.mark.parametrize("spelling", SCHEMES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_compiled_it_computes_the_same(spelling: str, dtype: torch.dtype) -> None:
    torch._dynamo.reset()
    layer, x = layer_of(spelling, dtype), torch.randn(3, 64, dtype=dtype)
    assert torch.equal(torch.compile(layer, backend="aot_eager")(x), layer(x))


@pytest.mark.parametrize("spelling", SCHEMES)
def test_autocast_is_followed(spelling: str) -> None:
    layer, x = layer_of(spelling), torch.randn(3, 64)
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x)
    assert y.dtype == torch.bfloat16
    assert float((y.float() - layer(x)).norm() / layer(x).norm()) < 2e-2


@pytest.mark.parametrize("spelling", SCHEMES)
def test_it_cannot_be_trained_and_inference_needs_no_no_grad(spelling: str) -> None:
    layer, x = layer_of(spelling), torch.randn(3, 64, requires_grad=True)
    y = layer(x)
    with pytest.raises(ConversionError, match="cannot be trained"):
        y.sum().backward()


def test_conv1d_of_transformers_multiplies_by_it() -> None:
    from transformers.pytorch_utils import Conv1D

    layer = Conv1D(32, 64)
    quantized = round_to_nearest(layer.weight.detach().t(), Scheme.parse("w8a16"))
    layer.weight = nn.Parameter(
        QuantizedWeight.from_integers(quantized, torch.float32, transposed=True), requires_grad=False
    )
    assert layer.weight.shape == (64, 32)
    x = torch.randn(2, 3, 64)
    torch.testing.assert_close(layer(x), x @ quantized.dequantize().t() + layer.bias)


def test_wrong_widths_are_named() -> None:
    with pytest.raises(RuntimeError, match=r"63 features.*takes 64"):
        layer_of("w8a8")(torch.randn(2, 63))


def test_what_it_cannot_do_raises() -> None:
    with pytest.raises(Exception, match=r"mul|NotImplemented|not implemented|unimplemented"):
        _ = layer_of("w8a16").weight * 2


@pytest.mark.parametrize("stored", [torch.float16, torch.bfloat16], ids=str)
def test_a_cast_weight_is_its_narrow_self_everywhere(stored: torch.dtype) -> None:
    original = torch.randn(20, 64)
    weight, narrow = CastWeight(original.to(stored), torch.float32), original.to(stored).float()
    ids, x = torch.randint(20, (3, 4)), torch.randn(5, 64)
    assert weight.dtype == torch.float32
    assert torch.equal(F.embedding(ids, weight), narrow[ids])
    assert torch.equal(F.linear(x, weight), F.linear(x, narrow))
    assert torch.equal(weight * 2, narrow * 2)
    assert torch.equal(
        F.layer_norm(x, (64,), CastWeight(original[0].to(stored), torch.float32)), F.layer_norm(x, (64,), narrow[0])
    )
    layer = nn.Embedding(20, 64)
    layer.weight = nn.Parameter(weight, requires_grad=False)
    twin = copy.deepcopy(layer).to(torch.bfloat16)
    assert isinstance(twin.weight, CastWeight)
    assert twin(ids).dtype == torch.bfloat16
    assert twin.weight.data_.dtype == stored


@pytest.mark.parametrize("spelling", SCHEMES)
def test_a_pickled_layer_comes_back_with_its_integers(spelling: str) -> None:
    layer, x, file = layer_of(spelling), torch.randn(3, 64), io.BytesIO()
    torch.save(layer, file)
    file.seek(0)
    back = torch.load(file, weights_only=False)
    assert isinstance(back.weight, nn.Parameter)
    assert torch.equal(back.weight.integers().q, layer.weight.integers().q)
    assert torch.equal(back(x), layer(x))
