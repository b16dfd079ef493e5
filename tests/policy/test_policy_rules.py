"""Rules: which pattern decides a layer, and what is said when one decides nothing."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from qat_plugin import Policy
from qat_plugin.errors import PolicyError, SchemeError
from tests.policy import zoo


def schemes(policy: Policy, model: nn.Module) -> dict[str, str]:
    return {layer.name: str(layer.scheme) for layer in policy.plan(model)}


def test_one_scheme_is_for_every_linear_layer_but_embeddings_and_head() -> None:
    plan = Policy("w8a8").plan(zoo.llama())
    assert {layer.name for layer in plan.kept} == {"model.embed_tokens", "lm_head"}
    assert all("no rule names it" in layer.reason for layer in plan.kept)
    assert {str(layer.scheme) for layer in plan.quantized} == {"w8a8"}


def test_a_plain_stack_is_quantized_whole() -> None:
    assert schemes(Policy("w8a8"), zoo.mlp()) == {"0": "w8a8", "2": "w8a8", "4": "w8a8"}


def test_the_signature_policy() -> None:
    policy = Policy({"embedding": "fp16", "attention": "w8a8", "ffn": "w4a16-g4"}, keep=["lm_head"])
    found = schemes(policy, zoo.llama())
    assert found["model.embed_tokens"] == "fp16"
    assert found["model.layers.1.self_attn.k_proj"] == "w8a8"
    assert found["model.layers.2.mlp.down_proj"] == "w4a16-g4"
    assert found["lm_head"] == "None"


@pytest.mark.parametrize(
    ("pattern", "hits"),
    [
        ("attention", 12),
        ("first", 1),
        ("last", 1),
        ("*.q_proj", 3),
        ("q_proj", 3),
        ("layers.0", 7),
        ("model.layers.[01].mlp.*", 6),
        ("re:.*(q|k)_proj", 6),
        ("re:model\\.layers\\.0\\.", 7),
        ("type:Linear", 22),
        ("type:torch.nn.Linear", 22),
        ("type:Embedding", 1),
    ],
)
def test_patterns(pattern: str, hits: int) -> None:
    plan = Policy({pattern: "w8a16"}).plan(zoo.llama(tie_word_embeddings=False))
    assert sum(layer.rule == pattern for layer in plan) == hits


def test_a_class_of_the_users_own_matches_by_its_bases_too() -> None:
    class Mine(nn.Linear): ...

    model = nn.Sequential(Mine(8, 8), nn.Linear(8, 8))
    assert schemes(Policy({"type:Mine": "w8a8", "type:Linear": "w8a16"}), model) == {"0": "w8a8", "1": "w8a16"}


def test_the_first_rule_that_matches_wins_and_keep_comes_first() -> None:
    policy = Policy({"*.q_proj": "w8a16", "attention": "w8a8"}, keep=["layers.0"])
    found = schemes(policy, zoo.llama())
    assert found["model.layers.0.self_attn.q_proj"] == "None"
    assert found["model.layers.1.self_attn.q_proj"] == "w8a16"
    assert found["model.layers.1.self_attn.v_proj"] == "w8a8"


def test_none_and_keep_both_keep() -> None:
    found = schemes(Policy({"first": None, "last": "keep", "default": "w8a8"}), zoo.mlp())
    assert found == {"0": "None", "2": "w8a8", "4": "None"}


def test_names_inside_a_compiled_model_are_matched_without_wrappers() -> None:
    model = zoo.mlp()
    model[2] = torch.compile(model[2], backend="eager")
    assert schemes(Policy({"2": "w8a8"}), torch.compile(model, backend="eager"))["2"] == "w8a8"


def test_an_unmatched_rule_lists_what_there_is_and_the_closest() -> None:
    with pytest.raises(PolicyError) as caught:
        Policy({"atention": "w8a8"}).plan(zoo.llama())
    text = str(caught.value)
    assert "'atention' matched no module of LlamaForCausalLM" in text
    assert "Did you mean 'attention'" in text
    assert "model.layers.0.self_attn.q_proj" in text
    assert "embedding, attention, ffn, head, norm, first, last" in text


def test_a_rule_that_earlier_rules_leave_nothing_is_an_error_too() -> None:
    with pytest.raises(PolicyError, match=r"'\*\.q_proj' decides no layer.*earlier rule \(attention\)"):
        Policy({"attention": "w8a8", "*.q_proj": "w8a16"}).plan(zoo.llama())


def test_an_unmatched_keep_is_an_error() -> None:
    with pytest.raises(PolicyError, match="'lm_haed' matched no module.*Did you mean 'lm_head'"):
        Policy("w8a8", keep=["lm_haed"]).plan(zoo.llama())


@pytest.mark.parametrize(
    ("arguments", "error", "text"),
    [
        ({"rules": "w5a8"}, SchemeError, "5-bit"),
        ({"rules": "int4"}, SchemeError, "unknown scheme 'int4'"),
        ({"rules": {"re:(": "w8a8"}}, PolicyError, "not a valid regular expression"),
        ({"rules": {"": "w8a8"}}, PolicyError, "pattern"),
        ({"rules": 3}, PolicyError, "not int"),
        ({"rules": "w8a8", "default": "w8a16"}, PolicyError, "not both"),
        ({"rules": "w8a8", "indivisible": "round"}, PolicyError, "divisor, keep, error"),
    ],
)
def test_malformed_policies(arguments: dict[str, Any], error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=text):
        Policy(**arguments)


def test_a_norm_may_be_cast_but_not_quantized() -> None:
    plan = Policy({"norm": "bf16"}).plan(zoo.llama())
    assert {str(layer.scheme) for layer in plan if "norm" in layer.roles} == {"bf16"}
    with pytest.raises(PolicyError, match="normalisation layers are not quantized"):
        Policy({"norm": "w8a8"}).plan(zoo.llama())


def test_a_model_with_nothing_to_quantize() -> None:
    with pytest.raises(PolicyError, match="no Linear, Conv1d, Conv2d, Conv1D or Embedding"):
        Policy("w8a8").plan(nn.Sequential(nn.ReLU(), nn.ConvTranspose2d(3, 3, 3)))


def convolutional() -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv1d(8, 8, 3), nn.Flatten(), nn.Linear(8, 4))


def test_one_static_scheme_is_for_convolutions_and_linears() -> None:
    plan = Policy("w8a8-static").plan(convolutional())
    assert [(layer.name, layer.shape, layer.usage) for layer in plan.quantized] == [
        ("0", (8, 27), "conv"), ("2", (8, 24), "conv"), ("4", (4, 8), "linear"),
    ]  # fmt: skip


@pytest.mark.parametrize("scheme", ["w8a8", "w4a16-g32", "w8a16", "w8a8-static-g4", "w8a8-static-asym"])
def test_other_schemes_leave_convolutions_and_say_what_works(scheme: str) -> None:
    plan = Policy(scheme).plan(convolutional())
    assert [layer.name for layer in plan.quantized] == ["4"]
    assert all("w8a8-static" in layer.reason for layer in plan.kept)
    assert [layer.name for layer in Policy({"*": scheme}).plan(convolutional()).quantized] == ["4"]


@pytest.mark.parametrize("pattern", ["type:Conv2d", "0", "first"])
def test_a_rule_that_names_convolutions_alone_is_told_what_they_take(pattern: str) -> None:
    with pytest.raises(PolicyError, match=r"gives w4a16-g32 to 0 \(Conv2d\): convolutions run as w8a8-static"):
        Policy({pattern: "w4a16-g32"}).plan(convolutional())
    assert Policy({pattern: "bf16"}).plan(convolutional()).quantized[0].kernel == "cast"


def test_convolutions_without_a_kernel_are_listed_with_the_reason() -> None:
    model = nn.ModuleDict({"up": nn.ConvTranspose2d(3, 3, 3), "video": nn.Conv3d(3, 3, 3), "image": nn.Conv2d(3, 3, 3)})
    plan = Policy("w8a8-static").plan(model)
    assert [layer.name for layer in plan.quantized] == ["image"]
    assert "transposed" in plan["up"].reason and "three-dimensional" in plan["video"].reason
