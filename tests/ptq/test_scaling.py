"""Scales fold where the float block stays what it was, and nowhere else; what is done is said group by group."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import GemmaConfig, GemmaForCausalLM

from qat_plugin import Phase, Policy, convert, prepare, proof_of, set_phase, unprepare
from qat_plugin.errors import ConfigError
from qat_plugin.ptq.scaling import ScalingNote, scale_block
from qat_plugin.ptq.statistics import InputStatistics
from qat_plugin.qat import get_phase, is_prepared, prepared_layers
from tests.qat.models import VOCABULARY, batch, bert, gpt2, llama, output

LLAMA = [["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"], ["self_attn.o_proj"],
         ["mlp.gate_proj", "mlp.up_proj"], ["mlp.down_proj"]]  # fmt: skip
GPT2 = [["attn.c_attn"], ["attn.c_proj"], ["mlp.c_fc"], ["mlp.c_proj"]]
BERT = [["attention.self.query", "attention.self.key", "attention.self.value"], ["attention.output.dense"],
        ["intermediate.dense"], ["output.dense"]]  # fmt: skip


def gemma() -> nn.Module:
    config = GemmaConfig(
        vocab_size=VOCABULARY, hidden_size=64, intermediate_size=128, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=1, head_dim=16, max_position_embeddings=64,
    )  # fmt: skip
    return GemmaForCausalLM(config).eval()


def uneven(model: nn.Module) -> nn.Module:
    """A model some of whose features speak louder, as those of pretrained ones do."""
    with torch.no_grad():
        for module in model.modules():
            weight = module._parameters.get("weight")
            if weight is not None and weight.dim() == 1:
                weight.add_(torch.randn_like(weight).abs() * 3)
                if module._parameters.get("bias") is not None:
                    module._parameters["bias"].add_(torch.randn_like(weight))
    return model


def gathered(
    model: nn.Module, block: nn.Module, prefix: str, groups: list[list[str]], x: Tensor, dtype: torch.dtype
) -> tuple[Any, ...]:
    """The arguments of scale_block, from one pass."""
    named = [[(f"{prefix}{name}", block.get_submodule(name)) for name in group] for group in groups]
    statistics = {name: InputStatistics(layer.fake_quantizer.layer.shape[1]) for g in named for name, layer in g}
    calls: list[Any] = []
    handles = [block.register_forward_pre_hook(lambda _, args, kwargs: calls.append((args, kwargs)), with_kwargs=True)]
    for name, layer in (entry for group in named for entry in group):
        handles.append(layer.register_forward_pre_hook(lambda _, args, name=name: statistics[name].add(args[0])))
    set_phase(model, Phase.FLOAT)
    with torch.no_grad():
        model(x, **({"use_cache": False} if hasattr(model, "config") else {}))
    for handle in handles:
        handle.remove()
    set_phase(model, Phase.FAKE_QUANTIZED)
    return block, named, statistics, calls[0]


def arguments(family: str, scheme: str = "w4a16-g32", dtype: torch.dtype = torch.float32) -> tuple[nn.Module, Any]:
    make = {"llama": llama, "gpt2": gpt2, "bert": bert, "gemma": gemma}[family]
    place, groups = {
        "llama": ("model.layers.0", LLAMA), "gemma": ("model.layers.0", LLAMA),
        "gpt2": ("transformer.h.0", GPT2), "bert": ("encoder.layer.0", BERT),
    }[family]  # fmt: skip
    model = uneven(make()).to(dtype)
    prepare(model, Policy({f"{place}.*": scheme, "default": "keep"}))
    block = model.get_submodule(place)
    return model, gathered(model, block, f"{place}.", groups, batch("llama"), dtype)


def relative(a: Tensor, b: Tensor) -> float:
    return float((a.double() - b.double()).norm() / b.double().norm())


def first(result: Any) -> Tensor:
    """The tensor that a block returns, alone or before others."""
    return result if isinstance(result, Tensor) else result[0]


def float_output(model: nn.Module) -> Tensor:
    """What the user's model computes without this package."""
    with torch.no_grad():
        return output(unprepare(copy.deepcopy(model)), batch("llama"))


# (folded into, or "" where it is kept; a part of the reason)
EXPECTED = {
    "llama": [("input_layernorm", ""), ("self_attn.v_proj", ""), ("post_attention_layernorm", ""), ("mlp.up_proj", "")],
    "gemma": [("input_layernorm", ""), ("self_attn.v_proj", ""), ("post_attention_layernorm", ""), ("mlp.up_proj", "")],
    "gpt2": [("ln_1", ""), ("attn.c_attn", ""), ("ln_2", ""), ("", "folding into mlp.c_fc would change")],
    "bert": [
        ("", "nothing in the block"),
        ("attention.self.value", ""),
        ("", "folding into attention.output.LayerNorm would change"),
        ("", "folding into intermediate.dense would change"),
    ],
}


