"""What a checkpoint carries beside the float state_dict, and what is refused."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from qat_plugin import Phase, convert, prepare, set_phase
from qat_plugin.errors import CheckpointError, ConversionError, PrepareError
from qat_plugin.grid_search import search_scales
from qat_plugin.numerics import quantize
from qat_plugin.qat import begin_scales, get_phase, hold, load_quantizer_state, quantizer_state, quantizers
from tests.qat.models import FAMILIES, MLP, batch, llama, output


def through_a_file(state: dict[str, Any]) -> dict[str, Any]:
    saved = io.BytesIO()
    torch.save(state, saved)
    saved.seek(0)
    loaded: dict[str, Any] = torch.load(saved, weights_only=True)
    return loaded


@pytest.mark.parametrize("scheme", ["w4a8-g32", "w8a8-static", "w4a16-g32-asym", "w8a16-tensor", "fp16"])
@pytest.mark.parametrize("learn_scales", [False, True])
@pytest.mark.parametrize("phase", list(Phase))
@pytest.mark.parametrize("family", ["mlp", "gpt2"])
def test_it_survives_a_weights_only_load(scheme: str, learn_scales: bool, phase: Phase, family: str) -> None:
    model, x = prepare(FAMILIES[family](), scheme, learn_scales=learn_scales).train(), batch(family)
    optimizer = torch.optim.SGD(model.parameters(), 0.05)
    for step in range(2):
        output(model, x).square().mean().backward()
        optimizer.step()
        if step == 0:
            set_phase(model, phase)
    fresh = prepare(FAMILIES[family](), scheme, learn_scales=learn_scales)
    fresh.load_state_dict(model.state_dict())
    load_quantizer_state(fresh, through_a_file(quantizer_state(model)))
    assert get_phase(fresh) is phase
    assert torch.equal(output(fresh.eval(), x), output(model.eval(), x))
    for name, quantizer in quantizers(model).items():
        theirs = quantizers(fresh)[name].export_state()
        mine = quantizer.export_state()
        assert theirs.keys() == mine.keys()
        assert all(torch.equal(theirs[key], mine[key]) for key in mine)


def test_it_holds_primitives_and_tensors_that_do_not_alias_the_model() -> None:
    model = prepare(MLP(), "w8a8-static", learn_scales=True, phase=Phase.FROZEN)
    state = quantizer_state(model)

    def check(value: Any) -> None:
        if isinstance(value, dict):
            assert all(isinstance(key, str) for key in value)
            for part in value.values():
                check(part)
        elif isinstance(value, list):
            for part in value:
                check(part)
        else:
            assert value is None or type(value) in (str, int, float, bool, torch.Tensor)

    check(state)
    before = state["layers"]["up"]["scale"].clone()
    with torch.no_grad():
        model.up.fake_quantizer.grid.relative_scale.add_(1.0)
    assert torch.equal(state["layers"]["up"]["scale"], before)
    load_quantizer_state(model, state)
    model.up.fake_quantizer.frozen_scale.add_(1.0)
    assert torch.equal(state["layers"]["up"]["frozen_scale"], before)


def test_tied_learned_scales_come_back_tied() -> None:
    model, fresh = (prepare(llama(), {"embedding": "w4a16-g32"}, learn_scales=True) for _ in range(2))
    with torch.no_grad():
        model.lm_head.fake_quantizer.grid.relative_scale.mul_(1.5)
    load_quantizer_state(fresh, quantizer_state(model))
    assert (
        fresh.lm_head.fake_quantizer.grid.relative_scale is fresh.model.embed_tokens.fake_quantizer.grid.relative_scale
    )
    assert torch.equal(
        fresh.lm_head.fake_quantizer.grid.relative_scale, model.lm_head.fake_quantizer.grid.relative_scale
    )


def test_loading_keeps_the_parameter_objects_of_an_optimizer() -> None:
    model = prepare(MLP(), "w4a16-g32", learn_scales=True)
    state, scale = (
        quantizer_state(prepare(MLP(), "w4a16-g32", learn_scales=True)),
        model.up.fake_quantizer.grid.relative_scale,
    )
    load_quantizer_state(model, state)
    assert model.up.fake_quantizer.grid.relative_scale is scale
    assert torch.equal(scale, state["layers"]["up"]["relative_scale"])


Damage = Callable[[dict[str, Any]], Any]


def without_layer(state: dict[str, Any]) -> None:
    del state["layers"]["down"]


def without_scale(state: dict[str, Any]) -> None:
    del state["layers"]["down"]["scale"]


def other_shape(state: dict[str, Any]) -> None:
    state["layers"]["down"]["scale"] = torch.zeros(3, 1)


def not_frozen(state: dict[str, Any]) -> None:
    del state["layers"]["down"]["frozen_scale"]


def frozen_shape(state: dict[str, Any]) -> None:
    state["layers"]["down"]["frozen_scale"] = torch.zeros(1, 1)


def extra(state: dict[str, Any]) -> None:
    state["layers"]["down"]["momentum"] = torch.zeros(1)


def no_tensor(state: dict[str, Any]) -> None:
    state["layers"]["down"]["absmax"] = 3.0


@pytest.mark.parametrize("damage", [without_scale, other_shape, not_frozen, frozen_shape, extra, no_tensor])
def test_a_state_that_does_not_fit_names_the_layer_and_changes_nothing(damage: Damage) -> None:
    source = prepare(MLP(), "w8a8-static", learn_scales=True).train()
    source(batch("mlp"))
    set_phase(source, Phase.FROZEN)
    state = quantizer_state(source)
    damage(state)
    model = prepare(MLP(), "w8a8-static", learn_scales=True)
    before = copy.deepcopy(quantizer_state(model))
    with pytest.raises(CheckpointError, match="down"):
        load_quantizer_state(model, state)
    after = quantizer_state(model)
    assert after["phase"] == before["phase"]
    for name, tensors in before["layers"].items():
        assert after["layers"][name].keys() == tensors.keys()
        assert all(torch.equal(after["layers"][name][key], value) for key, value in tensors.items())


@pytest.mark.parametrize(
    ("given", "text"),
    [
        ({}, "not a quantizer state.*version"),
        ({"version": 99}, "version 99; this package reads 1"),
        ({"version": 1}, "not a quantizer state"),
        ({"version": 1, "phase": "melted", "plan": [], "layers": {}}, "melted"),
        ({"version": 1, "phase": "float", "plan": 3, "layers": {}}, "not a quantizer state"),
        ({"version": 1, "phase": "float", "phases": {"x": "frozen"}, "plan": [], "layers": {}}, "plan has not: x"),
        ({"version": 1, "phase": "float", "initial": "best", "plan": [], "layers": {}}, "'best' is not one of minmax"),
        (None, "not a quantizer state"),
    ],
)
def test_what_is_no_state_is_refused(given: Any, text: str) -> None:
    with pytest.raises(CheckpointError, match=text):
        load_quantizer_state(prepare(MLP(), "w8a8"), given)


def test_a_missing_layer_is_refused() -> None:
    state = quantizer_state(prepare(MLP(), "w8a8"))
    without_layer(state)
    with pytest.raises(CheckpointError, match="down"):
        load_quantizer_state(prepare(MLP(), "w8a8"), state)


@pytest.mark.parametrize("policy", ["w8a16", {"up": "w8a8"}, {"up": "w8a8", "down": "w4a8-g32"}])
def test_another_plan_is_refused_by_the_name_of_its_first_different_layer(policy: Any) -> None:
    state = quantizer_state(prepare(MLP(), "w8a8"))
    with pytest.raises(CheckpointError, match=r"differs from this model's at (up|down): w8a8 there, .* here"):
        load_quantizer_state(prepare(MLP(), policy), state)


def test_learned_and_plain_scales_do_not_mix() -> None:
    for there, here in ((True, False), (False, True)):
        state = quantizer_state(prepare(MLP(), "w8a8", learn_scales=there))
        with pytest.raises(CheckpointError, match=f"up.*learn_scales={there}.*learn_scales={here}"):
            load_quantizer_state(prepare(MLP(), "w8a8", learn_scales=here), state)


def test_an_unprepared_model_has_none() -> None:
    with pytest.raises(PrepareError, match=r"Linear is not prepared: call prepare\(model, plan\) first"):
        quantizer_state(nn.Linear(2, 2))
    with pytest.raises(PrepareError, match="is not prepared"):
        load_quantizer_state(nn.Linear(2, 2), {})


@pytest.mark.parametrize("scheme", ["w4a16-g32", "w4a16-g32-asym", "w8a8"])
@pytest.mark.parametrize("held", ["up", "down"])
@pytest.mark.parametrize("phase", [Phase.FLOAT, Phase.FAKE_QUANTIZED])
def test_a_model_with_one_held_layer_comes_back_as_it_was(scheme: str, held: str, phase: Phase) -> None:
    """Holding freezes that layer alone: its phase is not the others'."""
    model, x = prepare(MLP(), scheme, phase=phase), batch("mlp")
    layer = getattr(model, held)
    quantizer = layer.fake_quantizer
    hold(layer, quantize(layer.weight * 0.9, *search_scales(layer.weight * 0.9, quantizer.scheme), quantizer.scheme))
    integers = quantizer.integers(layer.weight)
    assert get_phase(model) is phase, "that of the layers that still have some way to go"
    fresh = prepare(MLP(), scheme)
    fresh.load_state_dict(model.state_dict())
    load_quantizer_state(fresh, through_a_file(quantizer_state(model)))
    assert {n: q.phase for n, q in quantizers(fresh).items()} == {n: q.phase for n, q in quantizers(model).items()}
    assert torch.equal(fresh(x), model(x))
    again = getattr(fresh, held)
    assert torch.equal(again.fake_quantizer.integers(again.weight).q, integers.q)
    convert(fresh.eval())
    assert torch.equal(getattr(fresh, held).weight.integers().q, integers.q)
    assert torch.equal(getattr(fresh, held).weight.integers().scale, integers.scale)


