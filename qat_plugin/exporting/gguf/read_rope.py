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
_LLAMA3: Final = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}


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


def _llama3(metadata: Metadata, width: int, theta: float) -> dict[str, Any]:
    info = metadata.header.tensors[FACTORS]
    if info.kind != "F32" or info.shape != (width // 2,):
        raise metadata.refused(f"{FACTORS} is {info.kind} {info.shape}, not F32 {(width // 2,)}")
    divisors = metadata.header.data(FACTORS).view(np.float32).astype(np.float64)
    factor = float(divisors.max())
    low, high, original = _LLAMA3.values()
    if not 1 <= factor < math.inf or not np.allclose(
        llama3_divisors(width, theta, factor, low, high, int(original)), divisors, rtol=1e-4, atol=0
    ):
        raise metadata.refused(f"{FACTORS} is not what Llama 3's frequencies are divided by, and cannot be read")
    return {"rope_type": "llama3", "rope_theta": theta, "factor": factor, **_LLAMA3}
