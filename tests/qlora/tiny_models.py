"""Random models of the families that are streamed, saved as transformers directories."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers as tf

VOCABULARY, WORDS = 72, 64  # some tokenizers add words of their own
_LLAMA = {
    "vocab_size": VOCABULARY, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 128,
}  # fmt: skip
_HEADS = {**_LLAMA, "head_dim": 16}
_WIDE = {**_LLAMA, "hidden_size": 128, "intermediate_size": 256, "num_key_value_heads": 4}
_GPT2 = {"vocab_size": VOCABULARY, "n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 128}

FAMILIES: dict[str, Callable[[], Any]] = {
    "llama": lambda: tf.LlamaForCausalLM(tf.LlamaConfig(**_LLAMA)),
    "llama-tied": lambda: tf.LlamaForCausalLM(tf.LlamaConfig(**_LLAMA, tie_word_embeddings=True)),
    "llama-biased": lambda: tf.LlamaForCausalLM(tf.LlamaConfig(**_LLAMA, attention_bias=True, mlp_bias=True)),
    "mistral": lambda: tf.MistralForCausalLM(tf.MistralConfig(**_LLAMA)),
    "qwen2": lambda: tf.Qwen2ForCausalLM(tf.Qwen2Config(**_LLAMA)),
    "qwen3": lambda: tf.Qwen3ForCausalLM(tf.Qwen3Config(**_HEADS)),
    "gemma": lambda: tf.GemmaForCausalLM(tf.GemmaConfig(**_HEADS)),
    "gemma2": lambda: tf.Gemma2ForCausalLM(tf.Gemma2Config(**_HEADS)),
    "gemma3": lambda: tf.Gemma3ForCausalLM(tf.Gemma3TextConfig(**_HEADS)),
    "llama-wide": lambda: tf.LlamaForCausalLM(tf.LlamaConfig(**_WIDE)),
    "gpt2": lambda: tf.GPT2LMHeadModel(tf.GPT2Config(**_GPT2)),
}


def mixtral() -> Any:
    """Its experts are separate in the files and fused in the model."""
    return tf.MixtralForCausalLM(tf.MixtralConfig(**_LLAMA, num_local_experts=2))


def saved(model: Any, folder: Path, *, shard: str = "40KB", tokens: int = WORDS) -> Path:
    """Save a model in float32, in several shards, with a tokenizer of ``tokens`` words."""
    from tokenizers import Tokenizer, models

    model.save_pretrained(folder, max_shard_size=shard)
    words = {f"w{i}": i for i in range(tokens)}
    tokenizer = tf.PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel(words, unk_token="w0")))
    tokenizer.save_pretrained(folder)
    return folder


def family(name: str, folder: Path, **options: Any) -> Path:
    """A saved random model of one of :data:`FAMILIES`; weights and biases are nowhere zero or one."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = FAMILIES[name]()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.02 * torch.randn_like(parameter))
        return saved(model, folder, **options)


def logits(model: Any) -> torch.Tensor:
    """Of a fixed batch of tokens [2, 12]."""
    ids = torch.arange(24).reshape(2, 12) * 7 % WORDS
    with torch.no_grad():
        return model(input_ids=ids).logits
