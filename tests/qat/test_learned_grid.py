"""Where learned scales begin, what they may become, and that all who ask get the same answer."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from qat_plugin import convert, prepare, set_phase, unprepare
from qat_plugin.errors import ConfigError
from qat_plugin.numerics import choose_qparams, dequantize, quantize, round_scale, to_groups
from qat_plugin.qat import (
    Phase,
    begin_scales,
    grid_parameters,
    hold,
    initial_scales,
    load_quantizer_state,
    low_bit_advice,
    plan_of,
    quantizer_state,
)
from qat_plugin.qat.grid import LearnedGrid
from qat_plugin.scheme import Scheme
from tests.qat.models import MLP, batch

SPELLINGS = ["w4a16-g32", "w4a16-g32-asym", "w3a16-g32-asym", "w2a16-g32-asym", "w2a16", "w8a8", "w3a16-tensor-asym"]


def squared_error(weight: torch.Tensor, qparams: tuple[Any, Any], scheme: Scheme) -> torch.Tensor:
    numbers = quantize(weight, *qparams, scheme).dequantize().double()
    return to_groups((numbers - weight.double()).square(), scheme).sum(-1)


@pytest.mark.parametrize("tail", [False, True])
@pytest.mark.parametrize("spelling", SPELLINGS)
def test_the_search_is_never_worse_than_min_max_and_ships_as_it_was_scored(spelling: str, tail: bool) -> None:
    scheme = Scheme.parse(spelling)
    weight = torch.randn(24, 64) ** (3 if tail else 1)
    weight[3] = 0.0
    weight[4] = weight[4].abs()
    found = initial_scales(weight, scheme, "mse")
    best, before = (squared_error(weight, qparams, scheme) for qparams in (found, choose_qparams(weight, scheme)))
    assert bool((best <= before * (1 + 1e-6)).all())
    assert best.sum() < (0.999 if scheme.weight_bits == 8 else 0.97) * before.sum()
    assert torch.equal(round_scale(found[0], significant_bits=8 if scheme.symmetric else 7), found[0])
    assert (found[1] is None) == scheme.symmetric
    assert found[1] is None or (found[1].dtype == torch.uint8 and int(found[1].max()) <= scheme.qmax)


def test_the_search_finds_what_trying_everything_finds() -> None:
    scheme, weight = Scheme.parse("w2a16-g16-asym"), torch.randn(8, 16)
    found = squared_error(weight, initial_scales(weight, scheme), scheme)
    least = torch.full_like(found, float("inf"))
    for share in torch.linspace(0.02, 1.3, 400):
        span = weight.amax(-1, keepdim=True).clamp(min=0) - weight.amin(-1, keepdim=True).clamp(max=0)
        scale = round_scale(span * share / 3, significant_bits=7)
        for zero in range(4):
            tried = (scale, torch.full_like(scale, zero, dtype=torch.uint8))
            least = torch.minimum(least, squared_error(weight, tried, scheme))
    assert found.sum() < 1.03 * least.sum()


def test_where_scales_begin_is_checked() -> None:
    with pytest.raises(ConfigError, match="initial='gptq' is not one of minmax, mse"):
        prepare(MLP(), "w8a8", learn_scales=True, initial="gptq")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="add learn_scales=True"):
        prepare(MLP(), "w8a8", initial="mse")


@pytest.mark.parametrize("spelling", SPELLINGS)
@pytest.mark.parametrize("freeze", [False, True])
@pytest.mark.parametrize("learn_zero_points", [False, True])
def test_a_model_that_learned_ships_its_own_scales_and_zero_points(
    spelling: str, freeze: bool, learn_zero_points: bool
) -> None:
    options = {"learn_scales": True, "learn_zero_points": learn_zero_points}
    model, x = prepare(MLP(), spelling, **options, initial="mse"), batch("mlp")
    optimizer = torch.optim.Adam(model.parameters(), 2e-2)
    for _ in range(8):
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()
    if freeze:
        set_phase(model, Phase.FROZEN)
    quantizer = model.up.fake_quantizer
    trained = quantizer.fake_weight(model.up.weight).detach()
    integers = quantizer.integers(model.up.weight)
    assert torch.equal(dequantize(integers.q, integers.scale, integers.zero_point), trained)
    assert not torch.equal(quantizer.grid.relative_scale, torch.ones_like(quantizer.grid.relative_scale))

    fresh = prepare(MLP(), spelling, **options)
    fresh.load_state_dict(model.state_dict())
    load_quantizer_state(fresh, quantizer_state(model))
    assert torch.equal(fresh(x), model(x))
    hidden = trained.clone()
    convert(model)
    assert torch.equal(model.up.weight.dequantize(), hidden)


def test_no_step_turns_a_scale_to_zero_or_around() -> None:
    model = prepare(MLP(), "w4a16-g32", learn_scales=True)
    grid = model.up.fake_quantizer.grid
    before = grid.qparams()[0]
    for value, factor in ((-5.0, 2.0**-6), (1e9, 2.0**6)):
        with torch.no_grad():
            grid.relative_scale.fill_(value)
        torch.testing.assert_close(grid.qparams()[0], before * factor, rtol=1e-2, atol=1e-7)
        assert bool(grid.saturated().all())
    with torch.no_grad():
        grid.relative_scale.fill_(-5.0)
    (grid.scale() / before).sum().backward()
    assert not grid.relative_scale.grad.any(), "a step down leads further out"
    grid.relative_scale.grad = None
    (-grid.scale() / before).sum().backward()
    assert bool((grid.relative_scale.grad < 0).all()), "a step up leads back"


def test_a_group_of_zeros_can_learn_to_be_something_else() -> None:
    model = nn.Sequential(nn.Linear(64, 4, bias=False))
    with torch.no_grad():
        model[0].weight[0] = 0.0
    prepare(model, "w4a16-g32", learn_scales=True)
    assert not model(torch.randn(2, 64))[:, 0].any()
    with torch.no_grad():
        model[0].weight[0] = 0.05
    assert model(torch.ones(1, 64))[0, 0].item() == pytest.approx(64 * 0.05, rel=0.5)


def test_scales_begin_anew_from_weights_that_moved() -> None:
    model = prepare(MLP(), "w3a16-g32-asym", learn_scales=True, initial="mse", phase=Phase.FLOAT)
    with torch.no_grad():
        model.up.weight.mul_(3.0)
    begin_scales(model)
    expected = initial_scales(model.up.weight, Scheme.parse("w3a16-g32-asym"))
    found = model.up.fake_quantizer.qparams(model.up.weight)
    assert torch.equal(found[0], expected[0]) and torch.equal(found[1], expected[1])


def test_scales_found_elsewhere_are_where_learning_begins() -> None:
    model = prepare(MLP(), "w4a16-g32-asym", learn_scales=True)
    scheme = Scheme.parse("w4a16-g32-asym")
    better = quantize(model.up.weight, *initial_scales(model.up.weight, scheme), scheme)
    parameters = dict(grid_parameters(model))
    hold(model.up, better, write=False)
    found = model.up.fake_quantizer.integers(model.up.weight)
    assert torch.equal(found.q, better.q) and torch.equal(found.scale, better.scale)
    assert all(grid_parameters(model)[name] is parameter for name, parameter in parameters.items())


def test_taking_it_out_takes_the_scales_out() -> None:
    model = prepare(MLP(), "w4a16-g32-asym", learn_scales=True, learn_zero_points=True)
    assert len(grid_parameters(model)) == 4
    unprepare(model)
    assert {name for name, _ in model.named_parameters()} == {name for name, _ in MLP().named_parameters()}
    assert grid_parameters(model) == {}


def test_symmetric_grids_of_few_bits_are_advised_against() -> None:
    low = plan_of(prepare(MLP(), {"up": "w3a16-g32", "down": "w4a16-g32"}))
    assert "w3a16-g32-asym instead of w3a16-g32" in low_bit_advice(low)
    assert low_bit_advice(plan_of(prepare(MLP(), {"up": "w2a16-g32-asym", "down": "w4a16-g32"}))) == ""


@pytest.mark.parametrize("spelling", ["w8a8-static", "w4a8-static-g8", "w4a8-static-g8-asym"])
def test_a_grid_follows_rows_that_are_multiplied(spelling: str) -> None:
    torch.manual_seed(0)
    scheme, weight, gain = Scheme.parse(spelling), torch.randn(5, 32), torch.tensor([2.0, -1.0, 0.0, -0.5, 1.0])
    grid = LearnedGrid(*choose_qparams(weight, scheme), scheme, learn_zero_points=not scheme.symmetric)
    if grid.zero_shift is not None:
        torch.nn.init.constant_(grid.zero_shift, 1 / scheme.qmax)
    before = quantize(weight, *grid.qparams(), scheme).dequantize()
    grid.follow(gain.double())
    assert bool((grid.unit != 0).all())
    after = quantize(weight * gain[:, None], *grid.qparams(), scheme).dequantize()
    torch.testing.assert_close(after, before * gain[:, None], rtol=0, atol=0)
