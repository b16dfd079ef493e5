"""What prepare() refuses, with the layer's name and what to do; the model stays as it was."""

from __future__ import annotations

import copy
import functools
from dataclasses import replace

import pytest
import torch
import torch.nn.utils.parametrizations as parametrizations
from torch import nn
from torch.nn.utils import parametrize, prune

from qat_plugin import Phase, Plan, Policy, convert, prepare, set_phase, unprepare
from qat_plugin.errors import PolicyError, PrepareError, QatError
from qat_plugin.qat import get_phase, is_prepared, plan_of, prepared_layers, quantizer_state
from tests.qat.models import MLP, Scaled, batch, llama


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_weights_that_are_not_finite(value: float) -> None:
    model = MLP()
    with torch.no_grad():
        model.down.weight[3, 5] = value
        model.down.weight[4, 5] = value
    with pytest.raises(PrepareError, match=r"down: 2 of its 8192 weights are NaN or infinite"):
        prepare(model, "w8a8")
    assert not is_prepared(model)


def test_already_prepared() -> None:
    model = prepare(MLP(), "w8a8")
    with pytest.raises(PrepareError, match=r"MLP is already prepared.*unprepare\(model\) first"):
        prepare(model, "w4a16-g32")
    assert str(plan_of(model)["up"].scheme) == "w8a8"


@pytest.mark.parametrize("scheme", ["w8a8", "w4a16-g32", "fp16"])
def test_already_converted(scheme: str) -> None:
    model = convert(MLP(), scheme)
    with pytest.raises(PrepareError, match=r"MLP is already converted.*fresh model"):
        prepare(model, "w8a8")


def test_a_plan_of_another_model() -> None:
    with pytest.raises(PrepareError, match=r"made for another model \(Sequential\): MLP has no layer 0"):
        prepare(MLP(), Policy("w8a8").plan(nn.Sequential(nn.Linear(64, 64))))
    with pytest.raises(PrepareError, match=r"another model: up has a weight of \[128, 32\].*\[128, 64\] here"):
        prepare(MLP(64), Policy("w8a8").plan(MLP(32)))


def test_a_plan_made_before_weights_were_tied_or_parted() -> None:
    policy = Policy({"embedding": "w8a16", "lm_head": "w8a16"})
    tied, parted = policy.plan(llama()), policy.plan(llama(tied=False))
    with pytest.raises(PrepareError, match=r"lm_head is not tied in the plan and shares .*embed_tokens.*tie weights"):
        prepare(llama(), parted)
    with pytest.raises(PrepareError, match=r"lm_head is tied to model.embed_tokens in the plan and is not in this"):
        prepare(llama(tied=False), tied)


def test_a_plan_whose_groups_do_not_tile_the_layer() -> None:
    plan = Policy("w4a16-g32").plan(MLP())
    edited = Plan.from_list([{**entry, "scheme": "w4a16-g48"} for entry in plan.to_list()], plan.model)
    model = MLP()
    with pytest.raises(PrepareError, match=r"up: in_features \(64\) must be divisible by the group size \(48\)"):
        prepare(model, edited)
    assert not is_prepared(model)


def test_a_plan_that_changes_nothing() -> None:
    plan = Policy({}).plan(MLP())
    with pytest.raises(PrepareError, match=r"changes no layer of MLP \(up: .+; down: .+\)"):
        prepare(MLP(), plan)
    with pytest.raises(PolicyError, match=r"no Linear, Conv1d, Conv2d, Conv1D or Embedding"):
        prepare(nn.Sequential(nn.ReLU()), "w8a8")


def test_nf4_is_not_for_training_in() -> None:
    with pytest.raises(QatError, match=r"up.*nf4.*QLoRA"):
        prepare(MLP(), "nf4")


def test_layers_whose_weight_is_computed() -> None:
    pruned = MLP()
    prune.l1_unstructured(pruned.up, "weight", 0.5)
    with pytest.raises(QatError, match=r"up.*pruning"):
        prepare(pruned, {"up": "w8a8"})
    normalised = MLP()
    parametrizations.weight_norm(normalised.up)
    with pytest.raises(QatError, match=r"up.*(parametrization|norm)"):
        prepare(normalised, {"up": "w8a8"})
    lazy = nn.Sequential(nn.LazyLinear(8))
    with pytest.raises(QatError, match=r"0.*does not exist yet"):
        prepare(lazy, {"0": "w8a8"})


def test_a_forward_replaced_on_the_instance_would_bypass_fake_quantization() -> None:
    model = MLP()
    model.up.forward = functools.partial(nn.Linear.forward, model.up)  # type: ignore[method-assign]
    with pytest.raises(PrepareError, match=r"up: its forward was replaced on the instance"):
        prepare(model, "w8a8")
    assert type(model.down) is nn.Linear


