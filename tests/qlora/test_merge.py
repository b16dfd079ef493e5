"""Merging in memory against peft's merge, bitsandbytes' dequantization and float64 products; what survives of it."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from torch import Tensor, nn

pytest.importorskip("peft")
pytest.importorskip("bitsandbytes")
import bitsandbytes

from qat_plugin.conversion import convert
from qat_plugin.errors import CheckpointError, ConfigError, QatError
from qat_plugin.numerics import round_to_nearest
from qat_plugin.qat import is_prepared as is_fake_quantized
from qat_plugin.qlora.layers import lora_layers
from qat_plugin.qlora.merge import check_requantization, merge, survival, survival_table
from qat_plugin.qlora.nf4 import is_nf4
from qat_plugin.qlora.nf4_rows import Nf4Rows
from qat_plugin.qlora.prepare import checkpoint_blocks
from qat_plugin.qlora.survival import mean_cosines
from qat_plugin.qlora.updates import Update, adapter_layers, update_of
from qat_plugin.scheme import Scheme
from tests.qlora.adapters import learned, llama, prepared, with_peft
from tests.qlora.tiny_models import FAMILIES, logits, saved

KINDS = {"lora": {}, "rslora": {"use_rslora": True}, "dora": {"use_dora": True}}
OPTIONS = {"lora": {}, "rslora": {"rslora": True}, "dora": {"dora": True}}


def exact(layer: Any, base: Tensor) -> Tensor:
    """The merged weight in float64, from the formulas and peft's parameters alone; [out, in]."""
    a, b = layer.lora_A["default"].weight.double(), layer.lora_B["default"].weight.double()
    total = base.double() + layer.scaling["default"] * (b @ a)
    if "default" not in layer.lora_magnitude_vector:
        return total
    return layer.lora_magnitude_vector["default"].weight.double()[:, None] * total / total.norm(dim=1, keepdim=True)


def by_bitsandbytes(layer: nn.Module) -> Tensor:
    return bitsandbytes.functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state)


def in_float32(layer: nn.Module) -> Tensor:
    """What bitsandbytes gives when it is not made to round to the type that the weight once had."""
    state = copy.copy(layer.weight.quant_state)
    state.dtype = torch.float32
    return bitsandbytes.functional.dequantize_4bit(layer.weight.data, state)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", ["llama", "qwen2", "gemma3", "gpt2"])