@pytest.mark.parametrize("method", ["awq", "smoothquant"])
@pytest.mark.parametrize("family", list(EXPECTED))
def test_scales_fold_where_the_float_model_stays_the_same(family: str, method: str) -> None:
    model, given = arguments(family, "w4a16-g32" if method == "awq" else "w8a8")
    block, groups = given[0], given[1]
    objects, names = {id(p) for p in model.parameters()}, list(model.state_dict())
    expected = float_output(model)
    notes = scale_block(*given, method, model=model)
    assert get_phase(model) is Phase.FAKE_QUANTIZED
    assert {id(p) for p in model.parameters()} == objects
    assert list(model.state_dict()) == names
    assert relative(float_output(model), expected) < 1e-5
    for note, group, (place, reason) in zip(notes, groups, EXPECTED[family], strict=True):
        layers = [layer.fake_quantizer for _, layer in group]
        if place:
            assert note.action == "folded"
            assert note.place == f"{group[0][1].fake_quantizer.layer.name.split('.0.')[0]}.0.{place}"
            assert all(layer.input_scale is None for layer in layers)
        else:
            assert note.action == "kept"
            assert reason in note.reason
            assert all(torch.equal(layer.input_scale, layers[0].input_scale) for layer in layers)
        assert note.layers == tuple(name for name, _ in group)
        assert str(note).startswith(", ".join(note.layers))
    assert block.training is False


@pytest.mark.parametrize("family", list(EXPECTED))
def test_the_quantized_block_comes_nearer_and_converts_to_itself(family: str) -> None:
    model, given = arguments(family)
    with torch.no_grad():
        args, kwargs = given[3]
        set_phase(model, Phase.FLOAT)
        exact = first(given[0](*args, **kwargs))
        set_phase(model, Phase.FAKE_QUANTIZED)
        before = relative(first(given[0](*args, **kwargs)), exact)
        scale_block(*given, "awq")
        assert relative(first(given[0](*args, **kwargs)), exact) < before
        fake = output(model, batch("llama"))
        convert(model)
        assert relative(output(model, batch("llama")), fake) < 1e-5
    assert max(layer.weight_difference for layer in proof_of(model).layers) == 0


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_statistics_go_on_as_those_of_the_scaled_layers(family: str) -> None:
    model, given = arguments(family)
    notes = scale_block(*given, "awq")
    block, groups, statistics, (args, kwargs) = given
    fresh = {name: InputStatistics(seen.in_features) for name, seen in statistics.items()}
    for name, layer in (entry for group in groups for entry in group):
        quantizer = layer.fake_quantizer

        def add(_: Any, args: Any, name: str = name, quantizer: Any = quantizer) -> None:
            fresh[name].add(args[0] if quantizer.input_scale is None else args[0] / quantizer.input_scale)

        layer.register_forward_pre_hook(add)
    set_phase(model, Phase.FLOAT)
    with torch.no_grad():
        block(*args, **kwargs)
    for note in notes:
        for name in note.layers:
            mine, now = statistics[name], fresh[name]
            assert relative(mine.second_moment, now.second_moment) < 1e-4
            torch.testing.assert_close(mine.absmax, now.absmax, rtol=1e-4, atol=1e-6)


def test_a_16_bit_block_is_folded_after_a_float32_copy_proved_it() -> None:
    model, given = arguments("llama", dtype=torch.bfloat16)
    expected = float_output(model)
    before = relative(float_output(model), expected)
    notes = scale_block(*given, "awq")
    assert before == 0
    assert [note.action for note in notes] == ["folded"] * 4
    assert all(parameter.dtype == torch.bfloat16 for parameter in model.parameters())
    assert relative(float_output(model), expected) < 2e-2  # parameters are rounded once more


class Block(nn.Module):
    """A norm, two linears with an activation between, and a residual; the variants break one fold each."""

    def __init__(self, variant: str) -> None:
        super().__init__()
        self.variant = variant
        self.norm, self.up, self.down = nn.LayerNorm(64), nn.Linear(64, 128), nn.Linear(128, 64)
        self.other = nn.Linear(64, 64)
        nn.init.normal_(self.norm.bias)

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        inner = F.gelu(self.up(h)) if self.variant == "gelu" else F.relu(self.up(h))
        y = x + self.down(inner)
        if self.variant == "another reader":
            y = y + 1e-4 * self.other(h)
        if self.variant == "post norm":
            y = y + h
        if self.variant == "random":
            y = y + torch.rand(())
        return y


