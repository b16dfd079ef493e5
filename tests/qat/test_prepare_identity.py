"""What prepare() leaves alone: Parameters, names, hooks, modes, ties, state_dict; and the way back."""

from __future__ import annotations

import copy
import io
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from qat_plugin import Phase, prepare, set_phase, unprepare
from qat_plugin.qat import is_prepared, plan_of, prepared_layers, quantizer_state
from tests.qat.models import FAMILIES, MLP, Scaled, batch, llama, output

families = pytest.mark.parametrize("family", FAMILIES)


def snapshot(model: nn.Module) -> dict[str, Any]:
    return {
        "parameters": {name: id(p) for name, p in model.named_parameters(remove_duplicate=False)},
        "buffers": {name: id(b) for name, b in model.named_buffers(remove_duplicate=False)},
        "requires_grad": {name: p.requires_grad for name, p in model.named_parameters()},
        "dtypes": {name: p.dtype for name, p in model.named_parameters()},
        "classes": {name: type(m) for name, m in model.named_modules()},
        "training": {name: m.training for name, m in model.named_modules()},
        "hooks": {name: (dict(m._forward_hooks), dict(m._forward_pre_hooks)) for name, m in model.named_modules()},
    }


def without_quantizers(seen: dict[str, Any]) -> dict[str, Any]:
    return {k: {n: v for n, v in part.items() if ".fake_quantizer" not in n} for k, part in seen.items()}


@families
def test_parameters_names_modes_and_hooks_survive(family: str) -> None:
    model = FAMILIES[family]()
    first = next(model.parameters())
    first.requires_grad_(False)
    next(m for m in model.modules() if isinstance(m, nn.Linear | nn.LayerNorm | nn.Embedding)).train()
    before = snapshot(model)
    prepare(model, {"default": "w8a8", "embedding": "w8a16"} if family == "sequential" else "w8a8")
    after = without_quantizers(snapshot(model))
    for what in ("parameters", "buffers", "requires_grad", "dtypes", "training", "hooks"):
        assert after[what] == before[what], what
    changed = {name for name, kind in after["classes"].items() if kind is not before["classes"][name]}
    assert changed == set(prepared_layers(model))
    assert all(issubclass(after["classes"][name], before["classes"][name]) for name in changed)


@families
def test_unprepare_restores_everything_bit_for_bit(family: str) -> None:
    model = FAMILIES[family]()
    before, x = snapshot(model), batch(family)
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    expected = output(model, x).detach()
    prepare(model, "w4a8-g32", learn_scales=True)
    assert not torch.equal(output(model, x), expected)
    assert unprepare(model) is model
    assert snapshot(model) == before
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())
    assert torch.equal(output(model, x), expected)
    assert not is_prepared(model)
    prepare(model, "w8a16")  # and it can be prepared again


@families
@pytest.mark.parametrize("scheme", ["w4a16-g32", "w8a8-static"])
def test_the_state_dict_is_the_float_models_both_ways(family: str, scheme: str) -> None:
    plain, prepared = FAMILIES[family](), FAMILIES[family]()
    keys = list(plain.state_dict())
    prepare(prepared, scheme, learn_scales=True)
    assert list(prepared.state_dict()) == keys
    prepared.load_state_dict(plain.state_dict(), strict=True)
    assert all(torch.equal(value, plain.state_dict()[name]) for name, value in prepared.state_dict().items())
    with torch.no_grad():
        for parameter in prepared.parameters():
            parameter.add_(1.0)
    plain.load_state_dict(prepared.state_dict(), strict=True)
    assert all(torch.equal(value, prepared.state_dict()[name]) for name, value in plain.state_dict().items())
    saved = io.BytesIO()
    torch.save(prepared.state_dict(), saved)
    saved.seek(0)
    plain.load_state_dict(torch.load(saved, weights_only=True), strict=True)


@families
def test_a_deep_copy_computes_the_same_and_is_independent(family: str) -> None:
    model, x = prepare(FAMILIES[family](), "w4a8-g32", learn_scales=True), batch(family)
    twin = copy.deepcopy(model)
    expected = output(model, x).detach()
    assert torch.equal(output(twin, x), expected)
    assert not {id(p) for p in twin.parameters()} & {id(p) for p in model.parameters()}
    assert str(plan_of(twin)) == str(plan_of(model))
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.zero_()
    assert torch.equal(output(model, x), expected)


