"""What ``prepare`` makes of a model: peft's own forward and gradients, folded QAT + LoRA, refusals that name things."""

from __future__ import annotations

import copy
import io
import re
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

pytest.importorskip("peft")
pytest.importorskip("bitsandbytes")

import qat_plugin
from qat_plugin.errors import ConfigError, PrepareError
from qat_plugin.qlora import is_prepared, lora_layers, merge, prepare, prepared_of, summary
from qat_plugin.qlora.nf4 import is_nf4
from tests.qat.arithmetic import grid
from tests.qlora.adapters import learned, llama, with_peft
from tests.qlora.tiny_models import FAMILIES, logits

IDS = torch.arange(24).reshape(2, 12) * 7 % 64
BASES = ["nf4-dq", None, "w4a16-g32"]
SMALL = {"rank": 4, "alpha": 8}
KINDS: dict[str, Any] = {
    "lora": ({}, {}), "rslora": ({"rslora": True}, {"use_rslora": True}), "dora": ({"dora": True}, {"use_dora": True}),
    "dropout": ({"dropout": 0.3}, {"lora_dropout": 0.3}),
}  # fmt: skip


def gradients(model: Any) -> dict[str, Tensor]:
    """Of every trained parameter after one backward pass, by peft's names inside its wrapper."""
    model.zero_grad()
    torch.manual_seed(5)  # of dropout
    model(input_ids=IDS, labels=IDS, use_cache=False).loss.backward()
    found = {n.removeprefix("base_model.model."): p.grad for n, p in model.named_parameters() if p.requires_grad}
    assert all(gradient is not None for gradient in found.values())
    return found


@pytest.mark.parametrize("base", BASES)
def test_every_adapter_has_the_same_gradient_after_an_evaluation(base: str | None) -> None:
    """bitsandbytes repacks NF4 weights in an eval forward on CPUs with AVX512-BF16, and gradients vanish."""
    model = learned(prepare(llama(), base, **SMALL)).train()
    assert all((".lora_" in name) == p.requires_grad for name, p in model.named_parameters())
    before = {name: gradient.clone() for name, gradient in gradients(model).items()}
    model.eval()
    logits(model)
    model.train()
    after = gradients(model)
    assert len(after) == 2 * 14
    assert all(bool(after[name].any()) and torch.equal(after[name], before[name]) for name in after)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", ["llama-biased", "gpt2"])
def test_logits_and_gradients_are_those_of_peft(family: str, kind: str) -> None:
    ours, theirs = KINDS[kind]
    float_model = FAMILIES[family]()
    targets = ["c_attn", "c_fc"] if family == "gpt2" else ["q_proj", "down_proj"]
    reference = with_peft(copy.deepcopy(float_model), target_modules=targets, **theirs)
    model = learned(prepare(float_model, None, targets=targets, **SMALL, **ours))
    expected = reference.get_base_model().state_dict()
    assert model.state_dict().keys() == expected.keys()
    model.load_state_dict(expected)
    torch.testing.assert_close(logits(model), logits(reference), rtol=1e-5, atol=1e-5)
    if family == "llama-biased":  # GPT-2 has dropout of its own
        model.train(), reference.train()
    found, wanted = gradients(model), gradients(reference)
    assert found.keys() == wanted.keys()
    for name, gradient in found.items():
        torch.testing.assert_close(gradient, wanted[name], rtol=1e-4, atol=1e-6, msg=name)