def test_scales_that_need_weights_which_are_not_there_yet() -> None:
    with torch.device("meta"):
        model = MLP()
    with pytest.raises(PrepareError, match=r"up is on the meta device: learned or frozen scales"):
        prepare(model, "w8a8", learn_scales=True)
    with pytest.raises(PrepareError, match=r"up is on the meta device"):
        prepare(model, "w8a8", phase=Phase.FROZEN)
    prepare(model, "w8a8").to_empty(device="cpu")
    model.load_state_dict(MLP().state_dict())
    assert model(batch("mlp")).isfinite().all()


def test_a_copy_of_a_prepared_part_inside_the_model_is_ambiguous() -> None:
    model = nn.ModuleDict({"student": MLP()})
    prepare(model, "w8a8")
    model["teacher"] = copy.deepcopy(model["student"])
    for what in (quantizer_state, prepared_layers, get_phase, convert):
        with pytest.raises(PrepareError, match=r"two prepared layers called student.up"):
            what(model)
    unprepare(model["teacher"])
    assert list(prepared_layers(model)) == ["student.up", "student.down"]
    unprepare(model)
    assert not is_prepared(model)


@pytest.mark.parametrize("layer", [nn.Linear(64, 32), Scaled(64, 32)], ids=["plain", "own forward"])
def test_pruning_after_prepare_is_seen_by_fake_quantization(layer: nn.Module) -> None:
    """Lightning #11047: pruning and quantization-aware training together."""
    model, x = prepare(nn.Sequential(layer), "w4a8-g32"), torch.randn(3, 64)
    dense = model(x)
    prune.l1_unstructured(layer, "weight", 0.5)
    sparse = model(x)
    assert not torch.equal(sparse, dense)
    set_phase(model, Phase.FROZEN)
    set_phase(model, Phase.FAKE_QUANTIZED)
    sparse.sum().backward()
    assert ((layer.weight_orig.grad == 0) >= (layer.weight_mask == 0)).all()
    prune.remove(layer, "weight")
    assert torch.equal(model(x), sparse)
    convert(model)
    assert (model[0].weight.dequantize() == 0).float().mean() >= 0.5


class Halved(nn.Module):
    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        return weight / 2


def test_parametrizing_after_prepare_is_seen_or_refused() -> None:
    model, x = prepare(MLP(), "w4a16-g32"), batch("mlp")
    whole = model.up(x) - model.up.bias
    parametrize.register_parametrization(model.up, "weight", Halved())
    torch.testing.assert_close(model.up(x) - model.up.bias, whole / 2)
    with pytest.raises(PrepareError, match=r"up was parametrized after prepare\(\)"):
        unprepare(model)
    assert len(prepared_layers(model)) == 2
    with pytest.raises(QatError, match="up: its weight is computed by pruning or a parametrization"):
        convert(model)
    parametrize.remove_parametrizations(model.up, "weight")
    torch.testing.assert_close(unprepare(model).up(x) - model.up.bias, whole / 2, rtol=0.2, atol=0.2)
    assert type(model.up) is nn.Linear


def test_parametrizing_an_own_forward_after_prepare_is_refused() -> None:
    layer = prepare(nn.Sequential(Scaled(64, 32)), "w4a16-g32")[0]
    parametrize.register_parametrization(layer, "weight", Halved())
    with pytest.raises(PrepareError, match=r"0: a parametrization was put on its weight after prepare\(\)"):
        layer(torch.randn(2, 64))


def test_converting_while_pruning_still_computes_the_weight() -> None:
    model = prepare(MLP(), "w8a8")
    prune.l1_unstructured(model.down, "weight", 0.5)
    with pytest.raises(QatError, match=r"down: its weight is computed by pruning.*prune.remove"):
        convert(model)


def test_functions_for_prepared_models_name_what_is_missing() -> None:
    for function in (unprepare, plan_of, get_phase, quantizer_state):
        with pytest.raises(PrepareError, match=r"MLP is not prepared: call prepare\(model, plan\) first"):
            function(MLP())
    with pytest.raises(PrepareError, match=r"not prepared"):
        set_phase(MLP(), Phase.FLOAT)


def test_a_failing_layer_leaves_those_before_it_alone() -> None:
    model = MLP()
    plan = Policy("w8a8").plan(model)
    broken = replace(plan, layers=(plan.layers[0], replace(plan.layers[1], shape=(1, 1))))
    with pytest.raises(PrepareError, match=r"down"):
        prepare(model, broken)
    assert type(model.up) is nn.Linear
    assert not model.up._modules