def test_a_float_model_merges_as_peft_merges_it(family: str, kind: str) -> None:
    torch.manual_seed(2)
    targets = ["c_attn", "c_fc", "c_proj"] if family == "gpt2" else ["q_proj", "v_proj", "down_proj"]
    model = with_peft(FAMILIES[family](), target_modules=targets, **KINDS[kind])
    theirs = copy.deepcopy(model).merge_and_unload().state_dict()
    expected = logits(model)
    ours = merge(model.get_base_model())
    assert ours.state_dict().keys() == theirs.keys()
    for name, tensor in ours.state_dict().items():
        torch.testing.assert_close(tensor, theirs[name], rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(logits(ours), expected, rtol=1e-5, atol=1e-5)
    assert not hasattr(ours, "peft_config") and not lora_layers(ours)


@pytest.mark.parametrize("base", ["nf4", "nf4-dq"])
@pytest.mark.parametrize("kind", OPTIONS)
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_an_nf4_base_is_dequantized_and_added_to_exactly(family: str, kind: str, base: str) -> None:
    model = prepared(FAMILIES[family]().eval(), base, **OPTIONS[kind])
    expected = logits(model)
    weights = {
        name: exact(layer, by_bitsandbytes(layer.get_base_layer())) for name, layer in adapter_layers(model).items()
    }
    merged = merge(model)
    for name, weight in weights.items():
        layer = merged.get_submodule(name)
        assert type(layer) is nn.Linear and layer.weight.dtype == torch.float32
        torch.testing.assert_close(layer.weight.double(), weight, rtol=3e-7, atol=1e-8)
    assert not any(is_nf4(module) for module in merged.modules())
    torch.testing.assert_close(logits(merged), expected, rtol=1e-4, atol=1e-5)


def test_plain_lora_on_nf4_is_one_float32_sum_to_the_bit() -> None:
    model = prepared(llama())
    layer = model.model.layers[0].mlp.up_proj
    expected = by_bitsandbytes(layer.get_base_layer()) + layer.get_delta_weight("default")
    assert torch.equal(merge(model).model.layers[0].mlp.up_proj.weight, expected)


def test_nf4_layers_without_an_adapter_become_what_they_computed_with() -> None:
    model = prepared(llama(), targets=["q_proj"])
    other = model.model.layers[1].mlp.gate_proj
    values = by_bitsandbytes(other)
    merged = merge(model).model.layers[1].mlp.gate_proj
    assert type(merged) is nn.Linear
    assert torch.equal(merged.weight, values)


def test_a_bfloat16_base_is_summed_in_float32_and_rounded_once() -> None:
    model = prepared(llama().bfloat16())
    exacts = {name: exact(layer, in_float32(layer.get_base_layer())) for name, layer in adapter_layers(model).items()}
    same, wide = merge(copy.deepcopy(model)), merge(model, dtype=torch.float32)
    assert {p.dtype for p in same.parameters()} == {torch.bfloat16}
    assert {p.dtype for p in wide.parameters()} == {torch.float32}
    for name, weight in exacts.items():
        torch.testing.assert_close(wide.get_submodule(name).weight.double(), weight, rtol=1e-6, atol=1e-7)
        assert torch.equal(same.get_submodule(name).weight, wide.get_submodule(name).weight.bfloat16())
    assert logits(wide).dtype == torch.float32


def test_a_narrow_compute_type_does_not_become_the_type_of_the_weights() -> None:
    model = prepared(llama(), compute_dtype=torch.bfloat16)
    layer = model.model.layers[0].mlp.down_proj
    weight = exact(layer, in_float32(layer.get_base_layer()))
    merged = merge(model)
    assert {p.dtype for p in merged.parameters()} == {torch.float32}
    torch.testing.assert_close(merged.model.layers[0].mlp.down_proj.weight.double(), weight, rtol=1e-6, atol=1e-7)


def test_a_model_that_transformers_quantized_is_saved_as_a_float_model(tmp_path: Path) -> None:
    saved(llama(), tmp_path / "base")
    config = tf.BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32)
    model = tf.AutoModelForCausalLM.from_pretrained(
        tmp_path / "base", quantization_config=config, device_map="cpu", dtype=torch.float32
    )
    model = prepared(model)
    expected = logits(model)
    merge(model).save_pretrained(tmp_path / "merged")
    loaded = tf.AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
    assert not hasattr(loaded.config, "quantization_config")
    torch.testing.assert_close(logits(loaded), expected, rtol=1e-4, atol=1e-5)


