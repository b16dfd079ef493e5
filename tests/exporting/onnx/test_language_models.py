"""Language models: any batch and sequence, padded rows, shared tables, transposed weights."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from torch import nn

from qat_plugin import Policy, convert
from qat_plugin.exporting import Exported, export_model
from tests.exporting.onnx.runtime import run

VOCABULARY = 80


def llama(**changes: Any) -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=64, intermediate_size=96, num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=VOCABULARY, **changes,
    )  # fmt: skip
    torch.manual_seed(0)
    return LlamaForCausalLM(config)


def gpt2() -> nn.Module:
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    config = GPT2Config(
        n_embd=64, n_layer=1, n_head=4, vocab_size=VOCABULARY, n_positions=64, bos_token_id=0, eos_token_id=0
    )
    model = GPT2LMHeadModel(config)
    with torch.no_grad():  # biases are 0 in a fresh one: nothing would notice their absence
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(std=0.1)
    return model


@pytest.fixture(scope="module")
def mixed(tmp_path_factory: pytest.TempPathFactory) -> tuple[nn.Module, Exported]:
    rules = {"embedding": "w4a16-g32-asym", "head": "w4a16-g32-asym", "attention": "w8a8", "ffn": "w4a16-g32"}
    model = convert(llama(tie_word_embeddings=True), Policy(rules)).eval()
    return model, export_model(model, "onnx", tmp_path_factory.mktemp("onnx") / "out", progress=False)


def test_a_mixed_policy_is_exported_layer_by_layer(mixed: tuple[nn.Module, Exported]) -> None:
    _, made = mixed
    assert made.verification is not None
    assert (made.verification.tensors, made.verification.integers, made.verification.scales) == (8, 0, 0)
    file = onnx.load(made.path / "model.onnx")
    kinds = Counter(node.op_type for node in file.graph.node)
    assert (kinds["MatMulInteger"], kinds["MatMulNBits"]) == (4, 4)
    assert not [node for node in file.graph.node if node.metadata_props]  # no lines of the machine that wrote it


def test_what_three_projections_read_is_rounded_once(mixed: tuple[nn.Module, Exported]) -> None:
    file = onnx.load(mixed[1].path / "model.onnx")
    assert Counter(node.op_type for node in file.graph.node)["Round"] == 2  # before q, k and v; before o


def test_a_tied_table_is_in_the_file_once(mixed: tuple[nn.Module, Exported]) -> None:
    file = onnx.load(mixed[1].path / "model.onnx")
    large = [entry.name for entry in file.graph.initializer if VOCABULARY in entry.dims]
    assert sorted(large) == [f"model.embed_tokens.weight.{part}" for part in ("q", "scale", "zero_point")]


@pytest.mark.parametrize(("batch", "length"), [(1, 1), (1, 9), (5, 33)])
def test_batch_and_sequence_are_free(mixed: tuple[nn.Module, Exported], batch: int, length: int) -> None:
    model, made = mixed
    ids = torch.randint(VOCABULARY, (batch, length))
    (found,) = run(made.path, ids, torch.ones_like(ids))
    with torch.no_grad():
        torch.testing.assert_close(found, model(ids).logits, rtol=2e-2, atol=2e-2)


def test_padded_rows_are_masked(mixed: tuple[nn.Module, Exported]) -> None:
    model, made = mixed
    ids, mask = torch.randint(VOCABULARY, (2, 12)), torch.ones(2, 12, dtype=torch.int64)
    mask[1, 8:] = 0
    (found,) = run(made.path, ids, mask)
    with torch.no_grad():
        wanted = model(ids, attention_mask=mask).logits
    torch.testing.assert_close(found[mask.bool()], wanted[mask.bool()], rtol=2e-2, atol=2e-2)


def test_transposed_weights_of_gpt2_are_exported_with_their_biases(tmp_path: Path) -> None:
    rules = {"embedding": "fp16", "head": "fp16", "attention": "w8a8", "ffn": "w4a16-g32"}
    model = convert(gpt2(), Policy(rules)).eval()
    made = export_model(model, "onnx", tmp_path / "out", progress=False)
    assert made.verification is not None and made.verification.tensors == 4
    ids = torch.randint(VOCABULARY, (3, 17))
    (found,) = run(made.path, ids, torch.ones_like(ids))
    with torch.no_grad():
        torch.testing.assert_close(found, model(ids).logits, rtol=2e-2, atol=2e-2)


@pytest.mark.real
def test_a_real_pretrained_model_is_exported(shared_data: Path, tmp_path: Path) -> None:
    from qat_plugin.models.loading import load_causal_lm

    network, tokenizer = load_causal_lm(shared_data / "stories260K", dtype=torch.float32)
    rules = {"embedding": "w8a16", "head": "w8a16", "attention": "w8a16", "ffn": "w4a16-g32"}
    made = export_model(convert(network, Policy(rules)), "onnx", tmp_path / "out", tokenizer=tokenizer, progress=False)
    assert made.verification is not None and made.verification.error is not None
    assert made.verification.error < 1e-5
    assert made.bytes < 2 * sum(p.numel() for p in network.parameters())
