"""Plans: sizes that are true, ties, group sizes that do not divide, a table that hides nothing."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from torch import nn

from qat_plugin import Plan, Policy, convert, native
from qat_plugin.errors import PolicyError
from qat_plugin.measure import model_bytes
from qat_plugin.policy import largest_divisor
from tests.policy import zoo


@pytest.mark.parametrize(
    ("number", "limit", "divisor"), [(172, 32, 4), (256, 32, 32), (7, 32, 7), (13, 5, 1), (96, 64, 48)]
)
def test_largest_divisor(number: int, limit: int, divisor: int) -> None:
    assert largest_divisor(number, limit) == divisor


def test_a_group_that_does_not_divide_takes_a_divisor_and_says_so() -> None:
    layer = Policy("w4a16-g32").plan(zoo.llama())["model.layers.0.mlp.down_proj"]
    assert str(layer.scheme) == "w4a16-g4"
    assert "g32 does not divide in_features 172" in layer.reason


def test_or_the_layer_is_kept() -> None:
    layer = Policy("w4a16-g32", indivisible="keep").plan(zoo.llama())["model.layers.0.mlp.down_proj"]
    assert layer.scheme is None
    assert "172" in layer.reason


def test_or_it_is_an_error_that_names_layer_and_numbers() -> None:
    with pytest.raises(PolicyError, match=r"layers\.0\.mlp\.down_proj.*g32.*172"):
        Policy("w4a16-g32", indivisible="error").plan(zoo.llama())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "policy",
    [
        "w8a8", "w8a16", "w4a16-g32", "w4a8-g32-asym", "w3a16-g4",
        {"embedding": "fp16", "attention": "w8a8", "ffn": "w4a16-g4"},
        {"embedding": "w8a16", "default": "w8a8"},
        {"embedding": "w4a16-g32", "head": "w8a8", "attention": "w8a16"},
    ],
)  # fmt: skip
def test_the_bytes_it_promises_are_the_bytes_there_are(policy: object, dtype: torch.dtype) -> None:
    model = zoo.llama().to(dtype)
    plan = Policy.coerce(policy).plan(model)  # type: ignore[arg-type]
    rest = model_bytes(model) - plan.bytes_before
    convert(model, plan)
    assert model_bytes(model) == plan.bytes_after + rest


def test_tied_layers_follow_the_side_that_a_rule_names() -> None:
    model = zoo.llama()
    plan = Policy({"embedding": "w8a16"}).plan(model)
    head = plan["lm_head"]
    assert str(head.scheme) == "w8a16"
    assert head.tied_to == "model.embed_tokens"
    assert "follows model.embed_tokens" in head.reason
    assert head.bytes_after == 0
    convert(model, plan)
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_untying_is_priced() -> None:
    model = zoo.llama()
    plan = Policy({"embedding": "fp16"}, keep=["lm_head"]).plan(model)
    assert plan["lm_head"].untied_bytes == 256 * 64 * 4
    assert "untied by conversion: +64.0 KiB" in plan["lm_head"].remark
    convert(model, plan)
    assert model.lm_head.weight is not model.model.embed_tokens.weight


def test_an_embedding_has_no_activation() -> None:
    layer = Policy({"embedding": "w8a8", "default": "w8a8"}).plan(zoo.gpt2())["transformer.wpe"]
    assert str(layer.scheme) == "w8a16"
    assert "no activation" in layer.reason


def test_a_cast_that_would_add_nothing_is_not_made() -> None:
    plan = Policy({"embedding": "fp32", "attention": "bf16", "ffn": "fp16"}).plan(zoo.llama().bfloat16())
    assert "would add nothing" in plan["model.embed_tokens"].reason
    assert "would add nothing" in plan["model.layers.0.self_attn.q_proj"].reason
    assert str(plan["model.layers.0.mlp.up_proj"].scheme) == "fp16"


def test_what_no_kernel_runs_is_said_in_the_plan() -> None:
    plan = Policy({"ffn": "nf4-dq", "attention": "w2a16-g32"}).plan(zoo.llama())
    assert plan["model.layers.0.mlp.up_proj"].kernel == "none"
    assert "QLoRA" in plan["model.layers.0.mlp.up_proj"].note
    assert "reference kernel" in plan["model.layers.0.self_attn.q_proj"].note


def test_why_a_fast_kernel_is_missed_is_said() -> None:
    model = nn.Sequential(nn.Linear(64, 64))
    with native.native_disabled():
        assert "needs a bf16 model" in Policy("w4a16-g32").plan(model)["0"].note
        layer = Policy("w4a16-g32").plan(model, dtype=torch.bfloat16)["0"]
    assert layer.kernel in ("aten-int4", "dequantize")
    assert "needs a bf16 model" not in layer.note


def test_the_table_shows_every_layer_scheme_and_reason() -> None:
    plan = Policy("w4a16-g32", keep=["layers.1.mlp"]).plan(zoo.llama())
    whole = plan.table(collapse=False)
    for layer in plan:
        line = next(line for line in whole.splitlines() if line.startswith(layer.name + " "))
        assert str(layer.scheme or "kept") in line
        assert layer.reason in line
    folded = str(plan)
    assert "model.layers.{0..2}.self_attn.q_proj" in folded
    assert "model.layers.{0,2}.mlp.up_proj" in folded
    assert len(folded.splitlines()) < len(whole.splitlines())


def test_it_saves_as_plain_lists() -> None:
    plan = Policy({"embedding": "fp16", "attention": "w8a8", "ffn": "w4a16-g32"}).plan(zoo.llama())
    assert Plan.from_list(json.loads(json.dumps(plan.to_list())), plan.model) == plan
    with pytest.raises(PolicyError, match="not a saved plan"):
        Plan.from_list([{"name": "x"}])


def test_planning_touches_no_weight_and_works_on_meta() -> None:
    model = zoo.llama()
    before = copy.deepcopy(model.state_dict())
    plan = Policy("w4a16-g32").plan(model)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    with torch.device("meta"):
        same = zoo.llama()
    assert Policy("w4a16-g32").plan(same, device="cpu") == plan


def test_a_70b_model_is_planned_from_its_config_alone() -> None:
    with torch.device("meta"):
        model = zoo.llama(
            hidden_size=8192, intermediate_size=28672, num_hidden_layers=80, num_attention_heads=64,
            num_key_value_heads=8, vocab_size=128_256, tie_word_embeddings=False,
        ).to(torch.bfloat16)  # fmt: skip
    plan = Policy("w4a16-g32").plan(model, device="cpu")
    assert len(plan.quantized) == 560
    assert 36e9 < plan.bytes_after - sum(layer.bytes_after for layer in plan.kept) < 44e9
    assert len(str(plan).splitlines()) < 15