@pytest.mark.parametrize("family", ["mlp", "gpt2", "own_forwards"])
def test_a_pickled_module_computes_the_same(family: str) -> None:
    model, x = prepare(FAMILIES[family](), "w8a8", learn_scales=True), batch(family)
    set_phase(model, Phase.FROZEN)
    saved = io.BytesIO()
    torch.save(model, saved)
    saved.seek(0)
    loaded = torch.load(saved, weights_only=False)
    assert torch.equal(output(loaded, x), output(model, x))
    assert type(next(iter(prepared_layers(loaded).values()))) is type(next(iter(prepared_layers(model).values())))
    assert quantizer_state(loaded)["plan"] == quantizer_state(model)["plan"]
    unprepare(loaded)


def test_pickle_drops_the_code_of_a_compiled_layer_as_torch_does() -> None:
    model = MLP()
    model.up.compile(backend="eager")
    prepare(model, "w4a16-g32")
    saved = io.BytesIO()
    torch.save(model, saved)
    saved.seek(0)
    x = batch("mlp")
    assert torch.equal(torch.load(saved, weights_only=False)(x), model(x))
    assert torch.equal(copy.deepcopy(model)(x), model(x))


def test_tied_weights_stay_one_parameter_through_everything() -> None:
    model = llama()
    prepare(model, {"embedding": "w4a16-g32", "default": "w4a16-g32"}, learn_scales=True)
    embed, head = model.model.embed_tokens, model.lm_head
    assert embed.weight is head.weight
    assert embed.fake_quantizer.grid.relative_scale is head.fake_quantizer.grid.relative_scale
    twin = copy.deepcopy(model)
    assert twin.lm_head.weight is twin.model.embed_tokens.weight
    assert twin.lm_head.fake_quantizer.grid.relative_scale is twin.model.embed_tokens.fake_quantizer.grid.relative_scale
    model.to(torch.float64).to(torch.bfloat16)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    unprepare(model)
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_user_hooks_see_the_layers_own_input_and_output() -> None:
    model, x, seen = MLP(), batch("mlp"), []
    model.up.register_forward_pre_hook(lambda module, args: seen.append(("pre", args[0])))
    model.up.register_forward_hook(lambda module, args, out: out * 2)
    handle = model.down.register_full_backward_hook(lambda module, gi, go: seen.append(("backward", go[0])))
    prepare(model, "w8a8")
    inner = model.up.forward(x)
    assert torch.equal(model(x), model.down.forward(torch.tanh(inner * 2)))
    assert seen[0][0] == "pre"
    assert torch.equal(seen[0][1], x)
    model(x).sum().backward()
    assert seen[-1][0] == "backward"
    handle.remove()


def test_a_shared_module_is_prepared_once_and_named_once() -> None:
    shared = nn.Linear(64, 64)
    model = nn.Sequential(shared, nn.ReLU(), shared)
    prepare(model, "w4a16-g32")
    assert model[0] is model[2]
    assert list(prepared_layers(model)) == ["0"]
    model(torch.randn(2, 64)).sum().backward()
    assert shared.weight.grad is not None


def test_dtypes_are_kept_and_scales_are_not_narrowed() -> None:
    model = prepare(MLP(), "w8a8-static", learn_scales=True)
    model.train()(batch("mlp"))
    model.to(torch.bfloat16)
    assert model.up.weight.dtype == torch.bfloat16
    assert model.up.fake_quantizer.grid.relative_scale.dtype == torch.float32
    assert model.up.fake_quantizer.observer.absmax.dtype == torch.float32
    model.half()
    assert model.up.fake_quantizer.grid.relative_scale.dtype == torch.float32


@pytest.mark.parametrize("phase", list(Phase))
def test_prepare_starts_in_any_phase(phase: Phase) -> None:
    model = prepare(MLP(), "w8a8", phase=phase)
    assert {layer.fake_quantizer.phase for layer in prepared_layers(model).values()} == {phase}


def test_a_subclass_keeps_its_own_class_in_isinstance_and_repr() -> None:
    model = prepare(nn.Sequential(Scaled(64, 64)), "w4a16-g32")
    assert isinstance(model[0], Scaled)
    assert "Scaled" in repr(model)
    assert "w4a16-g32" in repr(model)


class Reader(nn.Linear):
    """Reads its weight through several names."""

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight.to(x.dtype)
        return nn.functional.linear(x, weight, bias=self.bias) + 0 * getattr(self, "weight").sum()  # noqa: B009


def test_an_own_forward_leaves_no_trace_behind_even_when_it_raises() -> None:
    layer = Reader(64, 32)
    model = prepare(nn.Sequential(layer), "w4a8-g32")
    parameter = layer._parameters["weight"]
    model(torch.randn(2, 64))
    assert layer.weight is parameter
    with pytest.raises(RuntimeError, match="shape"):
        model(torch.randn(2, 63))
    assert layer.weight is parameter
    assert "weight" not in layer.__dict__
