"""Tiny random models of each architecture, with biases, norms and rows that a wrong layout would show in."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

SIZES: dict[str, Any] = {
    "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": 160, "max_position_embeddings": 128, "bos_token_id": 1, "eos_token_id": 2,
    "pad_token_id": 0,
}  # fmt: skip
YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 32}
LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}  # fmt: skip


def network(kind: str, **changes: Any) -> nn.Module:
    """A model of transformers by the name of its configuration, such as ``Llama``."""
    import transformers

    torch.manual_seed(0)
    own = {"head_dim": 32} if kind in ("Qwen3", "Gemma", "Gemma2", "Gemma3Text") else {}
    if kind in ("Gemma2", "Gemma3Text"):
        own |= {"query_pre_attn_scalar": 32, "sliding_window": 16}
    config = getattr(transformers, f"{kind}Config")(**{**SIZES, **own, **changes})
    model = getattr(transformers, f"{kind.removesuffix('Text')}ForCausalLM")(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 1:
                centre = 1.0 if "norm" in name and not kind.startswith("Gemma") else 0.0
                parameter.copy_(centre + 0.3 * torch.randn_like(parameter))
            else:
                parameter.mul_(4)
    return model.eval()
