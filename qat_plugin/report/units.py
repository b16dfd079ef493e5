"""Numbers as people read them. Only renderings use these; what is saved as JSON is never rounded."""

from __future__ import annotations

import math


def in_bytes(count: int) -> str:
    """Binary units with four significant digits: 1784874 -> "1.702 MiB"."""
    value, unit = float(count), "B"
    for larger in ("KiB", "MiB", "GiB", "TiB"):
        if value < 1024:
            break
        value, unit = value / 1024, larger
    if unit == "B":
        return f"{count} B"
    return f"{value:.{4 - len(str(int(value)))}f} {unit}"


def in_milliseconds(seconds: float) -> str:
    """Seconds as milliseconds: 0.00123 -> "1.230 ms"."""
    return f"{seconds * 1000:.3f} ms"


def percent(share: float) -> str:
    """A share as a percentage with two decimals; six where two would turn nearly all into all or little into none."""
    text = f"{100 * share:.2f}%"
    if math.isfinite(share) and text in ("0.00%", "-0.00%", "100.00%") and share not in (0.0, 1.0):
        return f"{100 * share:.6f}%"
    return text


def times(ratio: float) -> str:
    """A ratio with two decimals, without any from ten on: 0.6134 -> "0.61x", 12.3 -> "12x"."""
    return f"{ratio:.2f}x" if abs(ratio) < 10 else f"{ratio:.0f}x"


def decibels(value: float) -> str:
    """A ratio in dB; infinite where two tensors are equal."""
    return "equal" if value == math.inf else f"{value:.1f} dB"
