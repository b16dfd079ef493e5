"""The benchmarks' Llama for llama.cpp: its weights as a GGUF file in F16, and quantized by llama.cpp itself."""

from __future__ import annotations

import statistics
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

TYPES = {"f16": None, "q8_0": "LLAMA_FTYPE_MOSTLY_Q8_0", "q4_0": "LLAMA_FTYPE_MOSTLY_Q4_0"}
_NAMES = {
    "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down", "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm",
}  # fmt: skip


def write_f16(model: nn.Module, file: Path) -> Path:
    """A transformers Llama as a GGUF file; matrices in F16, norms in F32."""
    import gguf

    config: Any = model.config
    writer = gguf.GGUFWriter(str(file), "llama")
    width = config.hidden_size // config.num_attention_heads
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_rope_dimension_count(width)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_F16)
    words = [f"<{i}>" for i in range(config.vocab_size)]
    writer.add_tokenizer_model("llama")
    writer.add_token_list(words)
    writer.add_token_scores([0.0] * len(words))
    writer.add_token_types([gguf.TokenType.NORMAL] * len(words))
    for name, tensor in model.state_dict().items():
        if target := _target(name):
            heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}.get(
                target.split(".")[-2]
            )
            writer.add_tensor(target, _array(tensor if heads is None else _interleaved(tensor, heads)))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file


def _target(name: str) -> str | None:
    if name == "model.embed_tokens.weight":
        return "token_embd.weight"
    if name == "model.norm.weight":
        return "output_norm.weight"
    if not name.startswith("model.layers."):
        return None  # the head is the embedding
    layer, part = name.removeprefix("model.layers.").removesuffix(".weight").split(".", 1)
    return f"blk.{layer}.{_NAMES[part]}.weight"


def _interleaved(weight: Tensor, heads: int) -> Tensor:
    """Rows of a head as llama.cpp rotates them: pairs side by side, not half a head apart."""
    rows, columns = weight.shape
    return weight.reshape(heads, 2, rows // heads // 2, columns).transpose(1, 2).reshape(rows, columns)


def _array(tensor: Tensor) -> np.ndarray[Any, Any]:
    return (tensor.float() if tensor.dim() == 1 else tensor.half()).numpy()


def quantized(file: Path, kind: str) -> Path:
    """llama.cpp's own quantization of an F16 file."""
    import llama_cpp

    if TYPES[kind] is None:
        return file
    target = file.with_name(f"{kind}.gguf")
    parameters = llama_cpp.llama_model_quantize_default_params()
    parameters.ftype = getattr(llama_cpp, str(TYPES[kind]))
    if llama_cpp.llama_model_quantize(str(file).encode(), str(target).encode(), parameters):
        raise RuntimeError(f"llama.cpp could not quantize to {kind}")
    return target


class LlamaCpp:
    """One file in llama.cpp: seconds of a prompt, and of a token after it."""

    def __init__(self, file: Path, threads: int, context: int) -> None:
        from llama_cpp import Llama

        self.model = Llama(str(file), n_ctx=context, n_threads=threads, n_threads_batch=threads, verbose=False)

    def prefill(self, ids: list[int]) -> float:
        """Seconds of a prompt in an empty cache."""
        self.model.reset()
        began = time.perf_counter()
        self.model.eval(ids)
        return time.perf_counter() - began

    def decode(self, tokens: int) -> float:
        """Median seconds of a token, after :meth:`prefill`."""
        taken = []
        for token in range(tokens):
            began = time.perf_counter()
            self.model.eval([token])
            taken.append(time.perf_counter() - began)
        return statistics.median(taken)


def as_list(ids: Tensor) -> list[int]:
    return [int(token) for token in ids.flatten().to(torch.int64)]
