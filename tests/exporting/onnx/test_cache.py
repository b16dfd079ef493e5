"""Past keys and values go in and out, and generate what the model generates."""

from __future__ import annotations

from pathlib import Path

import onnx
import pytest
import torch
from torch import nn

from qat_plugin import Policy, convert
from qat_plugin.errors import ConfigError, ExportError
from qat_plugin.exporting import export_model
from qat_plugin.exporting.onnx.options import Options
from tests.exporting.onnx.runtime import run
from tests.exporting.onnx.test_language_models import VOCABULARY, llama


def test_tokens_one_by_one_are_those_of_generate(tmp_path: Path) -> None:
    rules = {"embedding": "fp16", "head": "fp16", "attention": "w8a16", "ffn": "w4a16-g32"}
    model = convert(llama(tie_word_embeddings=True), Policy(rules)).eval()
    made = export_model(model, "onnx", tmp_path / "out", options={"cache": True}, progress=False)
    assert made.verification is not None and made.verification.error is not None
    assert made.verification.error < 1e-5

    prompt = torch.randint(VOCABULARY, (2, 7))
    past = [torch.zeros(2, 2, 0, 16)] * 2
    tokens, new = prompt, prompt
    for _ in range(6):
        logits, *past = run(made.path, new, torch.ones_like(tokens), *past)
        new = logits[:, -1:].argmax(-1)
        tokens = torch.cat([tokens, new], dim=1)
    wanted = model.generate(  # type: ignore[operator]
        prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=6, min_new_tokens=6, do_sample=False
    )
    assert torch.equal(tokens, wanted)

    graph = onnx.load(made.path / "model.onnx").graph
    axes = {
        entry.name: [dim.dim_param or dim.dim_value for dim in entry.type.tensor_type.shape.dim]
        for entry in (*graph.input, *graph.output)
    }
    assert axes["input_ids"] == ["batch", "sequence"]
    assert axes["attention_mask"] == ["batch", "total"]
    assert axes["past_key_values.0.key"] == ["batch", 2, "past", 16]
    assert axes["present.0.value"] == ["batch", 2, "past + sequence", 16]


def test_only_a_language_model_has_a_past(tmp_path: Path) -> None:
    network = convert(nn.Sequential(nn.Linear(64, 32)), "w4a16-g32")
    with pytest.raises(ExportError, match="no transformers language model"):
        export_model(
            network, "onnx", tmp_path / "out", sample=(torch.ones(2, 64),), options={"cache": True}, progress=False
        )
    with pytest.raises(ConfigError, match="needs dynamic=True"):
        Options(cache=True, dynamic=False)
