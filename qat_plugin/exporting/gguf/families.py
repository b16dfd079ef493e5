"""The architectures that can be written: what llama.cpp calls them, and what each does to its weights."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from qat_plugin.errors import ExportError


@dataclass(frozen=True)
class Family:
    """One architecture of GGUF.

    Attributes:
        architecture: ``general.architecture``.
        permutes: rows of q and k are reordered within each head, for the rotation of neighbouring pairs.
        norm_offset: added to the weights of norms (Gemma's norms multiply by 1 + weight).
        activations: names of the FFN's activation that the runtime computes.
        biases: layers (last part of their names) that may have biases.
        sliding: ``None``: the runtime attends to everything; n: every n-th layer does, the others to a window.
        transformers: whether transformers reads files of it.
    """

    architecture: str
    permutes: bool = False
    norm_offset: float = 0.0
    activations: tuple[str, ...] = ("silu", "swish")
    biases: frozenset[str] = frozenset()
    sliding: int | None = None
    transformers: bool = True


_GELU = ("gelu_pytorch_tanh", "gelu_new")
_ATTENTION = frozenset({"q_proj", "k_proj", "v_proj", "o_proj"})
_LLAMA = Family("llama", permutes=True, biases=_ATTENTION | {"gate_proj", "up_proj", "down_proj"})
FAMILIES = {
    "llama": _LLAMA,
    "mistral": _LLAMA,
    "qwen2": Family("qwen2", biases=frozenset({"q_proj", "k_proj", "v_proj"})),
    "qwen3": Family("qwen3"),
    "gemma": Family("gemma", norm_offset=1.0, activations=_GELU, transformers=False),
    "gemma2": Family("gemma2", norm_offset=1.0, activations=_GELU, sliding=2),
    "gemma3_text": Family("gemma3", norm_offset=1.0, activations=_GELU, sliding=6),
}
"""``model_type`` of transformers' configuration -> family."""


def family_of(config: Any, network: object) -> Family:
    """The family of a model.

    Raises:
        ExportError: for an architecture that is not known here, or a variant that the runtime does not compute.
    """
    kind = getattr(config, "model_type", None)
    if kind not in FAMILIES or not type(network).__name__.endswith("ForCausalLM"):
        what = f"{type(network).__name__} (model_type {kind!r})" if kind else type(network).__name__
        raise ExportError(
            f"format=gguf does not know the architecture of {what}; known are language models of "
            f"{', '.join(FAMILIES)} (…ForCausalLM of transformers)"
        )
    family = FAMILIES[kind]
    _check_computation(config, family)
    return family


def _check_computation(config: Any, family: Family) -> None:
    """Raise for settings that change what is computed and that the file has no place for."""
    activation = getattr(config, "hidden_activation", None) or getattr(config, "hidden_act", None)
    if activation not in family.activations:
        raise ExportError(
            f"llama.cpp computes {family.architecture} with {family.activations[0]}; this model has {activation!r}"
        )
    width = head_dim(config)
    wanted = getattr(config, "query_pre_attn_scalar", None)
    if wanted is not None and wanted != _attention_scalar(config, family, width):
        raise ExportError(
            f"GGUF's {family.architecture} has no place for query_pre_attn_scalar={wanted}; llama.cpp takes "
            f"{_attention_scalar(config, family, width)} for a model of this shape"
        )
    if getattr(config, "use_bidirectional_attention", None):
        raise ExportError(f"GGUF's {family.architecture} is causal; this model has use_bidirectional_attention=True")
    kinds = getattr(config, "layer_types", None)
    if family.sliding and kinds:
        expected = [
            "full_attention" if (i + 1) % family.sliding == 0 else "sliding_attention" for i in range(len(kinds))
        ]
        if list(kinds) != expected:
            raise ExportError(
                f"llama.cpp lets every {family.sliding}th layer of {family.architecture} attend to everything and the "
                f"others to a window; this model's layer_types are {', '.join(kinds)}"
            )


def _attention_scalar(config: Any, family: Family, width: int) -> float:
    largest = {"gemma2": 46, "gemma3": 62}  # layers of the 27B models, which llama.cpp knows them by
    if config.num_hidden_layers == largest.get(family.architecture):
        return float(config.hidden_size / config.num_attention_heads)
    return float(width)


def head_dim(config: Any) -> int:
    """Width of one attention head."""
    return int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)
