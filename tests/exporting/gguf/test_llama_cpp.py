"""llama.cpp itself: logits, tokens, its own quantizer's bytes, and K-quants."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from torch import nn

from qat_plugin import Policy, convert
from qat_plugin.errors import ConfigError, ExportError
from qat_plugin.exporting import export_model
from qat_plugin.exporting.contents import Exportable
from qat_plugin.exporting.gguf import Options
from qat_plugin.exporting.gguf.write import write_file
from tests.exporting.gguf.families import LLAMA3, YARN, network
from tests.exporting.gguf.test_families import GEMMA3_ROPE
from tests.exporting.gguf.tokenizers_made import LLAMA3 as LLAMA3_PATTERN
from tests.exporting.gguf.tokenizers_made import QWEN2, byte_level, sentencepiece_like

llama_cpp = pytest.importorskip("llama_cpp", reason="llama-cpp-python (the extra gguf-k) is not installed")
pytestmark = pytest.mark.llama_cpp
MIXED = Policy({"embedding": "fp16", "head": "fp16", "attention": "w8a8", "ffn": "w4a16-g32"})


def logits_error(told: str) -> float:
    return float(told.partition("logits by ")[2].split()[0])


@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        ("Llama", {}), ("Llama", {"attention_bias": True, "mlp_bias": True, "num_hidden_layers": 1}),
        ("Llama", {"rope_parameters": LLAMA3}), ("Mistral", {"tie_word_embeddings": True, "head_dim": 32}),
        ("Qwen2", {"rope_parameters": {**YARN, "attention_factor": 1.3}}), ("Qwen3", {}), ("Gemma", {}), ("Gemma2", {}),
        ("Gemma3Text", {"num_hidden_layers": 6, "rope_parameters": GEMMA3_ROPE}),
    ],
)  # fmt: skip
def test_llama_cpp_computes_the_model_that_rounds_inputs_as_it_does(
    kind: str, changes: dict[str, Any], tmp_path: Path
) -> None:
    made = export_model(convert(network(kind, **changes), MIXED), "gguf", tmp_path / "model")
    assert logits_error(str(made)) < 3e-3  # 1e-6 where no activation lies on the border of two integers


@pytest.mark.parametrize("scheme", ["w4a16-g32-asym", "w3a16-g32", "w8a16-tensor"])
def test_llama_cpp_computes_every_type_of_block(scheme: str, tmp_path: Path) -> None:
    made = export_model(convert(network("Llama"), scheme), "gguf", tmp_path / "model")
    assert logits_error(str(made)) < 3e-3


@pytest.mark.parametrize(
    "tokenizer",
    [
        byte_level(), byte_level(LLAMA3_PATTERN, ignore_merges=True, bos=True), byte_level(QWEN2),
        sentencepiece_like(), sentencepiece_like(prefix=False), sentencepiece_like(prefix=False, metaspace=True),
    ],
    ids=["gpt-2", "llama-bpe", "qwen2", "llama-2", "gemma", "metaspace"],
)  # fmt: skip
def test_llama_cpp_gives_the_tokenizers_ids_on_odd_strings(tokenizer: Any, tmp_path: Path) -> None:
    model = convert(network("Llama", vocab_size=500, num_hidden_layers=1), "w8a16")
    made = export_model(model, "gguf", tmp_path / "model", tokenizer=tokenizer)
    assert "llama.cpp's tokenizer gives the same ids on" in str(made)


def quantized_by_llama_cpp(source: Path, target: Path, embedding: str) -> dict[str, Any]:
    settings = llama_cpp.llama_model_quantize_default_params()
    settings.ftype, settings.pure = llama_cpp.LLAMA_FTYPE_MOSTLY_Q4_0, True
    settings.token_embedding_type = gguf.GGMLQuantizationType[embedding].value
    assert llama_cpp.llama_model_quantize(str(source).encode(), str(target).encode(), settings) == 0
    return {tensor.name: tensor for tensor in gguf.GGUFReader(target).tensors}


def check_equal_bytes(model: nn.Module, folder: Path, embedding: str) -> int:
    """Our Q4_0 file against stock llama.cpp's quantization of our F16 file; the number of Q4_0 tensors."""
    ours = export_model(model, "gguf", folder / "ours", options={"outputs": False}).path
    held = Exportable(model, {"input_ids": torch.ones(1, 4, dtype=torch.int64)})
    write_file(held, folder / "f16.gguf", Options(kquant="Q4_0"), lambda written: None)
    theirs = quantized_by_llama_cpp(folder / "f16.gguf", folder / "theirs.gguf", embedding)
    found = {tensor.name: tensor for tensor in gguf.GGUFReader(ours).tensors}
    assert found.keys() == theirs.keys()
    for name, tensor in found.items():
        assert tensor.tensor_type == theirs[name].tensor_type, name
        assert np.array_equal(tensor.data, theirs[name].data), name
    return sum(tensor.tensor_type.name == "Q4_0" for tensor in found.values())


