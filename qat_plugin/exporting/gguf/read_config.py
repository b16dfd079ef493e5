"""The transformers configuration that a GGUF file's metadata describe.

Sizes are taken from the metadata and held against the tensors' own shapes, so that no model is built whose tensors the
file does not have. What changes a model's outputs and cannot be told exactly is refused, never guessed.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Final

from qat_plugin.errors import CheckpointError
from qat_plugin.exporting.gguf.header import Header
from qat_plugin.exporting.gguf.read_rope import rope_parameters, shortest

_TOKENS: Final = {
    "bos_token_id": "tokenizer.ggml.bos_token_id",
    "eos_token_id": "tokenizer.ggml.eos_token_id",
    "pad_token_id": "tokenizer.ggml.padding_token_id",
}
# llama.cpp's own rule for the scale of attention scores: that of the largest Gemma is by the width of the residual.
_LARGEST_GEMMA: Final = {"gemma2": 46, "gemma3": 62}
_GEMMA3_PATTERN: Final = 6  # each sixth layer attends to everything


class Metadata:
    """What a file says of its model, each value checked as it is read."""

    def __init__(self, header: Header) -> None:
        self.header = header
        self.architecture = self._text("general.architecture")

    def refused(self, reason: str) -> CheckpointError:
        """An error about this file."""
        return CheckpointError(f"{self.header.path} (architecture {self.architecture}): {reason}")

    def _text(self, key: str) -> str:
        value = self.header.metadata.get(key)
        if not isinstance(value, str):
            raise CheckpointError(f"{self.header.path}: its metadata has no {key}")
        return value

    def has(self, name: str) -> bool:
        """Whether there is a value of the architecture's own."""
        return f"{self.architecture}.{name}" in self.header.metadata

    def value(self, name: str) -> Any:
        """A value of the architecture's own, or ``None``."""
        return self.header.metadata.get(f"{self.architecture}.{name}")

    def whole(self, name: str, default: int | None = None) -> int:
        """A positive integer."""
        value = self.value(name)
        if value is None and default is not None:
            return default
        if not isinstance(value, int) or isinstance(value, bool) or not 0 < value < 1 << 31:
            raise self.refused(f"{self.architecture}.{name} is {value!r}; a positive integer is needed")
        return value

    def number(self, name: str, default: float | None = None) -> float:
        """A positive finite number; a float32 is taken for the shortest decimal that it stands for."""
        value = self.value(name)
        if value is None and default is not None:
            return default
        if not isinstance(value, (int, float)) or isinstance(value, bool) or not 0 < value < math.inf:
            raise self.refused(f"{self.architecture}.{name} is {value!r}; a positive number is needed")
        return shortest(float(value))

    def rows(self, tensor: str) -> int:
        """The first dimension of a tensor."""
        info = self.header.tensors.get(tensor)
        if info is None or not info.shape:
            raise self.refused(f"it has no tensor {tensor}")
        return info.shape[0]


def config_of(header: Header) -> Any:
    """The configuration of the model in a file.

    Raises:
        CheckpointError: for an architecture that is not read here, or metadata that are missing, wrong or of something
            that the model's class does not compute.
    """
    metadata = Metadata(header)
    if metadata.architecture not in _FAMILIES:
        raise metadata.refused(f"this architecture cannot be read; those that can: {', '.join(_FAMILIES)}")
    parts = header.metadata.get("split.count", 1)
    if parts not in (0, 1):
        raise metadata.refused(f"it is one of {parts} parts of a model; join them first (llama-gguf-split --merge)")
    if metadata.has("expert_count") and metadata.value("expert_count"):
        raise metadata.refused("models of experts cannot be read")
    try:
        config = _FAMILIES[metadata.architecture](metadata, _shared(metadata))
    except (ValueError, TypeError) as error:
        if isinstance(error, CheckpointError):
            raise
        raise metadata.refused(f"transformers refuses its metadata ({error})") from error
    except Exception as error:  # huggingface_hub's own validation errors derive from nothing else
        if not type(error).__module__.startswith("huggingface_hub"):
            raise
        raise metadata.refused(f"transformers refuses its metadata ({error})") from error
    return config