def test_torchaos_nf4_merges_too() -> None:
    sizes = {"hidden_size": 128, "intermediate_size": 256, "num_key_value_heads": 4}
    model = prepared(llama(**sizes), backend="torchao")
    expected = logits(model)
    layer = model.model.layers[0].mlp.down_proj
    weight = exact(layer, layer.get_base_layer().weight.get_original_weight())
    merged = merge(model)
    torch.testing.assert_close(merged.model.layers[0].mlp.down_proj.weight.double(), weight, rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(logits(merged), expected, rtol=1e-4, atol=1e-5)


def test_a_fake_quantized_base_merges_to_the_bit_and_converts() -> None:
    model = prepared(llama(), "w4a16-g32")
    expected = logits(model)
    merged = merge(model)
    assert is_fake_quantized(merged) and not lora_layers(merged)
    assert torch.equal(logits(merged), expected)
    torch.testing.assert_close(logits(convert(merged)), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("base", ["nf4-dq", None])
def test_biases_modes_and_frozenness_stay_and_a_layer_used_twice_changes_where_its_adapter_was(
    base: str | None,
) -> None:
    twice = nn.Linear(64, 64)
    network = nn.Sequential(twice, nn.ReLU(), twice, nn.Linear(64, 8).requires_grad_(False))
    model = prepared(network, base, targets=["0"]).train()
    x = torch.randn(3, 64)
    expected = model(x)
    assert not torch.allclose(model[0](x), model[2](x))
    merged = merge(model)
    assert merged[0].bias is merged[2].bias is twice.bias and merged[0].training
    assert {name for name, p in merged.named_parameters() if not p.requires_grad} == {"3.weight", "3.bias"}
    torch.testing.assert_close(merged(x), expected)


@pytest.mark.parametrize("base", ["nf4-dq", "w4a16-g32", None])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradients_and_checkpointing_are_put_back_as_they_were(base: str | None, checkpointing: bool) -> None:
    model = llama(tie_word_embeddings=True)
    model.model.norm.requires_grad_(False)
    if checkpointing:
        checkpoint_blocks(model)
    trained = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    model = merge(prepared(model, base, gradient_checkpointing=True))
    restored = {name: p.requires_grad for name, p in model.named_parameters() if ".fake_quantizer" not in name}
    assert restored == trained and sum(restored.values()) == len(restored) - 1
    blocks = [module.gradient_checkpointing for module in model.modules() if hasattr(module, "gradient_checkpointing")]
    assert any(blocks) == checkpointing


def test_a_fake_quantized_weight_that_another_layer_reads_is_not_changed_in_place() -> None:
    model = llama(tie_word_embeddings=True)
    model = prepared(model, {"head": "w8a16", "embedding": "keep", "*": "keep"}, targets=["lm_head"])
    with pytest.raises(ConfigError, match="lm_head is fake-quantized and shares its weight"):
        merge(model)


def test_a_tied_head_is_untied_and_the_embedding_keeps_its_weight() -> None:
    model = with_peft(llama(tie_word_embeddings=True), target_modules=["lm_head", "q_proj"]).get_base_model()
    embedding, expected = model.model.embed_tokens.weight.clone(), logits(model)
    merged = merge(model)
    assert torch.equal(merged.model.embed_tokens.weight, embedding)
    assert merged.config.tie_word_embeddings is False
    torch.testing.assert_close(logits(merged), expected, rtol=1e-5, atol=1e-6)


def test_a_cast_base_layer_keeps_its_type_or_takes_the_one_asked_for() -> None:
    model = prepared(llama(), "bf16")
    layer = model.model.layers[0].mlp.up_proj
    weight = exact(layer, layer.get_base_layer().weight)
    wide = merge(copy.deepcopy(model), dtype=torch.float32)
    torch.testing.assert_close(wide.model.layers[0].mlp.up_proj.weight.double(), weight, rtol=1e-6, atol=1e-7)
    assert merge(model).model.layers[0].mlp.up_proj.weight.dtype == torch.bfloat16
    torch.testing.assert_close(logits(wide), logits(model), rtol=0.05, atol=0.05)


def test_what_cannot_be_merged_is_refused_before_anything_changes() -> None:
    with pytest.raises(ConfigError, match="has no adapters"):
        merge(llama())
    model = with_peft(llama())
    model.merge_adapter()
    with pytest.raises(ConfigError, match="is merged into its base by peft"):
        merge(model)
    model = prepared(llama())
    update_of(model.model.layers[1].mlp.down_proj).b[0, 0] = torch.inf
    with pytest.raises(CheckpointError, match=r"model\.layers\.1\.mlp\.down_proj holds NaN or infinite"):
        merge(model)
    assert len(lora_layers(model)) == 14
    with pytest.raises(ConfigError, match="another dtype"):
        merge(prepared(llama(), "w4a16-g32"), dtype=torch.bfloat16)


# ---- NF4 some rows at a time


@pytest.mark.parametrize("scheme", ["nf4", "nf4-dq"])
@pytest.mark.parametrize("shape", [(192, 128), (130, 33), (7, 5), (64, 172), (64, 64)])
def test_rows_of_nf4_are_those_of_the_whole(shape: tuple[int, int], scheme: str) -> None:
    weight = torch.randn(shape)
    packed, state = bitsandbytes.functional.quantize_4bit(
        weight, blocksize=64, quant_type="nf4", compress_statistics=scheme == "nf4-dq"
    )
    whole = bitsandbytes.functional.dequantize_4bit(packed, state)
    rows = Nf4Rows(weight, Scheme.parse(scheme), "bitsandbytes")
    assert torch.equal(rows.values(), whole)
    for start in range(0, shape[0], 64):
        assert torch.equal(rows.values(slice(start, start + 64)), whole[start : start + 64])
    assert torch.equal(rows.values(slice(1, 4)), whole[1:4])


# ---- what survives


def pair(ratio: float, shape: tuple[int, int] = (256, 256)) -> tuple[Tensor, Update]:
    """A weight, and an update of rank 16 with ``|D| / |W| = ratio``."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(shape, generator=generator) * 0.02
    a, b = torch.randn(16, shape[1], generator=generator), torch.randn(shape[0], 16, generator=generator)
    return weight, Update(a, b, ratio * float(weight.norm() / (b @ a).norm()))


def through_nf4(weight: Tensor) -> Tensor:
    functional = bitsandbytes.functional
    return functional.dequantize_4bit(*functional.quantize_4bit(weight, quant_type="nf4", compress_statistics=True))


def test_survival_is_the_cosine_in_float64() -> None:
    before, after, delta = torch.randn(3, 40, 50)
    expected = torch.nn.functional.cosine_similarity(
        (after.double() - before.double()).flatten(), delta.double().flatten(), 0
    )
    assert survival(before, after, delta) == pytest.approx(expected.item(), abs=1e-12)
    assert survival(before, before, delta) == 0.0
    assert survival(before, before, torch.zeros_like(delta)) == 1.0
    assert survival(before, after, torch.zeros_like(delta)) == 0.0
    with pytest.raises(QatError, match="one shape"):
        survival(before, after[1:], delta)
    with pytest.raises(QatError, match="NaN or infinite"):
        survival(before, after * torch.nan, delta)


def test_the_table_says_what_each_choice_keeps() -> None:
    weight, update = pair(0.01)
    (row,) = survival_table([("layer", weight, update)], ["w4a16-g32", "w8a16", "nf4-dq", "w4a16-g48"])
    merged, delta = weight + update.delta(), update.delta()
    assert row.size == pytest.approx(0.01, rel=1e-3)
    assert list(row.cosines) == ["original", "nf4-exact", "w4a16-g32", "w8a16", "nf4-dq", "w4a16-g48"]
    assert row.cosines["original"] == pytest.approx(survival(weight, merged.bfloat16(), delta), abs=1e-6)
    scheme = Scheme.parse("w4a16-g32")
    stored = [round_to_nearest(tensor, scheme).dequantize() for tensor in (weight, merged)]
    assert row.cosines["w4a16-g32"] == pytest.approx(survival(*stored, delta), abs=1e-6)
    assert row.cosines["w4a16-g48"] == row.cosines["w4a16-g32"], "48 does not divide: the largest divisor below it does"
    assert row.cosines["original"] > row.cosines["w8a16"] > row.cosines["w4a16-g32"]
    assert mean_cosines([row, row]) == pytest.approx(row.cosines)


def test_requantizing_erases_small_updates_and_keeps_large_ones() -> None:
    kept = []
    for ratio in (0.003, 0.01, 0.03, 0.1, 0.3):
        weight, update = pair(ratio)
        (row,) = survival_table([("layer", weight, update)], ["nf4-dq"])
        kept.append(row.cosines["nf4-dq"])
        assert row.cosines["nf4-exact"] > kept[-1]
        again = [through_nf4(weight)]
        again.append(through_nf4(again[0] + update.delta()))
        assert kept[-1] == pytest.approx(survival(through_nf4(again[0]), again[1], update.delta()), abs=1e-4)
    assert kept == sorted(kept)
    assert kept[1] < 0.05 and kept[2] < 0.1 and kept[-1] > 0.94


def test_requantizing_into_nf4_is_refused_with_the_measured_cosine() -> None:
    layers = [("one", *pair(0.003)), ("two", *pair(0.01))]
    measured = check_requantization("nf4-dq", layers, accept_loss=True)
    assert measured.keys() == {"one", "two"}
    with pytest.raises(ConfigError, match=f"{measured['one']:.3f} at least .one., .*accept_loss=True"):
        check_requantization("nf4-dq", layers)
    with pytest.raises(ConfigError, match="merging into nf4 again"):
        check_requantization("nf4", lambda: iter(layers))
    assert check_requantization("w4a16-g32", layers) == {}


def test_updates_by_rows_are_the_rows_of_the_whole() -> None:
    model = learned(with_peft(llama(), use_dora=True)).get_base_model()
    for layer in adapter_layers(model).values():
        update, weight = update_of(layer), layer.get_base_layer().weight
        whole = update.merged(weight)
        torch.testing.assert_close(whole.double(), exact(layer, weight), rtol=1e-6, atol=1e-7)
        for rows in (slice(0, 16), slice(16, 64)):
            torch.testing.assert_close(update.merged(weight[rows], rows), whole[rows], rtol=1e-6, atol=1e-8)