@pytest.mark.parametrize(
    ("targets", "expected"),
    [
        (["q_proj", "v_proj"], r"\.(q|v)_proj$"),
        ("model.layers.1.mlp.*", r"layers\.1\.mlp"),
        ("re:.*[kv]_proj", r"\.(k|v)_proj$"),
        ("ffn", r"\.mlp\."),
        (["lm_head", "re:.*0.*o_proj"], r"lm_head|layers\.0.*o_proj"),
        ("all-linear", r"_proj$"),
    ],
)
def test_targets_choose_layers_by_name_glob_expression_and_role(targets: Any, expected: str) -> None:
    model = llama()
    linears = {name for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    assert set(lora_layers(prepare(model, targets=targets, **SMALL))) == {n for n in linears if re.search(expected, n)}


def test_gaussian_adapters_start_at_zero_update_with_the_spread_of_one_over_rank() -> None:
    for layer in lora_layers(prepare(llama(), rank=8, init="gaussian")).values():
        a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
        assert not b.any()
        assert a.std().item() == pytest.approx(1 / 8, rel=0.15)
        assert a.abs().max() > 2 / a.shape[1] ** 0.5  # the usual start is uniform within 1 / sqrt(in)


def test_only_what_the_policy_names_becomes_nf4() -> None:
    model = llama().bfloat16()
    before = dict(model.named_parameters())
    prepare(model, {"ffn": "nf4", "*": "keep"}, targets="attention", **SMALL)
    assert {n for n, m in model.named_modules() if is_nf4(m)} == {
        f"model.layers.{i}.mlp.{kind}_proj" for i in range(2) for kind in ("gate", "up", "down")
    }
    for kept in ("model.embed_tokens", "lm_head", "model.norm", "model.layers.0.self_attn.q_proj.base_layer"):
        weight = model.get_submodule(kept).weight
        assert weight is before[f"{kept.removesuffix('.base_layer')}.weight"] and weight.dtype == torch.bfloat16


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_adapters_keep_their_type_and_values_when_the_model_is_cast(dtype: torch.dtype) -> None:
    model = learned(prepare(llama(), dora=True, **SMALL))
    before = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
    model.to(dtype)
    after = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert model.model.norm.weight.dtype == dtype
    assert before.keys() == after.keys() and len(before) == 3 * 14
    assert all(after[name].dtype == torch.float32 and torch.equal(after[name], before[name]) for name in before)


def test_a_part_trains_in_full_beside_the_adapters() -> None:
    model = prepare(llama(), train_also=["lm_head", "embed_tokens"], **SMALL)
    whole = {name for name, p in model.named_parameters() if p.requires_grad and ".lora_" not in name}
    assert whole == {"lm_head.weight", "model.embed_tokens.weight"}
    assert bool(gradients(model)["lm_head.weight"].any())


# ---- QAT + LoRA


@pytest.mark.parametrize("scheme", ["w4a16-g32", "w8a16", "w4a16-g32-asym"])
def test_a_folded_layer_computes_with_the_rounded_sum_of_weight_and_update(scheme: str) -> None:
    model = nn.Sequential(nn.Linear(64, 48))
    weight, bias = model[0].weight.detach().clone(), model[0].bias.detach().clone()
    learned(prepare(model, {"0": scheme}, targets="0", **SMALL))
    (layer,) = lora_layers(model).values()
    update = layer.lora_B["default"].weight @ layer.lora_A["default"].weight
    total = weight + update * 2.0
    expected = grid(total, scheme)
    rounded, half = torch.from_numpy(expected.weight), 0.5001 * torch.from_numpy(expected.scale).abs()
    x = torch.randn(5, 64, requires_grad=True)
    out, upstream = model(x), torch.randn(5, 48)
    torch.testing.assert_close(out.double(), F.linear(x.double(), rounded, bias.double()), rtol=1e-5, atol=1e-5)
    out.backward(upstream)
    passed = (rounded - total).abs() <= half  # rounding passes gradients through, clipping does not
    straight = 2.0 * layer.lora_B["default"].weight.t() @ (upstream.t() @ x * passed)
    torch.testing.assert_close(layer.lora_A["default"].weight.grad, straight, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_folded_model_merges_to_the_bit_after_training(family: str) -> None:
    model = prepare(FAMILIES[family](), "w4a16-g32", **SMALL)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    start = logits(model.eval())
    for _ in range(3):
        gradients(model.train())
        optimizer.step()
    trained = logits(model.eval())
    assert not torch.equal(trained, start)
    assert torch.equal(logits(merge(model)), trained)


# ---- copies


def saved_and_loaded(model: nn.Module) -> Any:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("again", [copy.deepcopy, saved_and_loaded])
@pytest.mark.parametrize("base", BASES)
def test_a_copy_is_whole_and_its_own(base: str | None, again: Any) -> None:
    model = learned(prepare(llama(), base, neftune_alpha=5, gradient_checkpointing=False, **SMALL))
    expected = logits(model)
    other = again(model)
    assert torch.equal(logits(other), expected)
    assert prepared_of(other) == prepared_of(model) and prepared_of(other) is not prepared_of(model)
    learned(other.to(torch.bfloat16), seed=9)
    assert {p.dtype for p in other.parameters() if p.requires_grad} == {torch.float32}
    assert not torch.equal(logits(other).float(), expected)
    assert torch.equal(logits(model), expected)


@pytest.mark.parametrize("base", [None, "w4a16-g32"])
def test_a_state_dict_goes_into_another_model_of_the_kind(base: str | None) -> None:
    model = learned(prepare(llama(), base, **SMALL))
    other = prepare(llama(), base, **SMALL).eval()
    assert not torch.equal(logits(other), logits(model))
    other.load_state_dict(model.state_dict())
    assert torch.equal(logits(other), logits(model))


def test_the_summary_counts_what_trains() -> None:
    model = prepare(llama(), **SMALL)
    count, line = sum(p.numel() for p in model.parameters() if p.requires_grad), summary(model)
    assert f"training {count:,} of " in line
    assert "14 x nf4-dq" in line and "2 kept" in line and "\n" not in line
    everything = count + sum(p.numel() for p in llama().parameters())
    assert f"of {everything:,} parameters ({100 * count / everything:.2f}%)" in line


# ---- refusals


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"targets": "q_porj"}, r"'q_porj' matches no linear layer of Llama.* Did you mean 'q_proj'.*roles: .*ffn"),
        ({"targets": ["q_proj", "re:.*qq"]}, r"'re:\.\*qq' matches no linear layer .*q_proj, k_proj"),
        ({"rank": 0}, "rank=0 is not allowed"),
        ({"rank": 2.5}, "rank=2.5 is not allowed"),
        ({"alpha": -1}, "alpha=-1 is not allowed"),
        ({"dropout": 1.5}, "dropout=1.5 is not allowed"),
        ({"dropout": -0.1}, "dropout=-0.1 is not allowed"),
        ({"backend": "x"}, "backend='x' is not one of bitsandbytes, torchao"),
        ({"base": "w4a16-g32", "dropout": 0.1}, r"dropout=0.1 .*layers\.0.* use dropout=0"),
        ({"base": "w8a8", "dora": True}, r"dora=True does not go with a fake-quantized base .*layers\.0"),
        ({"base": "nf4", "init": "pissa"}, "init='pissa' does not go with a quantized base: PiSSA"),
        ({"train_also": ["score"]}, "train_also: 'score' matches no layer of LlamaForCausalLM"),
        ({"train_also": ["q_proj"]}, r"'q_proj' matches model\.layers\.0.*, which becomes NF4 and cannot train"),
        ({"alpha": float("inf")}, "alpha=inf is not allowed"),
        ({"neftune_alpha": -1}, "neftune_alpha=-1 is not allowed"),
        ({"adapter_dtype": torch.int8}, "adapter_dtype=torch.int8 is no float type"),
    ],
)
def test_a_wrong_option_is_refused_and_the_model_is_as_before(options: dict[str, Any], message: str) -> None:
    model = llama()
    before = {name: (id(p), p.requires_grad) for name, p in model.named_parameters()}
    with pytest.raises(ConfigError, match=message):
        prepare(model, **{"rank": 4, **options})
    assert {name: (id(p), p.requires_grad) for name, p in model.named_parameters()} == before
    assert not is_prepared(model) and not model.training


