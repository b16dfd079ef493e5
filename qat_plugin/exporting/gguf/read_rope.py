"""Rotary positions of a GGUF file as transformers' ``rope_parameters``.

Llama 3's stretched frequencies lie in GGUF as a tensor of divisors, without the parameters that they were computed
from. These are found again: the divisors that they give must be the tensor's own.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    from qat_plugin.exporting.gguf.read_config import Metadata

FACTORS: Final = "rope_freqs.weight"
# What a model was stretched from: Llama 3's own first.
_ORIGINALS: Final = (8192, *(1 << exponent for exponent in range(5, 21) if exponent != 13))
_YARN_ELSEWHERE: Final = tuple(
    f"rope.scaling.yarn_{name}" for name in ("log_multiplier", "ext_factor", "attn_factor", "beta_fast", "beta_slow")
)


def shortest(value: float) -> float:
    """The shortest decimal whose float32 this is: 1e-5 is stored as 9.99999974e-06."""
    return float(str(np.float32(value))) if math.isfinite(value) else value


def rope_parameters(metadata: Metadata, width: int, default_theta: float) -> dict[str, Any]:
    """The parameters.

    Args:
        metadata: of the file.
        width: of a head.
        default_theta: base of the frequencies where the file states none.

    Raises:
        CheckpointError: for a scaling that cannot be told exactly.
    """
    theta = metadata.number("rope.freq_base", default_theta)
    kind = metadata.value("rope.scaling.type")
    if FACTORS in metadata.header.tensors:
        return _llama3(metadata, width, theta)
    if kind == "linear" and (factor := metadata.number("rope.scaling.factor")) != 1:
        return {"rope_type": "linear", "rope_theta": theta, "factor": factor}
    if kind == "yarn":
        return _yarn(metadata, theta)
    if kind not in (None, "none", "linear"):
        raise metadata.refused(f"its positions are scaled by {kind!r}, which cannot be read exactly")
    return {"rope_type": "default", "rope_theta": theta}


def llama3_divisors(
    width: int, theta: float, factor: float, low: float, high: float, original: int
) -> npt.NDArray[Any]:
    """What Llama 3 divides its frequencies by, float64 [width / 2].

    Frequencies of long waves are divided by ``factor``, of short ones not at all, those between by a blend (Llama 3.1;
    transformers' ``rope_type="llama3"``).
    """
    waves = 2 * math.pi * theta ** (np.arange(0, width, 2, dtype=np.float64) / width)
    blend = (original / waves - low) / (high - low)
    between = 1 / ((1 - blend) / factor + blend)
    return np.where(waves < original / high, 1.0, np.where(waves > original / low, factor, between))


def _yarn(metadata: Metadata, theta: float) -> dict[str, Any]:
    """YaRN (arXiv:2309.00071) as llama.cpp and transformers both compute it."""
    factor = metadata.number("rope.scaling.factor")
    if unknown := [name for name in _YARN_ELSEWHERE if metadata.has(name)]:
        raise metadata.refused(f"its YaRN has {', '.join(unknown)}, which cannot be read")
    found = {
        "rope_type": "yarn",
        "rope_theta": theta,
        "factor": factor,
        "original_max_position_embeddings": metadata.whole(
            "rope.scaling.original_context_length", metadata.whole("context_length")
        ),
    }
    if metadata.has("rope.scaling.attn_factor"):  # on top of what llama.cpp multiplies by itself
        plain = 0.1 * math.log(factor) + 1.0
        found["attention_factor"] = shortest(float(metadata.value("rope.scaling.attn_factor")) * plain)
    return found


def _llama3(metadata: Metadata, width: int, theta: float) -> dict[str, Any]:
    info = metadata.header.tensors[FACTORS]
    if info.kind != "F32" or info.shape != (width // 2,):
        raise metadata.refused(f"{FACTORS} is {info.kind} {info.shape}, not F32 {(width // 2,)}")
    divisors = metadata.header.data(FACTORS).view(np.float32).astype(np.float64)
    factor = float(divisors.max())
    if math.isclose(round(factor, 2), factor, rel_tol=1e-6):  # a quotient of float32 numbers, it may be
        factor = round(factor, 2)
    for original in _ORIGINALS if 1 <= factor < math.inf else ():
        parameters = {"factor": factor, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
        if np.allclose(llama3_divisors(width, theta, factor, 1.0, 4.0, original), divisors, rtol=1e-5, atol=0):
            parameters["original_max_position_embeddings"] = original
            return {"rope_type": "llama3", "rope_theta": theta, **parameters}
    raise metadata.refused(f"{FACTORS} is not what Llama 3's frequencies are divided by, and cannot be read")
