"""What QLoRA leaves, as peft and bitsandbytes read it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from qat_plugin import qlora
from qat_plugin.errors import ExportError
from qat_plugin.exporting import export_model
from qat_plugin.exporting.contents import outputs_of

SAMPLE = {"input_ids": torch.arange(32).reshape(2, 16)}


@pytest.fixture(scope="module")
def adapted() -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=128, tie_word_embeddings=True,
    )  # fmt: skip
    model = qlora.prepare(LlamaForCausalLM(config), rank=4, base="nf4-dq")
    with torch.no_grad():
        for layer in qlora.lora_layers(model).values():
            layer.lora_B["default"].weight.normal_(std=0.05)
    return model.eval()


def test_peft_runs_the_adapter_to_the_same_outputs(adapted: Any, tmp_path: Path) -> None:
    made = export_model(adapted, "peft", tmp_path / "adapter", sample=SAMPLE)
    found = made.verification
    assert found is not None and found.error is not None and found.error < 1e-5 and found.rounded == 0
    assert found.floats == 2 * len(qlora.lora_layers(adapted)) and not found.notes
    assert {p.name for p in made.path.iterdir()} >= {"adapter_config.json", "adapter_model.safetensors", "README.md"}
    with qlora.without_adapters(adapted):
        bare = outputs_of(adapted, SAMPLE)
    assert not torch.allclose(bare, outputs_of(adapted, SAMPLE), atol=1e-3)  # the comparison could fail


def test_the_base_is_read_back_by_transformers_without_quantizing_again(adapted: Any, tmp_path: Path) -> None:
    made = export_model(adapted, "bitsandbytes", tmp_path / "base", sample=SAMPLE, options={"shard_size": "20KB"})
    found = made.verification
    assert found is not None and found.rounded == 0 and found.notes[0] == "14 layers in NF4"
    assert len(list(made.path.glob("*.safetensors"))) > 1
    from transformers import AutoModelForCausalLM

    read = AutoModelForCausalLM.from_pretrained(
        made.path, dtype=torch.float32
    ).train()  # in training it is not repacked
    with qlora.without_adapters(adapted):
        assert torch.equal(outputs_of(read, SAMPLE), outputs_of(adapted.train(), SAMPLE))


def test_formats_of_adapters_and_of_converted_models_are_told_apart(adapted: Any, tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="merge it first"):
        export_model(adapted, "converted", tmp_path / "out", sample=SAMPLE)
    with pytest.raises(ExportError, match="has no adapters"):
        export_model(torch.nn.Linear(4, 4), "peft", tmp_path / "out", sample=(torch.ones(1, 4),))
    assert list(tmp_path.iterdir()) == []