@pytest.mark.parametrize(("kind", "seed"), [("Llama", 1), ("Llama", 2), ("Qwen2", 3), ("Qwen3", 4), ("Gemma2", 5)])
def test_stock_q4_0_of_our_f16_file_has_the_same_bytes(kind: str, seed: int, tmp_path: Path) -> None:
    model = network(kind, tie_word_embeddings=True)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:  # heavy tails
                parameter.copy_(torch.randn(parameter.shape, generator=generator) ** 3 * 0.02)
    assert check_equal_bytes(convert(model, "w4a16-g32"), tmp_path, "F32") == 14
    everything = Policy({"embedding": "w4a16-g32", "*": "w4a16-g32"})
    model = network(kind, tie_word_embeddings=True)
    assert check_equal_bytes(convert(model, everything), tmp_path, "Q4_0") == 15


@pytest.mark.slow
def test_stock_q4_0_of_the_embedded_models_f16_file_has_the_same_bytes(tmp_path: Path) -> None:
    from qat_plugin.models.embedded import embedded_lm
    from qat_plugin.models.loading import load_causal_lm

    model, _ = load_causal_lm(embedded_lm(progress=False), dtype=torch.float32)
    assert check_equal_bytes(convert(model, "w4a16-g32"), tmp_path, "F32") == 28


def test_k_quants_are_said_not_to_keep_the_grid(tmp_path: Path) -> None:
    model = convert(network("Llama", hidden_size=256, intermediate_size=256, num_hidden_layers=1), "w4a16-g32")
    options = {"kquant": "Q4_K_M", "output_type": "Q8_0", "embedding_type": "F16"}
    made = export_model(model, "gguf", tmp_path / "model", options=options)
    types = {tensor.name: tensor.tensor_type.name for tensor in gguf.GGUFReader(made.path).tensors}
    assert types["output.weight"] == "Q8_0" and types["token_embd.weight"] == "F16"
    assert types["blk.0.ffn_gate.weight"] == "Q4_K"
    found = made.verification
    assert found is not None and not found.exact and 0.01 < found.rounded < 0.2
    assert found.error is not None and found.error > 1e-3 and "the trained grid is NOT kept" in str(made)
    assert "are NOT in it" in made.card.read_text()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model.gguf", "model.gguf.md"]


def test_k_quants_that_are_none_or_need_more_are_refused(tmp_path: Path) -> None:
    model = convert(network("Llama", num_hidden_layers=1), "w4a16-g32")
    with pytest.raises(ConfigError, match="Did you mean 'Q4_K_M'"):
        export_model(model, "gguf", tmp_path / "model", options={"kquant": "Q4_KM"})
    model = convert(network("Llama", hidden_size=256, intermediate_size=256, num_hidden_layers=1), "w4a16-g32")
    with pytest.raises(ExportError, match="could not quantize to IQ2_XXS: .*imatrix"):
        export_model(model, "gguf", tmp_path / "model", options={"kquant": "IQ2_XXS"})
    assert list(tmp_path.iterdir()) == []