def test_a_model_that_cannot_be_prepared_is_refused() -> None:
    with pytest.raises(PrepareError, match="LlamaForCausalLM has adapters already"):
        prepare(prepare(llama()))
    with pytest.raises(PrepareError, match="0: it is already quantized"):
        prepare(qat_plugin.convert(nn.Sequential(nn.Linear(64, 64)), "w8a8"))
    with pytest.raises(ConfigError, match="a single Linear: wrap it, as in nn.Sequential"):
        prepare(nn.Linear(64, 64), None)
    with torch.device("meta"):
        empty = nn.Sequential(nn.Linear(64, 64))
    with pytest.raises(PrepareError, match="Sequential is on the meta device"):
        prepare(empty)
    with pytest.raises(ConfigError, match="Sequential has no linear layer"):
        prepare(nn.Sequential(nn.Embedding(4, 8), nn.Conv2d(1, 1, 1)), None)


def test_what_is_no_module_is_refused() -> None:
    with pytest.raises(PrepareError, match="takes a module with its weights, not the class Linear: build or load"):
        prepare(nn.Linear)  # type: ignore[arg-type]


def test_the_summary_counts_a_fake_quantized_base_as_it_is_in_training() -> None:
    model = nn.Sequential(nn.Linear(64, 64, bias=False), nn.Linear(64, 64, bias=False))
    assert "base 32.0 KiB in training, 4.5 KiB converted" in summary(prepare(model, "w4a16-g32", rank=4))