def block_arguments(variant: str) -> tuple[nn.Module, Any]:
    block = Block(variant).eval()
    prepare(block, Policy({"up": "w4a16-g32", "down": "w4a16-g32", "default": "keep"}))
    x = torch.randn(40, 64) * torch.logspace(-1, 1, 64)
    return block, gathered(block, block, "", [["up"], ["down"]], x, torch.float32)


@pytest.mark.parametrize(
    ("variant", "actions", "reason"),
    [
        ("plain", ["folded", "folded"], ""),
        ("gelu", ["folded", "kept"], "folding into up would change"),
        ("another reader", ["kept", "folded"], "folding into norm would change the output of other by"),
        ("post norm", ["kept", "folded"], "folding into norm would change the block's output by"),
        ("random", ["kept", "kept"], "does not give the same output twice"),
    ],
)
def test_a_fold_that_changes_anything_is_undone_and_said(variant: str, actions: list[str], reason: str) -> None:
    block, given = block_arguments(variant)
    before = copy.deepcopy(block.state_dict())
    notes = scale_block(*given, "smoothquant")
    assert [note.action for note in notes] == actions
    assert all(reason in note.reason for note in notes if note.action == "kept")
    if "kept" in actions and actions[0] == "kept":
        assert torch.equal(block.norm.weight, before["norm.weight"])
        assert torch.equal(block.norm.bias, before["norm.bias"])


@pytest.mark.parametrize("shared", ["the module", "its weight"])
def test_parameters_used_outside_the_block_are_left_alone(shared: str) -> None:
    block, given = block_arguments("plain")
    elsewhere = block.norm
    if shared == "its weight":
        elsewhere = nn.LayerNorm(64)
        elsewhere.weight = block.norm.weight
    model = nn.ModuleDict({"block": block, "elsewhere": elsewhere})
    before = block.norm.weight.clone()
    notes = scale_block(*given, "smoothquant", model=model)
    assert [note.action for note in notes] == ["kept", "folded"]
    assert "used outside the block" in notes[0].reason
    assert torch.equal(block.norm.weight, before)


def test_without_keeping_what_does_not_fold_is_left_alone() -> None:
    block, given = block_arguments("gelu")
    notes = scale_block(*given, "smoothquant", keep=False)
    assert [note.action for note in notes] == ["folded", "none"]
    assert "left alone: folding into up would change" in str(notes[1])
    assert block.down.fake_quantizer.input_scale is None


def test_grouped_heads_share_the_scale_of_the_head_they_read() -> None:
    model, given = arguments("llama", "w8a8")
    block, _, _, _ = given
    before = block.self_attn.o_proj.weight.detach().clone()
    assert isinstance(scale_block(*given, "smoothquant")[1], ScalingNote)
    scale = (block.self_attn.o_proj.weight / before).mean(0).view(2, 2, 16)  # groups, heads of a group, width
    torch.testing.assert_close(scale[:, 0], scale[:, 1])
    assert is_prepared(model)


def test_the_phase_and_untouched_frozen_scales_stay_and_touched_ones_start_anew() -> None:
    block, given = block_arguments("plain")
    set_phase(block, Phase.FROZEN)
    frozen = block.up.fake_quantizer.frozen_scale.clone()
    scale_block(given[0], given[1][1:], given[2], given[3], "smoothquant")  # folds down's scale into up
    assert get_phase(block) is Phase.FROZEN
    assert not torch.equal(block.up.fake_quantizer.frozen_scale, frozen)
    for layer in prepared_layers(block).values():
        quantizer = layer.fake_quantizer
        fresh = copy.deepcopy(quantizer)
        fresh.enter(Phase.FAKE_QUANTIZED, layer.weight)
        assert torch.equal(quantizer.frozen_scale, fresh.qparams(layer.weight)[0])


def test_mistakes_are_named() -> None:
    _, given = block_arguments("plain")
    with pytest.raises(ConfigError, match="scaling method 'aqw' is not one of awq, smoothquant"):
        scale_block(*given, "aqw")
    with pytest.raises(ConfigError, match="no input statistics of up"):
        scale_block(given[0], given[1], {}, given[3])
    with pytest.raises(ConfigError, match="other is not prepared"):
        scale_block(given[0], [[("other", given[0].other)]], given[2], given[3])
    notes = scale_block(given[0], [[*given[1][0], *given[1][1]]], given[2], given[3])
    assert str(notes[0]) == "up, down: left alone: these layers do not share one input"
    scale_block(*block_arguments("gelu")[1], "smoothquant")
    _, again = block_arguments("gelu")
    scale_block(*again, "smoothquant")
    with pytest.raises(ConfigError, match="down has an input scale already"):
        scale_block(*again, "smoothquant")
