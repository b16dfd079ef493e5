"""Attention of one new token to a cache, in place of torch's attention, through transformers' own interface."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from qat_plugin.native import available

ATTENTION = "qat_plugin"


def use_attention(model: nn.Module) -> None:
    """Let one new token attend by the native operator, where torch's own attention would."""
    if getattr(model.config, "_attn_implementation", None) != "sdpa" or not available():
        return
    from transformers import AttentionInterface
    from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

    AttentionInterface.register(ATTENTION, attention)
    AttentionMaskInterface.register(ATTENTION, sdpa_mask)
    model.set_attn_implementation(ATTENTION)  # type: ignore[operator]


def attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """transformers' attention interface: the native operator for one query, torch's attention for more.

    Args:
        module: the attention layer.
        query: [batch, heads, queries, width].
        key, value: [batch, groups, positions, width]; heads read them in turn.
        attention_mask: bool [batch, 1, queries, positions], true where a key is seen; or ``None`` for all.
        dropout: probability, in training.
        scaling: of the products; by default ``width ** -0.5``.

    Returns:
        [batch, queries, heads, width], and no weights.
    """
    one = query.shape[2] == 1 and query.device.type == "cpu" and not torch.is_grad_enabled()
    plain = attention_mask is None or (attention_mask.dtype == torch.bool and attention_mask.shape[1] == 1)
    unusual = options.get("softcap") is not None or options.get("position_bias") is not None or options.get("cache")
    if one and plain and not unusual and query.dtype == key.dtype:
        scale = query.shape[-1] ** -0.5 if scaling is None else scaling
        return torch.ops.qat_plugin_native.attend(query, key, value, attention_mask, scale), None
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    result: tuple[Tensor, None] = sdpa_attention_forward(
        module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **options
    )
    return result
