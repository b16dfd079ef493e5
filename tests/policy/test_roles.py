"""Roles: what part each layer plays, on the families that users bring."""

from __future__ import annotations

import re

import pytest
import torch
from torch import nn
from torch.nn.utils import prune

from qat_plugin.policy import candidates, clean_name
from tests.policy import zoo


def roles_of(model: nn.Module) -> dict[str, set[str]]:
    return {c.name: set(c.roles) for c in candidates(model)}


def assert_roles(model: nn.Module, expected: dict[str, str]) -> None:
    """``expected``: regular expression -> role, and every Linear, Conv1D and Embedding is matched by one."""
    for name, roles in roles_of(model).items():
        if roles == {"norm"}:
            continue
        matching = [role for pattern, role in expected.items() if re.fullmatch(pattern, name)]
        assert matching, f"{name} was not expected"
        assert roles - {"first", "last"} == {matching[0]} - {"none"}, name


def test_llama() -> None:
    assert_roles(
        zoo.llama(),
        {r"model\.embed_tokens": "embedding", r".*self_attn\.[qkvo]_proj": "attention", r".*mlp\..*_proj": "ffn",
         "lm_head": "head"},
    )  # fmt: skip


def test_gpt2() -> None:
    assert_roles(
        zoo.gpt2(),
        {r"transformer\.w[tp]e": "embedding", r".*attn\.c_(attn|proj)": "attention", r".*mlp\.c_(fc|proj)": "ffn",
         "lm_head": "head"},
    )  # fmt: skip


def test_bert() -> None:
    assert_roles(
        zoo.bert(),
        {r".*_embeddings": "embedding", r".*attention\..*": "attention", r".*(intermediate|output)\.dense": "ffn",
         r"bert\.pooler\.dense": "none", "classifier": "head"},
    )  # fmt: skip


def test_vit() -> None:
    model = zoo.vit()
    roles = roles_of(model)
    attention = [name for name in roles if "attention" in name and "norm" not in name]
    assert attention
    assert all("attention" in roles[name] for name in attention if "layernorm" not in name)
    assert "head" in roles["classifier"]


def test_t5() -> None:
    roles = roles_of(zoo.t5())
    assert roles["shared"] == {"embedding"}
    assert "head" in roles["lm_head"]
    assert "attention" in roles["encoder.block.0.layer.0.SelfAttention.q"]
    assert "ffn" in roles["encoder.block.0.layer.1.DenseReluDense.wi"]


def test_a_plain_stack_has_a_first_and_a_last_layer() -> None:
    assert roles_of(zoo.mlp()) == {"0": {"first"}, "2": set(), "4": {"last"}}


@pytest.mark.parametrize(
    ("path", "clean"),
    [
        ("_orig_mod.model.layers.0.mlp.up_proj", "model.layers.0.mlp.up_proj"),
        ("module.model.layers.0._orig_mod.mlp.up_proj", "model.layers.0.mlp.up_proj"),
        ("_fsdp_wrapped_module.model.layers.0._fsdp_wrapped_module.mlp", "model.layers.0.mlp"),
        ("base_model.model.model.layers.0.self_attn.q_proj.base_layer", "model.layers.0.self_attn.q_proj"),
        ("module._orig_mod.base_model.model.lm_head", "lm_head"),
        ("model.lm_head", "model.lm_head"),
        ("", ""),
    ],
)
def test_names_lose_their_wrappers(path: str, clean: str) -> None:
    assert clean_name(path) == clean


def test_a_compiled_child_keeps_its_name() -> None:
    model = zoo.mlp()
    model[2] = torch.compile(model[2], backend="eager")
    assert [c.name for c in candidates(model)] == ["0", "2", "4"]


def test_names_that_would_collide_without_wrappers_keep_them() -> None:
    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(4, 4)
            self.module = nn.Sequential()
            self.module.fc = nn.Linear(4, 4)

    assert sorted(c.name for c in candidates(Both())) == ["fc", "module.fc"]


def test_layers_without_a_kernel_are_listed_with_the_reason() -> None:
    model = nn.ModuleDict(
        {
            "conv": nn.Conv3d(3, 4, 3),
            "lstm": nn.LSTM(4, 4),
            "mha": nn.MultiheadAttention(8, 2),
            "bag": nn.EmbeddingBag(4, 4),
        }
    )
    blocked = {c.name: c.blocked for c in candidates(model)}
    assert set(blocked) == {"conv", "lstm", "mha", "mha.out_proj", "bag"}
    assert all(blocked.values())


def test_adapters_of_peft_stay_in_full_precision() -> None:
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(zoo.llama(), peft.LoraConfig(target_modules=["q_proj"], r=4))
    found = {c.name: c for c in candidates(model)}
    assert found["model.layers.0.self_attn.q_proj"].blocked == ""
    adapters = [c for name, c in found.items() if "lora_" in name]
    assert len(adapters) == 2 * 3
    assert all("adapter" in c.blocked for c in adapters)


def test_weights_that_are_integers_already_say_so() -> None:
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    model = nn.Sequential(nn.Linear(64, 64))
    quantize_(model, Int8WeightOnlyConfig())
    (candidate,) = candidates(model)
    assert "already quantized" in candidate.blocked


def test_pruned_and_lazy_layers_say_why_they_stay() -> None:
    pruned = nn.Linear(8, 8)
    prune.l1_unstructured(pruned, "weight", 0.5)
    blocked = {c.name: c.blocked for c in candidates(nn.ModuleDict({"pruned": pruned, "lazy": nn.LazyLinear(4)}))}
    assert "pruning" in blocked["pruned"]
    assert "run one batch" in blocked["lazy"]
