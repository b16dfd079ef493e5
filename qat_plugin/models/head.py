"""A causal language model taken apart at its output head, so that logits need never be there all at once."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from qat_plugin.measure.evaluating import evaluating

_PROBE = 8  # tokens
Transform = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class SplitModel:
    """``logits = transform(head(hidden))`` of a transformers causal language model.

    Attributes:
        body: gives hidden states [B, T, D] as ``.last_hidden_state``.
        head: [.., D] -> [.., V].
        transform: elementwise on logits (Gemma's soft cap, Cohere's and Granite's scale); ``None`` for none.
    """

    body: nn.Module
    head: nn.Module
    transform: Transform | None

    def hidden(self, batch: Mapping[str, Tensor]) -> Tensor:
        """Hidden states [B, T, D] of a batch with ``input_ids`` and whatever else the model should see."""
        states: Tensor = self.body(**inputs_of(batch), use_cache=False).last_hidden_state
        return states

    def all_hidden(self, batch: Mapping[str, Tensor]) -> tuple[Tensor, ...]:
        """The states [B, T, D] after each block; the last are those of :meth:`hidden`."""
        out = self.body(**inputs_of(batch), use_cache=False, output_hidden_states=True)
        return (*out.hidden_states[1:-1], out.last_hidden_state)


def inputs_of(batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What of a batch goes into the model; labels do not."""
    return {name: batch[name] for name in ("input_ids", "attention_mask", "position_ids") if name in batch}


def split(model: nn.Module) -> SplitModel | str:
    """Take a model apart, and prove on a few tokens that the parts give its logits.

    Returns:
        The parts; or why they cannot be told, in words.
    """
    head = getattr(model, "get_output_embeddings", lambda: None)()
    body = getattr(model, "base_model", None)
    if not isinstance(head, nn.Module) or not isinstance(body, nn.Module) or body is model:
        return f"{type(model).__name__} does not tell its body from its output head"
    parts = SplitModel(body, head, _transform(getattr(model, "config", None)))
    device = next(head.parameters()).device
    rows = int(getattr(model.get_input_embeddings(), "num_embeddings", _PROBE))  # type: ignore[operator]
    ids = torch.arange(_PROBE, device=device).remainder(rows).unsqueeze(0)
    with evaluating(model):
        expected = model(input_ids=ids, use_cache=False).logits
        logits = head(parts.hidden({"input_ids": ids}))
        logits = logits if parts.transform is None else parts.transform(logits)
    if expected.shape != logits.shape or not torch.allclose(expected.float(), logits.float(), rtol=1e-3, atol=1e-3):
        return f"{type(model).__name__} does something with its logits that is not known here"
    return parts


def _transform(config: Any) -> Transform | None:
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    cap = getattr(text, "final_logit_softcapping", None)
    if cap:
        return lambda logits: torch.tanh(logits / cap) * cap
    scale = getattr(text, "logit_scale", None)
    if scale is not None and scale != 1:
        return lambda logits: logits * scale
    divisor = getattr(text, "logits_scaling", None)
    if divisor is not None and divisor != 1:
        return lambda logits: logits / divisor
    return None
