"""Attention of one new token to a cache, in place of torch's attention, through transformers' own interface."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from qat_plugin.native import vectorized

ATTENTION = "qat_plugin"
_FLOATS = (torch.float32, torch.bfloat16, torch.float16)
_WIDEST = 1024


def use_attention(model: nn.Module) -> None:
    """Let one new token attend by the native operator, where torch's own attention would."""
    if getattr(model.config, "_attn_implementation", None) != "sdpa" or not vectorized():
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
    if _one_plain_token(query, key, value, attention_mask, options):
        scale = query.shape[-1] ** -0.5 if scaling is None else scaling
        return torch.ops.qat_plugin_native.attend(query, key, value, attention_mask, scale), None
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    result: tuple[Tensor, None] = sdpa_attention_forward(
        module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **options
    )
    return result


def _one_plain_token(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, options: dict[str, Any]) -> bool:
    """Whether the native operator takes this; anything else is torch's."""
    if query.shape[2] != 1 or query.device.type != "cpu" or torch.is_grad_enabled():
        return False
    if any(options.get(name) is not None for name in ("softcap", "position_bias", "cache")):
        return False
    fits = query.dtype in _FLOATS and query.dtype == key.dtype == value.dtype and query.shape[-1] <= _WIDEST
    if not fits or key.shape != value.shape or query.shape[0] != key.shape[0]:
        return False
    return mask is None or (mask.dtype == torch.bool and mask.shape[1] == 1 and mask.shape[0] in (1, query.shape[0]))
