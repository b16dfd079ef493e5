"""Training through fake quantization: gradients reach every weight, learned scales are learned."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from qat_plugin import Phase, prepare, set_phase
from qat_plugin.qat import prepared_layers
from tests.qat.arithmetic import grid
from tests.qat.models import FAMILIES, MLP, batch, llama, output


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("scheme", ["w4a8-g32", "w8a8-static", "w2a16-g32-asym"])
def test_gradients_reach_every_weight(family: str, scheme: str) -> None:
    embedding = {"embedding": "w4a16-g32"} if family == "llama" else {}
    model = prepare(FAMILIES[family](), {"default": scheme, **embedding}).train()
    for module in model.modules():  # dropout would hide some
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    generator = torch.Generator().manual_seed(3)
    out = output(model, batch(family))
    (out * torch.randn(out.shape, generator=generator)).sum().backward()
    for name, layer in prepared_layers(model).items():
        if "pooler" in name:  # BERT's pooler is not part of last_hidden_state
            continue
        gradient = layer.weight.grad
        assert gradient is not None, name
        assert gradient.isfinite().all(), name
        assert (gradient != 0).any(), name


@pytest.mark.parametrize("scheme", ["w8a16", "w4a16-g32", "w4a16-g32-asym"])
def test_the_weights_gradient_is_the_float_layers_at_the_rounded_weight(scheme: str) -> None:
    layer, x = nn.Linear(64, 24), torch.randn(5, 64)
    twin = nn.Linear(64, 24)
    with torch.no_grad():
        twin.weight.copy_(torch.from_numpy(grid(layer.weight, scheme).weight))
        twin.bias.copy_(layer.bias)
    prepare(nn.Sequential(layer), scheme)
    layer(x).square().sum().backward()
    twin(x).square().sum().backward()
    q = layer.fake_quantizer.integers(layer.weight)
    unclipped = (layer.weight.detach() / q.scale.repeat_interleave(64 // q.scale.shape[1], 1) + 0.5).floor()
    if q.zero_point is not None:
        unclipped += q.zero_point.float().repeat_interleave(64 // q.scale.shape[1], 1)
    inside = unclipped == q.q.float()
    assert inside.float().mean() > 0.8
    torch.testing.assert_close(layer.weight.grad, twin.weight.grad * inside, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(layer.bias.grad, twin.bias.grad, rtol=1e-4, atol=1e-5)


def test_gradient_accumulation_sums_the_parts() -> None:
    whole, parts, x = MLP(), MLP(), torch.randn(8, 64)
    parts.load_state_dict(whole.state_dict())
    for model in (whole, parts):
        prepare(model, "w4a8-g32", learn_scales=True)
    whole(x).square().sum().backward()
    for half in x.split(4):
        parts(half).square().sum().backward()
    for expected, actual in zip(whole.parameters(), parts.parameters(), strict=True):
        torch.testing.assert_close(actual.grad, expected.grad, rtol=1e-4, atol=1e-4)


def test_weights_frozen_by_the_user_stay_frozen() -> None:
    model = MLP()
    model.up.weight.requires_grad_(False)
    prepare(model, "w4a16-g32")
    model(batch("mlp")).sum().backward()
    assert model.up.weight.grad is None
    assert model.down.weight.grad is not None


def fit(model: nn.Module, target: nn.Module, steps: int, rate: float) -> list[float]:
    optimizer = torch.optim.Adam(model.parameters(), rate)
    generator = torch.Generator().manual_seed(1)
    losses = []
    for _ in range(steps):
        x = torch.randn(32, 64, generator=generator)
        loss = nn.functional.mse_loss(model(x), target(x).detach())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize(("options", "left"), [({}, 0.75), ({"learn_scales": True, "initial": "mse"}, 0.5)])
def test_training_undoes_much_of_the_damage_of_two_bits(options: dict[str, Any], left: float) -> None:
    target = MLP()
    model = MLP()
    model.load_state_dict(target.state_dict())
    losses = fit(prepare(model, "w2a16-g32-asym", **options), target, 200, 3e-4)
    assert np.mean(losses[-10:]) < left * np.mean(losses[:3])


def lsq_by_hand(w: Tensor, scale: Tensor, upstream: Tensor) -> tuple[Tensor, Tensor]:
    """Esser et al., arXiv:1902.08153, equations 1 to 5, in float64; symmetric INT4 groups of 32 on a signed scale."""
    groups, d = w.double().reshape(-1, 32), scale.double().reshape(-1, 1)
    v = groups / d
    q = torch.clamp(torch.floor(v + 0.5), -8, 7)
    inside = torch.floor(v + 0.5) == q
    g = upstream.double().reshape(-1, 32)
    slope = torch.where(inside, q - v, q)
    return (g * inside).reshape(w.shape), (g * slope).sum(1).reshape(scale.shape) / math.sqrt(32 * 7)


def test_learned_scales_get_the_gradient_of_lsq() -> None:
    layer = nn.Linear(64, 24, bias=False)
    prepare(nn.Sequential(layer), "w4a16-g32", learn_scales=True)
    scale, unit = layer.fake_quantizer.grid.relative_scale, layer.fake_quantizer.grid.unit
    with torch.no_grad():
        scale.mul_(0.75)  # so that some weights clip at both ends
    rounded = layer.fake_quantizer.qparams(layer.weight)[0]
    x, seed = torch.randn(5, 64), torch.randn(5, 24)
    (layer(x) * seed).sum().backward()
    weight_gradient, scale_gradient = lsq_by_hand(layer.weight.detach(), rounded, seed.t() @ x)
    torch.testing.assert_close(layer.weight.grad.double(), weight_gradient, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(scale.grad.double(), scale_gradient * unit.double(), rtol=1e-3, atol=1e-5)


def test_learned_scales_exist_before_the_optimizer_and_are_learned() -> None:
    model = prepare(MLP(), "w4a16-g32", learn_scales=True)
    learned = {name for name, _ in model.named_parameters()} - {name for name, _ in MLP().named_parameters()}
    assert learned == {"up.fake_quantizer.grid.relative_scale", "down.fake_quantizer.grid.relative_scale"}
    before = model.up.fake_quantizer.grid.relative_scale.detach().clone()
    fit(model, MLP(), 5, 1e-2)
    assert not torch.equal(model.up.fake_quantizer.grid.relative_scale, before)
    assert set(model.state_dict()) == set(MLP().state_dict())


def test_scales_in_force_are_exact_in_bf16_and_fp16_while_they_are_learned() -> None:
    model = prepare(MLP(), {"up": "w4a16-g32", "down": "w4a16-g32-asym"}, learn_scales=True)
    fit(model, MLP(), 5, 1e-2)
    for layer in (model.up, model.down):
        scale = layer.fake_quantizer.qparams(layer.weight)[0]
        assert torch.equal(scale, scale.bfloat16().float())
        assert torch.equal(scale, scale.half().float())
        assert not torch.equal(layer.fake_quantizer.grid.relative_scale, scale)


def test_tied_layers_learn_one_scale_from_both_sides() -> None:
    model = prepare(llama(), {"embedding": "w4a16-g32"}, learn_scales=True)
    scale = model.lm_head.fake_quantizer.grid.relative_scale
    assert sum(p is scale for p in model.parameters()) == 1
    ids = batch("llama")
    fixed = model.model(ids).last_hidden_state.detach()
    (from_head,) = torch.autograd.grad(model.lm_head(fixed).square().sum(), scale)
    (from_embedding,) = torch.autograd.grad(model.model(ids).last_hidden_state.square().sum(), scale)
    loss = model.lm_head(fixed).square().sum() + model.model(ids).last_hidden_state.square().sum()
    (both,) = torch.autograd.grad(loss, scale)
    assert from_head.abs().sum() > 0
    assert from_embedding.abs().sum() > 0
    torch.testing.assert_close(both, from_head + from_embedding, rtol=1e-4, atol=1e-4)


def test_an_optimizer_leaves_frozen_learned_scales_alone() -> None:
    model = prepare(MLP(), "w4a16-g32", learn_scales=True)
    set_phase(model, Phase.FROZEN)
    before = model.up.fake_quantizer.grid.relative_scale.detach().clone()
    weight = model.up.weight.detach().clone()
    fit(model, MLP(), 3, 1e-2)
    assert torch.equal(model.up.fake_quantizer.grid.relative_scale, before)
    assert not torch.equal(model.up.weight, weight)
