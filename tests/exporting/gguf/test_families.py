"""Every architecture: written, and read back by transformers with equal logits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from qat_plugin import Policy, convert
from qat_plugin.errors import ExportError
from qat_plugin.exporting import export_model
from qat_plugin.exporting.verification import Verification
from tests.exporting.gguf.families import LLAMA3, YARN, network

MIXED = Policy({"embedding": "fp16", "head": "fp16", "attention": "w8a8", "ffn": "w4a16-g32"})
LINEAR = {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}
GEMMA3_ROPE = {
    "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
    "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
}
CASES: list[tuple[str, dict[str, Any]]] = [
    ("Llama", {}),
    ("Llama", {"attention_bias": True, "mlp_bias": True, "num_hidden_layers": 1}),
    ("Llama", {"tie_word_embeddings": True, "head_dim": 32}),
    ("Llama", {"rope_parameters": LLAMA3}),
    ("Llama", {"rope_parameters": LINEAR}),
    ("Mistral", {"sliding_window": None}),
    ("Qwen2", {"tie_word_embeddings": True, "rope_parameters": {**YARN, "attention_factor": 1.3}}),
    ("Qwen3", {}),
    ("Gemma2", {}),
    ("Gemma3Text", {"num_hidden_layers": 7, "rope_parameters": GEMMA3_ROPE}),
]


def exported(model: Any, path: Path, **options: Any) -> Verification:
    verification = export_model(model, "gguf", path, options=options).verification
    assert verification is not None
    return verification


@pytest.mark.parametrize(
    ("kind", "changes"), CASES, ids=lambda value: value if isinstance(value, str) else "-".join(value)
)
def test_transformers_computes_the_same_from_the_file(kind: str, changes: dict[str, Any], tmp_path: Path) -> None:
    model = convert(network(kind, **changes), MIXED)
    found = exported(model, tmp_path / "model")
    assert (found.integers, found.scales, found.rounded) == (0, 0, 0)
    assert found.tensors == 7 * model.config.num_hidden_layers
    assert found.error is not None and found.error < 1e-6


def test_gemma_1_is_written_though_transformers_does_not_read_it(tmp_path: Path) -> None:
    found = exported(convert(network("Gemma"), MIXED), tmp_path / "model")
    assert found.integers == 0 and found.error is None and "does not read GGUF files of gemma" in str(found)


def test_a_window_that_the_file_cannot_say_is_noted(tmp_path: Path) -> None:
    found = exported(convert(network("Mistral", sliding_window=16, num_hidden_layers=1), MIXED), tmp_path / "model",
                     outputs=False)  # fmt: skip
    assert "a window of 16 tokens" in str(found)


def test_what_an_architecture_does_not_compute_is_refused(tmp_path: Path) -> None:
    import transformers

    yarn = {**YARN, "beta_fast": 16.0}
    for changes, message in (
        ({"hidden_act": "relu"}, "with silu; this model has 'relu'"),
        ({"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}}, "rope_type 'dynamic'"),
        ({"rope_parameters": yarn}, r"beta_fast=16.0 \(llama.cpp computes with 32\)"),
    ):
        model = convert(network("Llama", num_hidden_layers=1, **changes), MIXED)
        with pytest.raises(ExportError, match=message):
            exported(model, tmp_path / "model")
    with pytest.raises(ExportError, match="no place for query_pre_attn_scalar=16"):
        exported(convert(network("Gemma2", query_pre_attn_scalar=16), MIXED), tmp_path / "model")
    with pytest.raises(ExportError, match="no place for .*q_proj.bias"):
        exported(convert(network("Qwen3", attention_bias=True), MIXED), tmp_path / "model")
    gpt = transformers.GPT2LMHeadModel(transformers.GPT2Config(n_embd=64, n_layer=1, n_head=2, vocab_size=64))
    with pytest.raises(ExportError, match="GPT2LMHeadModel.*known are language models of llama, mistral, qwen2"):
        exported(convert(gpt, "w8a16"), tmp_path / "model")
    assert list(tmp_path.iterdir()) == []
