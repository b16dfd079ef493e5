"""A pretrained model with its own tokenizer, written, read back and run."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from qat_plugin import Policy, convert
from qat_plugin.errors import ExportError
from qat_plugin.exporting import export_model
from qat_plugin.models.loading import load_causal_lm

pytestmark = pytest.mark.real
MIXED = Policy({"embedding": "fp16", "attention": "w8a8", "ffn": "w4a16-g32"})


def test_a_pretrained_model_keeps_its_integers(shared_data: Path, tmp_path: Path) -> None:
    model, tokenizer = load_causal_lm(shared_data / "stories260K", dtype=torch.float32)
    model = convert(model, MIXED)
    with pytest.raises(ExportError, match="rows of 172 weights are not whole blocks of 32"):
        export_model(model, "gguf", tmp_path / "model", tokenizer=tokenizer)
    made = export_model(model, "gguf", tmp_path / "model", tokenizer=tokenizer, options={"indivisible": "float"})
    found = made.verification
    assert found is not None and (found.tensors, found.integers, found.scales, found.rounded) == (30, 0, 0, 0)
    assert found.error is not None and found.error < 1e-6
    assert made.bytes < 330_000  # 260,032 parameters


def test_a_bf16_model_keeps_its_floats(shared_data: Path, tmp_path: Path) -> None:
    model, tokenizer = load_causal_lm(shared_data / "stories260K", dtype=torch.bfloat16)
    model = convert(model, Policy({"attention": "w4a16-g32-asym"}))
    found = export_model(model, "gguf", tmp_path / "model", tokenizer=tokenizer).verification
    assert found is not None and (found.tensors, found.integers, found.rounded) == (20, 0, 0)
    assert found.error is not None and found.error < 1e-6


@pytest.mark.llama_cpp
def test_llama_cpp_tells_the_same_story(shared_data: Path, tmp_path: Path) -> None:
    pytest.importorskip("llama_cpp", reason="llama-cpp-python (the extra gguf-k) is not installed")
    model, tokenizer = load_causal_lm(shared_data / "stories260K", dtype=torch.float32)
    made = export_model(
        convert(model, MIXED), "gguf", tmp_path / "model", tokenizer=tokenizer, options={"indivisible": "float"}
    )
    told = str(made)
    assert "all 24 greedy tokens equal" in told and "llama.cpp's tokenizer gives the same ids on" in told
