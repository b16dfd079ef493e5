"""Architectures by name: enough to plan a run for them before anything is downloaded."""

from __future__ import annotations

from typing import Any, Final

from qat_plugin.errors import ConfigError, did_you_mean
from qat_plugin.kernels.torchao_import import known_noise_dropped

# hidden, ffn, layers, heads, key/value heads, vocabulary, as in the models' own config.json
_LLAMAS: Final = {
    "llama-2-7b": (4096, 11008, 32, 32, 32, 32_000),
    "llama-2-13b": (5120, 13824, 40, 40, 40, 32_000),
    "llama-2-70b": (8192, 28672, 80, 64, 8, 32_000),
    "llama-3-8b": (4096, 14336, 32, 32, 8, 128_256),
    "llama-3-70b": (8192, 28672, 80, 64, 8, 128_256),
    "mistral-7b": (4096, 14336, 32, 32, 8, 32_000),
    "qwen2.5-7b": (3584, 18944, 28, 28, 4, 152_064),
    "qwen2.5-72b": (8192, 29568, 80, 64, 8, 152_064),
}
SHAPES: Final = tuple(_LLAMAS)


def shape_config(name: str) -> Any:
    """A Llama configuration of the named architecture's shape (Mistral's and Qwen's blocks have the same matrices).

    Raises:
        ConfigError: listing the names.
    """
    if name not in _LLAMAS:
        raise ConfigError(f"plan.shape={name} is not one of {', '.join(SHAPES)}.{did_you_mean(name, SHAPES)}")
    with known_noise_dropped():
        from transformers import LlamaConfig

    hidden, ffn, layers, heads, key_value_heads, vocabulary = _LLAMAS[name]
    return LlamaConfig(
        hidden_size=hidden, intermediate_size=ffn, num_hidden_layers=layers, num_attention_heads=heads,
        num_key_value_heads=key_value_heads, vocab_size=vocabulary, tie_word_embeddings=False,
        max_position_embeddings=8192,
    )  # fmt: skip