def _shared(metadata: Metadata) -> dict[str, Any]:
    heads, hidden = metadata.whole("attention.head_count"), metadata.whole("embedding_length")
    kv_heads = metadata.whole("attention.head_count_kv", heads)
    layers, width = metadata.whole("block_count"), metadata.whole("attention.key_length", max(1, hidden // heads))
    inner = metadata.whole("feed_forward_length")
    found = metadata.header.tensors
    present = sum(name.startswith("blk.") and name.endswith(".attn_norm.weight") for name in found)
    if present != layers:
        raise metadata.refused(f"block_count is {layers}, but the file has {present} blocks")
    for what, tensor, wanted in (
        ("embedding_length", "output_norm.weight", hidden),
        ("feed_forward_length", "blk.0.ffn_up.weight", inner),
        ("attention.head_count by attention.key_length", "blk.0.attn_q.weight", heads * width),
        ("attention.head_count_kv by attention.key_length", "blk.0.attn_k.weight", kv_heads * width),
    ):
        if metadata.rows(tensor) != wanted:
            raise metadata.refused(f"{what} is {wanted}, but {tensor} has {metadata.rows(tensor)} rows")
    if metadata.whole("attention.value_length", width) != width:
        raise metadata.refused("values of attention have another width than its keys, which cannot be read")
    if metadata.whole("rope.dimension_count", width) != width:
        raise metadata.refused("a part of each head is rotated, which cannot be read")
    if heads % kv_heads:
        raise metadata.refused(f"{heads} heads cannot share {kv_heads} pairs of keys and values")
    tokens = {name: _token(metadata, key) for name, key in _TOKENS.items()}
    return {
        "vocab_size": metadata.rows("token_embd.weight"),
        "hidden_size": hidden,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": width,
        "rms_norm_eps": metadata.number("attention.layer_norm_rms_epsilon"),
        "max_position_embeddings": metadata.whole("context_length"),
        "tie_word_embeddings": "output.weight" not in found,
        **tokens,
    }


def _token(metadata: Metadata, key: str) -> int | None:
    value = metadata.header.metadata.get(key)
    if value is None:
        return None
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < metadata.rows("token_embd.weight"):
        raise metadata.refused(f"{key} is {value!r}, no row of the embedding")
    return value


def _llama(metadata: Metadata, shared: dict[str, Any]) -> Any:
    from transformers import LlamaConfig, MistralConfig

    rope = rope_parameters(metadata, shared["head_dim"], 10000.0)
    tensors = metadata.header.tensors
    if metadata.has("attention.sliding_window"):
        return MistralConfig(**shared, rope_parameters=rope, sliding_window=metadata.whole("attention.sliding_window"))
    return LlamaConfig(
        **shared,
        rope_parameters=rope,
        attention_bias="blk.0.attn_q.bias" in tensors,
        mlp_bias="blk.0.ffn_up.bias" in tensors,
    )


def _qwen2(metadata: Metadata, shared: dict[str, Any]) -> Any:
    from transformers import Qwen2Config

    if shared["head_dim"] * shared["num_attention_heads"] != shared["hidden_size"]:
        raise metadata.refused("its heads are not as wide together as its embedding, which Qwen2 needs")
    _no_window(metadata, shared)
    rest = {name: value for name, value in shared.items() if name != "head_dim"}
    return Qwen2Config(**rest, rope_parameters=rope_parameters(metadata, shared["head_dim"], 10000.0))


def _qwen3(metadata: Metadata, shared: dict[str, Any]) -> Any:
    from transformers import Qwen3Config

    _no_window(metadata, shared)
    return Qwen3Config(
        **shared,
        rope_parameters=rope_parameters(metadata, shared["head_dim"], 10000.0),
        attention_bias="blk.0.attn_q.bias" in metadata.header.tensors,
    )


def _no_window(metadata: Metadata, shared: dict[str, Any]) -> None:
    """Raise for a window that some layers attend to: which ones is not in the file."""
    length = shared["max_position_embeddings"]
    window = metadata.whole("attention.sliding_window", length)
    if window < length:
        raise metadata.refused(f"some layers attend to a window of {window} tokens, and it does not say which")


def _gemma(metadata: Metadata, shared: dict[str, Any]) -> Any:
    from transformers import GemmaConfig

    return GemmaConfig(**shared, rope_parameters=rope_parameters(metadata, shared["head_dim"], 10000.0))


def _attention_scale(metadata: Metadata, shared: dict[str, Any]) -> int:
    """What attention scores are divided by the root of."""
    if shared["num_hidden_layers"] == _LARGEST_GEMMA[metadata.architecture]:
        return int(shared["hidden_size"] // shared["num_attention_heads"])
    return int(shared["head_dim"])


def _gemma2(metadata: Metadata, shared: dict[str, Any]) -> Any:
    from transformers import Gemma2Config

    if metadata.whole("attention.sliding_window_pattern", 2) != 2:
        raise metadata.refused("its pattern of sliding windows is not Gemma 2's")
    return Gemma2Config(
        **shared,
        rope_parameters=rope_parameters(metadata, shared["head_dim"], 10000.0),
        sliding_window=metadata.whole("attention.sliding_window", 4096),
        attn_logit_softcapping=metadata.number("attn_logit_softcapping", 50.0),
        final_logit_softcapping=metadata.number("final_logit_softcapping", 30.0),
        query_pre_attn_scalar=_attention_scale(metadata, shared),
    )


def _gemma3(metadata: Metadata, shared: dict[str, Any]) -> Any:
    from transformers import Gemma3TextConfig

    if metadata.whole("attention.sliding_window_pattern", _GEMMA3_PATTERN) != _GEMMA3_PATTERN:
        raise metadata.refused("its pattern of sliding windows is not Gemma 3's")
    local = {"rope_type": "default", "rope_theta": metadata.number("rope.freq_base_swa", 10000.0)}
    cap = metadata.number("final_logit_softcapping") if metadata.has("final_logit_softcapping") else None
    return Gemma3TextConfig(
        **shared,
        rope_parameters={
            "full_attention": rope_parameters(metadata, shared["head_dim"], 1_000_000.0),
            "sliding_attention": local,
        },
        sliding_window=metadata.whole("attention.sliding_window", 1024),
        final_logit_softcapping=cap,
        query_pre_attn_scalar=_attention_scale(metadata, shared),
    )


_FAMILIES: Final[dict[str, Callable[[Metadata, dict[str, Any]], Any]]] = {
    "llama": _llama,
    "qwen2": _qwen2,
    "qwen3": _qwen3,
    "gemma": _gemma,
    "gemma2": _gemma2,
    "gemma3": _gemma3,
}
