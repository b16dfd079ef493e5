"""Small GGUF files of transformers models, written by the gguf package, each tensor in a type of choice."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType as Kind
from torch import Tensor

from qat_plugin.exporting.gguf.seal import BLANK, DATA_SEAL, SEAL, seal

SIZES: dict[str, Any] = {
    "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": 128, "max_position_embeddings": 64,
}  # fmt: skip
IDS = torch.arange(2, 34).reshape(2, 16)


def llama(**changes: Any) -> Any:
    from transformers import LlamaConfig

    return model_of(LlamaConfig(**{**SIZES, "tie_word_embeddings": False, **changes}))


def model_of(config: Any) -> Any:
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 1:  # norms and biases that are not all the same
                parameter.add_(0.2 * torch.randn_like(parameter))
            elif "embed" not in name:
                parameter.mul_(4)
    return model


def pairs_together(rows: Tensor, heads: int) -> Tensor:
    """Llama's rows as llama.cpp's converter lays them."""
    return rows.reshape(heads, 2, len(rows) // heads // 2, *rows.shape[1:]).swapaxes(1, 2).reshape(rows.shape)


def write(
    model: Any,
    path: Path,
    kind: Callable[[str], Kind] | Kind = Kind.F32,
    *,
    architecture: str = "llama",
    sealed: bool = False,
    tokens: bool = False,
    more: Callable[[gguf.GGUFWriter], None] | None = None,
) -> Path:
    """A file of a model.

    Args:
        kind: the type of matrices, one for all or by the tensor's name; norms and biases are F32.
        tokens: write a list of them, without a tokenizer's kind.
        more: adds metadata.
    """
    config = model.config
    writer = gguf.GGUFWriter(str(path), architecture)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    if architecture != "llama":
        writer.add_key_length(config.head_dim if hasattr(config, "head_dim") else 16)
    if tokens:  # a list of text, for the header's tests; no tokenizer
        writer.add_token_list([f"<{i}>" for i in range(config.vocab_size)])
    if sealed:
        writer.add_string(SEAL, BLANK)
        writer.add_string(DATA_SEAL, BLANK)
    if more is not None:
        more(writer)
    chosen = next(key for key, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture)
    names = gguf.get_tensor_name_map(chosen, config.num_hidden_layers)
    tied = config.tie_word_embeddings
    for name, tensor in model.state_dict().items():
        if tied and name == "lm_head.weight":
            continue
        stem, _, leaf = name.rpartition(".")
        target = f"{names.get_name(stem)}.{leaf}"
        heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}.get(stem.split(".")[-1])
        tensor = pairs_together(tensor, heads) if heads and architecture == "llama" else tensor
        tensor = tensor + 1 if architecture.startswith("gemma") and stem.endswith("norm") else tensor
        wanted = Kind.F32 if tensor.dim() == 1 else kind(target) if callable(kind) else kind
        add(writer, target, tensor.float().numpy(), wanted)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    if sealed:
        seal(path)
    return path


def add(writer: gguf.GGUFWriter, name: str, values: np.ndarray[Any, Any], kind: Kind) -> None:
    if kind in (Kind.F32, Kind.F16):
        writer.add_tensor(name, values.astype(np.float32 if kind is Kind.F32 else np.float16))
    else:
        writer.add_tensor(name, gguf.quants.quantize(values, kind), raw_dtype=kind)


def put(path: Path, place: int, byte: int) -> None:
    """Change one byte of a file."""
    with path.open("r+b") as file:
        file.seek(place)
        file.write(bytes([byte]))


@torch.no_grad()
def by_transformers(path: Path) -> Tensor:
    """Logits of transformers' own reading of a file: everything dequantized."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32).eval()
    return model(IDS).logits


@torch.no_grad()
def logits(model: Any) -> Tensor:
    found: Tensor = model(IDS).logits
    return found.float()
