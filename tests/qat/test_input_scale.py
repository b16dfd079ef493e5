"""A layer with an input scale s computes ``fq(x / s) fq(W s)^T``; its weight and state_dict stay the float model's."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from qat_plugin import Phase, prepare, set_phase, unprepare
from qat_plugin.errors import CheckpointError, PrepareError
from qat_plugin.numerics import round_to_nearest
from qat_plugin.qat import (
    calibrating,
    hold,
    load_quantizer_state,
    prepared_layers,
    quantizer_state,
    reusing_weights,
    set_input_scale,
)
from tests.qat.arithmetic import grid, per_tensor, per_token
from tests.qat.models import MLP, gpt2, llama, own_forwards

SCHEMES = ["w4a16-g32", "w4a16-g32-asym", "w8a16", "w8a8", "w4a8-g32", "w2a16-g32-asym"]


def scale_for(features: int) -> Tensor:
    return torch.rand(features, generator=torch.Generator().manual_seed(3)) * 3 + 0.1


def scaled(model: nn.Module, scheme: str, **options: Any) -> nn.Module:
    """Prepared, with an input scale on every layer."""
    prepare(model, scheme, **options)
    for layer in prepared_layers(model).values():
        set_input_scale(layer, scale_for(layer.fake_quantizer.layer.shape[1]))
    return model


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_the_forward_is_the_product_of_the_two_quantized_factors(scheme: str, dtype: torch.dtype) -> None:
    layer = nn.Linear(64, 32, bias=False).to(dtype)
    model = scaled(nn.Sequential(layer), scheme)
    x, s = torch.randn(5, 64).to(dtype), scale_for(64)
    divided = x.float() / s
    if "a8" in scheme:
        activation = per_token(divided)
    else:
        activation = divided.to(dtype).double().numpy()
    expected = activation @ grid(layer.weight.float() * s, scheme).weight.T
    actual = model(x).detach().double().numpy()
    assert np.linalg.norm(actual - expected) / np.linalg.norm(expected) < (1e-6 if dtype is torch.float32 else 6e-3)


def test_a_static_scheme_observes_and_rounds_the_divided_input() -> None:
    layer = nn.Linear(64, 32, bias=False)
    model = scaled(nn.Sequential(layer), "w8a8-static")
    x, s = torch.randn(5, 64), scale_for(64)
    with calibrating(model):
        assert torch.equal(model(x), x @ layer.weight.t())  # computes in float meanwhile
    absmax = float((x / s).abs().max())
    assert float(layer.fake_quantizer.observer.absmax) == pytest.approx(absmax)
    expected = per_tensor(x / s, absmax) @ grid(layer.weight * s, "w8a8-static").weight.T
    assert np.allclose(model(x).detach().double().numpy(), expected, atol=1e-5)


@pytest.mark.parametrize("phase", [Phase.FLOAT, Phase.OBSERVING])
def test_in_the_float_phases_the_layer_is_the_float_layer(phase: Phase) -> None:
    model, x = MLP(), torch.randn(3, 64)
    expected = model(x)
    set_phase(scaled(model, "w8a8"), phase)
    assert torch.equal(model(x), expected)


@pytest.mark.parametrize("make", [MLP, gpt2, own_forwards])
def test_weights_and_state_dict_stay_those_of_the_float_model(make: Any) -> None:
    model = make()
    before = copy.deepcopy(model.state_dict())
    prepare(model, "w4a16-g32" if make is not gpt2 else {"attention": "w4a16-g32", "default": "keep"})
    for layer in prepared_layers(model).values():
        set_input_scale(layer, scale_for(layer.fake_quantizer.layer.shape[1]))
    after = model.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], before[name]) for name in before)
    assert not any(isinstance(module.__dict__.get("input_scale"), Tensor) for module in unprepare(model).modules())


@pytest.mark.parametrize("scheme", ["w4a16-g32", "w8a8"])
def test_the_gradient_is_that_of_the_straight_through_product(scheme: str) -> None:
    layer = nn.Linear(64, 32, bias=False)
    model, x = scaled(nn.Sequential(layer), scheme), torch.randn(5, 64, requires_grad=True)
    seed = torch.randn(5, 32)
    (model(x) * seed).sum().backward()
    s = scale_for(64)
    weight = (layer.weight * s).detach()
    inside = torch.ones_like(weight)
    if scheme == "w4a16-g32":  # the largest of a group, on the short side of the grid, may clip
        rounded = round_to_nearest(weight, layer.fake_quantizer.scheme)
        levels = torch.floor(weight.view(32, -1, 32) / rounded.scale.unsqueeze(-1) + 0.5)
        inside = ((levels >= -8) & (levels <= 7)).float().view_as(weight)
        activation = (x / s).detach()
    else:
        activation = torch.from_numpy(per_token((x / s).detach())).float()
    torch.testing.assert_close(layer.weight.grad, (seed.t() @ activation) * inside * s, rtol=1e-4, atol=1e-5)
    fake = torch.from_numpy(grid(weight, scheme).weight).float()
    torch.testing.assert_close(x.grad, (seed @ fake) / s, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_reused_weights_give_the_same_bits_and_follow_the_scale(dtype: torch.dtype) -> None:
    model, x = scaled(MLP().to(dtype), "w4a16-g32"), torch.randn(3, 64).to(dtype)
    expected = model(x)
    expected.sum().backward()
    gradient = model.up.weight.grad.clone()
    model.zero_grad()
    with reusing_weights(model) as reuse:
        model(x)
        again = model(x)
        again.sum().backward()
        assert reuse.reused == 2
        assert torch.equal(again, expected)
        assert torch.equal(model.up.weight.grad, gradient)
        set_input_scale(model.up, scale_for(64) * 1.7)
        changed = model(x)
        assert reuse.quantized == 3
    assert torch.equal(changed, model(x))
    assert not torch.equal(changed, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_integers_held_under_a_scale_are_written_divided_by_it_and_come_back(scheme: str, dtype: torch.dtype) -> None:
    layer = nn.Linear(64, 32, bias=False).to(dtype)
    scaled(nn.Sequential(layer), scheme)
    s, quantizer = scale_for(64), layer.fake_quantizer
    held = round_to_nearest(layer.weight.detach() * s + 0.01, quantizer.scheme)
    hold(layer, held)
    torch.testing.assert_close(layer.weight.detach(), (held.dequantize() / s).to(dtype), rtol=0, atol=0)
    again = quantizer.integers(layer.weight)
    assert torch.equal(again.q, held.q)
    assert torch.equal(again.scale, held.scale)
    assert torch.equal(quantizer.fake_weight(layer.weight.detach()), held.dequantize(dtype))


def test_learned_scales_start_anew_from_the_scaled_weight() -> None:
    model = MLP()
    prepare(model, "w4a16-g32", learn_scales=True)
    parameter = model.up.fake_quantizer.grid.relative_scale
    set_input_scale(model.up, scale_for(64))
    assert model.up.fake_quantizer.grid.relative_scale is parameter
    fresh = round_to_nearest(model.up.weight.detach() * scale_for(64), model.up.fake_quantizer.scheme)
    assert torch.equal(model.up.fake_quantizer.qparams(model.up.weight)[0], fresh.scale)
    model(torch.randn(2, 64)).sum().backward()
    assert parameter.grad is not None


def test_a_quantizer_state_carries_input_scales_and_their_absence() -> None:
    model, x = scaled(MLP(), "w4a16-g32"), torch.randn(3, 64)
    set_phase(model, Phase.FROZEN)
    state, expected = quantizer_state(model), model(x)
    fresh = prepare(copy.deepcopy(unprepare(copy.deepcopy(model))), "w4a16-g32")
    bare = quantizer_state(fresh)
    load_quantizer_state(fresh, state)
    assert torch.equal(fresh(x), expected)
    assert torch.equal(fresh.up.fake_quantizer.input_scale, scale_for(64))
    load_quantizer_state(fresh, bare)
    assert fresh.up.fake_quantizer.input_scale is None
    state["layers"]["up"]["input_scale"] = -state["layers"]["up"]["input_scale"]
    with pytest.raises(CheckpointError, match=r"up: an input scale is 64 positive finite numbers"):
        load_quantizer_state(fresh, state)


def test_what_cannot_have_an_input_scale_says_why() -> None:
    model = prepare(llama(tied=True), {"embedding": "w8a16", "head": "w8a16", "default": "w8a16"})
    layers = prepared_layers(model)
    for name in ("model.embed_tokens", "lm_head"):
        with pytest.raises(PrepareError, match="cannot have an input scale"):
            set_input_scale(layers[name], torch.ones(64))
    projection = layers["model.layers.0.mlp.down_proj"]
    for wrong in (torch.ones(64), torch.zeros(128), torch.full((128,), float("inf")), torch.full((128,), float("nan"))):
        with pytest.raises(PrepareError, match="128 positive finite numbers"):
            set_input_scale(projection, wrong)
    assert projection.fake_quantizer.input_scale is None
    with pytest.raises(PrepareError, match="not a linear layer of integers"):
        set_input_scale(prepare(nn.Sequential(nn.Linear(4, 4)), "bf16")[0], torch.ones(4))
