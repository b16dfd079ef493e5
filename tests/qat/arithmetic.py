"""The grid of the README, written a second time in float64 and numpy: the other side of the comparisons."""

from __future__ import annotations

import re
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Grid:
    """What a weight becomes: integers, and one scale and zero point per weight (broadcast)."""

    q: Array
    scale: Array
    zero: Array

    @property
    def weight(self) -> Array:
        return (self.q - self.zero) * self.scale


def significant(x: Array, bits: int) -> Array:
    """Nearest number of ``bits`` significant bits, half to even."""
    mantissa, exponent = np.frexp(x)
    return np.ldexp(np.round(mantissa * 2.0**bits), exponent - bits)


def grid(weight: Tensor, scheme: str) -> Grid:
    """Round-to-nearest quantization of [out, in] by the published formulas."""
    w = weight.detach().double().numpy()
    match = re.match(r"w(\d)a\d+", scheme)
    assert match is not None
    bits = int(match[1])
    group = re.search(r"-g(\d+)", scheme)
    if "-tensor" in scheme:
        groups = w.reshape(1, -1)
    else:
        groups = w.reshape(-1, int(group[1]) if group else w.shape[1])
    low, high = groups.min(1, keepdims=True), groups.max(1, keepdims=True)
    if "asym" in scheme:
        low, high = np.minimum(low, 0), np.maximum(high, 0)
        d = significant((high - low) / (2**bits - 1), 7)
        z = np.clip(np.floor(-low / d + 0.5), 0, 2**bits - 1)
        q = np.clip(np.floor(groups / d + 0.5) + z, 0, 2**bits - 1)
    elif bits == 8:
        d, z = significant(np.maximum(high, -low) / 127, 8), np.zeros_like(low)
        q = np.clip(np.floor(groups / d + 0.5), -127, 127)
    else:
        least = -(2 ** (bits - 1))
        d, z = significant(np.where(high > -low, high, low) / least, 8), np.zeros_like(low)
        q = np.clip(np.floor(groups / d + 0.5), least, -least - 1)
    return Grid(q.reshape(w.shape), *((np.zeros_like(groups) + part).reshape(w.shape) for part in (d, z)))


def per_token(x: Tensor) -> Array:
    """Symmetric INT8, one scale per last-dimension row, half to even."""
    a = x.detach().double().numpy()
    scale = np.abs(a).max(-1, keepdims=True) / 127
    scale[scale == 0] = 1
    return np.asarray(np.round(a / scale) * scale)


def per_tensor(x: Tensor, absmax: float) -> Array:
    """Symmetric INT8 with one calibrated scale."""
    scale = absmax / 127
    return np.asarray(np.clip(np.round(x.detach().double().numpy() / scale), -127, 127) * scale)
