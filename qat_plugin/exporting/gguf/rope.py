"""Rotary embeddings as GGUF spells them: base, scaling, and Llama 3's factors as a tensor of their own."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from qat_plugin.errors import ExportError
from qat_plugin.exporting.gguf.families import head_dim

_PLAIN = ("rope_type", "rope_theta", "type", "factor", "original_max_position_embeddings", "partial_rotary_factor")
_FIXED = {"partial_rotary_factor": 1, "beta_fast": 32, "beta_slow": 1, "truncate": True}  # what llama.cpp computes with
_OWN = {
    "default": (),
    "linear": (),
    "llama3": ("low_freq_factor", "high_freq_factor"),
    "yarn": ("attention_factor", *_FIXED),
}


def rope_of(config: Any) -> dict[str, Any]:
    """Parameters of the layers that attend to everything.

    Raises:
        ExportError: for a kind of scaling, or a setting of it, that GGUF has no place for.
    """
    given = getattr(config, "rope_parameters", None) or {}
    found = dict(given.get("full_attention", given))
    kind = found.get("rope_type", "default")
    if kind not in _OWN:
        raise ExportError(f"rope_type {kind!r} has no place in this format; known are {', '.join(_OWN)}")
    unknown = {key for key, value in found.items() if key not in _PLAIN + _OWN[kind] and value is not None}
    if unknown:
        raise ExportError(f"rope setting {', '.join(sorted(unknown))} (rope_type {kind}) has no place in this format")
    other = {key: found[key] for key, value in _FIXED.items() if found.get(key, value) not in (None, value)}
    if other:
        fixed = ", ".join(f"{key}={value} (llama.cpp computes with {_FIXED[key]})" for key, value in other.items())
        raise ExportError(f"rope setting {fixed} has no place in this format")
    if kind == "llama3" and config.model_type not in ("llama", "mistral"):
        raise ExportError(f"rope_type 'llama3' is read by llama.cpp for llama alone, this is {config.model_type}")
    return found


def sliding_base(config: Any) -> float | None:
    """Base of the layers that attend to a window, where they have one of their own.

    Raises:
        ExportError: when they are scaled too.
    """
    given = getattr(config, "rope_parameters", None) or {}
    sliding = given.get("sliding_attention")
    if sliding is None:
        return None
    if sliding.get("rope_type", "default") != "default":
        raise ExportError("scaled rotary embeddings of sliding layers have no place in this format")
    return float(sliding["rope_theta"])


def add_rope(writer: Any, config: Any) -> None:
    """Keys of the rotary embedding."""
    import gguf

    rope = rope_of(config)
    writer.add_rope_dimension_count(head_dim(config))
    writer.add_rope_freq_base(float(rope.get("rope_theta", 10000.0)))
    sliding = sliding_base(config)
    if sliding is not None:
        writer.add_rope_freq_base_swa(sliding)
    kind = rope.get("rope_type", "default")
    if kind == "linear":
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(float(rope["factor"]))
    elif kind == "yarn":
        writer.add_rope_scaling_type(gguf.RopeScalingType.YARN)
        writer.add_rope_scaling_factor(float(rope["factor"]))
        original = rope.get("original_max_position_embeddings") or config.max_position_embeddings
        writer.add_rope_scaling_orig_ctx_len(int(original))
        if rope.get("attention_factor") is not None:
            plain = 0.1 * math.log(float(rope["factor"])) + 1.0  # what llama.cpp multiplies by itself
            writer.add_rope_scaling_attn_factors(float(rope["attention_factor"]) / plain)


def frequency_factors(config: Any) -> Tensor | None:
    """Llama 3's divisors of each frequency, float32 [head width / 2], or ``None`` for other kinds.

    As transformers computes them (``_compute_llama3_parameters``): wavelengths above ``original / low_freq_factor`` are
    divided by ``factor``, those under ``original / high_freq_factor`` kept, those between blended.
    """
    rope = rope_of(config)
    if rope.get("rope_type") != "llama3":
        return None
    width, base, factor = head_dim(config), float(rope["rope_theta"]), float(rope["factor"])
    low, high = float(rope["low_freq_factor"]), float(rope["high_freq_factor"])
    original = float(rope["original_max_position_embeddings"])
    wavelength = 2 * math.pi * base ** (torch.arange(0, width, 2, dtype=torch.float64) / width)
    smooth = ((original / wavelength - low) / (high - low)).clamp(0, 1)
    return (1 / ((1 - smooth) / factor + smooth)).float()
