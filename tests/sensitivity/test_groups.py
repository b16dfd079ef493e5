"""Which layers move together: fused ones by name, those that share a Parameter in any case."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from transformers import BertConfig, BertModel, T5Config, T5ForConditionalGeneration

from qat_plugin.policy import Policy, candidates
from qat_plugin.sensitivity import choices_of
from qat_plugin.sensitivity.fused import fused_groups, group_name
from qat_plugin.sensitivity.options import nearest_divisor
from qat_plugin.sensitivity.rules import exactly, policy_from

from .subjects import Classifier, llama


def names(model: nn.Module, **options: str) -> list[str]:
    linear = [c for c in candidates(model) if c.kind in ("linear", "embedding")]
    return [group_name([c.name for c in group]) for group in fused_groups(linear, **options)]  # type: ignore[arg-type]


def test_query_key_value_and_gate_up_are_one_each() -> None:
    assert names(llama(tied=False, layers=1)) == [
        "model.embed_tokens",
        "model.layers.0.self_attn.{q_proj,k_proj,v_proj}",
        "model.layers.0.self_attn.o_proj",
        "model.layers.0.mlp.{gate_proj,up_proj}",
        "model.layers.0.mlp.down_proj",
        "lm_head",
    ]


def test_other_families_have_other_names() -> None:
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 64}
    assert "encoder.layer.0.attention.self.{query,key,value}" in names(BertModel(BertConfig(vocab_size=40, **sizes)))
    t5 = T5ForConditionalGeneration(
        T5Config(vocab_size=40, d_model=32, d_kv=8, d_ff=64, num_layers=1, num_heads=4, feed_forward_proj="gated-gelu")
    )
    found = names(t5)
    assert "encoder.block.0.layer.0.SelfAttention.{q,k,v}" in found
    assert "encoder.block.0.layer.1.DenseReluDense.{wi_0,wi_1}" in found


def test_layers_alone_are_still_tied() -> None:
    assert "model.layers.0.self_attn.k_proj" in names(llama(), groups="layers")
    assert "model.embed_tokens+lm_head" in names(llama(), groups="layers")


def test_layers_of_other_lengths_or_parents_are_not_fused() -> None:
    class Cross(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.query, self.key, self.value = nn.Linear(32, 32), nn.Linear(16, 32), nn.Linear(16, 32)

    assert names(nn.ModuleList([Cross(), Cross()])) == ["0.query", "0.{key,value}", "1.query", "1.{key,value}"]


class Shared(nn.Module):
    """The same weight in three layers, as in models that share their blocks."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.other, self.c = (nn.Linear(32, 32) for _ in range(4))
        self.b.weight = self.c.weight = self.a.weight

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.c(self.other(self.b(self.a(x).relu()).relu()).relu())
        return out


@pytest.mark.parametrize("groups", ["fused", "layers"])
def test_a_weight_shared_across_layers_counts_once_and_moves_together(groups: str) -> None:
    choices = choices_of(Shared(), ["w4a16-g32", "w8a16"], groups=groups)  # type: ignore[arg-type]
    assert [(group.name, group.weights) for group in choices.groups] == [("{a,b,c}", 1024), ("other", 1024)]
    assert [option.bytes for option in choices.groups[0].options] == [512 + 64, 1024 + 64]
    assert choices.ledger.weights == 2048
    assert choices.ledger.floats == 4 * (2 * 1024 + 4 * 32)


def test_a_group_size_becomes_the_nearest_divisor() -> None:
    assert [nearest_divisor(172, wanted) for wanted in (4, 8, 16, 32, 64, 128)] == [4, 4, 43, 43, 86, 172]
    assert nearest_divisor(96, 40) == 48
    assert nearest_divisor(127, 32) == 127
    choices = choices_of(Classifier(), ["w4a16-g32-asym", "w4a16-g16-asym"])
    wide = next(group for group in choices.groups if group.name == "last_hidden")
    assert [option.scheme for option in wide.options] == ["w4a16-g43-asym"], "both candidates come to the same"


def test_heads_and_embeddings_take_part_on_request_only() -> None:
    model = llama(tied=True)
    assert not any("lm_head" in group.name for group in choices_of(model, ["w8a16"]).groups)
    with_ends = choices_of(model, ["w8a16"], embeddings=True)
    tied = next(group for group in with_ends.groups if "lm_head" in group.layers)
    assert tied.layers == ("model.embed_tokens", "lm_head")
    assert tied.weights == 96 * 32
    assert tied.options[0].bytes == 96 * 32 + 2 * 96
    kept = choices_of(model, ["w8a16"], embeddings=True, keep=["embedding"])
    assert any(group.layers == ("lm_head",) for group in kept.groups)


def test_kept_layers_and_the_option_to_keep() -> None:
    choices = choices_of(Classifier(), ["w4a16", "keep", "bf16"], keep=["first"])
    assert [group.name for group in choices.groups] == ["middle", "last_hidden"]
    assert [option.scheme for option in choices.groups[0].options] == ["w4a16", "bf16", "keep"]
    assert [option.bytes for option in choices.groups[0].options] == [172 * (32 + 2), 172 * 64 * 2, 172 * 64 * 4]


def test_a_plan_needs_no_weights() -> None:
    with torch.device("meta"):
        model = llama(tied=True)
    assert choices_of(model, ["w4a16-g32"]).ledger.weights == choices_of(llama(), ["w4a16-g32"]).ledger.weights


def test_rules_say_much_in_few_words_and_never_more() -> None:
    model = llama(layers=3)
    plan = Policy("w8a16").plan(model)
    schemes = {layer.name: layer.scheme for layer in plan}
    same = policy_from(model, plan, schemes)
    assert [rule.pattern for rule in same.rules][:2] == [
        "model.layers.*.self_attn.q_proj", "model.layers.*.self_attn.k_proj",
    ]  # fmt: skip
    assert len(same.rules) == 7
    schemes["model.layers.1.mlp.down_proj"] = None
    mixed = policy_from(model, plan, schemes)
    assert {layer.name: layer.scheme for layer in mixed.plan(model)} == schemes
    assert "model.layers.0.mlp.down_proj" in [rule.pattern for rule in mixed.rules]


def test_names_that_patterns_could_mistake() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)), nn.Linear(8, 8))
    plan = Policy("w8a16").plan(model)
    schemes = {layer.name: layer.scheme if layer.name == "0" else None for layer in plan}
    policy = policy_from(model, plan, schemes)
    assert [rule.pattern for rule in policy.rules] == [exactly("0")]
    assert {layer.name: layer.scheme for layer in policy.plan(model)} == schemes
