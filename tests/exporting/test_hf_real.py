"""The real pretrained Llama in both transformers directories, each proven by another interpreter, and read back."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import qat_plugin
from qat_plugin import Policy, convert
from qat_plugin.exporting import export_model
from qat_plugin.exporting.contents import outputs_of
from qat_plugin.models.loading import load_causal_lm


@pytest.mark.real
@pytest.mark.parametrize(("format", "scheme", "least"), [
    ("torchao", "w4a16-g32-asym", 1e-6),
    ("compressed-tensors", "w4a16-g32", 1e-6),
])  # fmt: skip
def test_the_real_model_is_the_same_there_and_back(
    format: str, scheme: str, least: float, shared_data: Path, tmp_path: Path
) -> None:
    network, tokenizer = load_causal_lm(shared_data / "stories260K")
    policy = Policy({"attention": scheme, "ffn": scheme}, keep=["lm_head", "embedding"])
    model = convert(network, policy)  # 172 is not divisible by 32: groups of 4 there
    made = export_model(model, format, tmp_path / "out", tokenizer=tokenizer, progress=False)
    found = made.verification
    assert found is not None and (found.tensors, found.integers, found.scales, found.rounded) == (35, 0, 0, 0)
    assert found.error is not None and found.error <= least
    read, words = qat_plugin.load(made.path)
    ids = words("Once upon a time, there was a little", return_tensors="pt")["input_ids"]
    assert torch.equal(outputs_of(read, {"input_ids": ids}), outputs_of(model, {"input_ids": ids}))