def test_a_conversion_that_fails_leaves_a_held_layer_and_the_others_in_their_phases() -> None:
    model = prepare(MLP(), "w4a16-g32", phase=Phase.FLOAT)
    hold(model.up, model.up.fake_quantizer.integers(model.up.weight))
    with pytest.raises(ConversionError, match="down"):
        convert(model, inputs={"down": torch.zeros(3, 5)})
    assert [q.phase for q in quantizers(model).values()] == [Phase.FROZEN, Phase.FLOAT]


def test_a_frozen_layer_of_learned_scales_can_be_held() -> None:
    model = prepare(MLP(), "w4a16-g32", learn_scales=True, phase=Phase.FROZEN)
    scheme, weight = model.up.fake_quantizer.scheme, model.up.weight.detach() * 0.9
    wanted = quantize(weight, *search_scales(weight, scheme), scheme)
    hold(model.up, wanted)
    found = model.up.fake_quantizer.integers(model.up.weight)
    assert torch.equal(found.q, wanted.q) and torch.equal(found.scale, wanted.scale)


@pytest.mark.parametrize("phase", [Phase.FLOAT, Phase.OBSERVING])
def test_scales_that_had_not_begun_begin_as_they_would_have(phase: Phase) -> None:
    model = prepare(MLP(), "w4a16-g32-asym", learn_scales=True, initial="mse", phase=phase)
    fresh = prepare(MLP(), "w4a16-g32-asym", learn_scales=True)
    with torch.no_grad():
        model.up.weight.normal_()  # trained in float meanwhile
    fresh.load_state_dict(model.state_dict())
    load_quantizer_state(fresh, through_a_file(quantizer_state(model)))
    for each in (model, fresh):
        begin_scales(each)
        set_phase(each, Phase.FAKE_QUANTIZED)
    theirs, mine = (m.up.fake_quantizer.integers(m.up.weight) for m in (model, fresh))
    assert torch.equal(theirs.q, mine.q) and torch.equal(theirs.scale, mine.scale)
    expected = search_scales(model.up.weight.detach(), model.up.fake_quantizer.scheme)
    assert torch.equal(mine.scale, expected[0])
