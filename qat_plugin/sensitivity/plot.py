"""The damage of each group in each scheme as a picture."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from qat_plugin.errors import ConfigError
from qat_plugin.sensitivity.ranking import Sensitivity

_TALLEST: Final = 60.0  # inches
_LABELLED: Final = 100  # groups up to which each cell carries its figure


def plot(sensitivity: Sensitivity, path: Path, *, chosen: Mapping[str, str] | None = None) -> Path:
    """Write a heat map: groups down, schemes across by their bits, colour for the logarithm of the damage.

    Args:
        sensitivity: the figures.
        path: of the picture; its suffix says the format.
        chosen: group -> scheme; these cells are framed.

    Returns:
        ``path``.

    Raises:
        ConfigError: when matplotlib is not installed; the message has the line that installs it.
    """
    figure = _figure(sensitivity, chosen or {})
    figure.savefig(path, dpi=120, metadata={"Software": None} if path.suffix == ".png" else None)
    return path


def _figure(sensitivity: Sensitivity, chosen: Mapping[str, str]) -> Any:
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ConfigError(
            'a plot needs matplotlib: pip install ".[plots]" in a checkout of the project, or pip install '
            '"qat-plugin[plots]"'
        ) from error
    groups = list(dict.fromkeys(entry.group for entry in sensitivity.entries))
    by_bits = sorted(sensitivity.entries, key=lambda entry: (-entry.bits_per_weight, entry.scheme))
    schemes = list(dict.fromkeys(entry.scheme for entry in by_bits))
    damage = {(entry.group, entry.scheme): entry.damage for entry in sensitivity.entries}
    cells = [[_logarithm(damage.get((group, scheme))) for scheme in schemes] for group in groups]
    figure = Figure(figsize=(3.5 + 1.1 * len(schemes), min(1.8 + 0.24 * len(groups), _TALLEST)), layout="constrained")
    axes = figure.add_subplot()
    image = axes.imshow(cells, aspect="auto", cmap="viridis")
    axes.set_xticks(range(len(schemes)), schemes, rotation=35, ha="right", fontsize=7)
    axes.set_yticks(range(len(groups)), groups, fontsize=6)
    figure.colorbar(image, ax=axes, label="log10 of KL to the float model, nats a prediction", shrink=0.7)
    kind = "measured" if sensitivity.method == "kl" else "estimated from gradients"
    axes.set_title(f"Damage of one group at a time, {kind}", fontsize=9)
    for y, group in enumerate(groups):
        for x, scheme in enumerate(schemes):
            value = damage.get((group, scheme))
            if value is not None and len(groups) <= _LABELLED:
                axes.text(x, y, f"{value:.1e}", ha="center", va="center", fontsize=5, color="white")
            if chosen.get(group) == scheme:
                axes.add_patch(_frame(x, y))
    return figure


def _frame(x: int, y: int) -> Any:
    from matplotlib.patches import Rectangle

    return Rectangle((x - 0.5, y - 0.5), 1, 1, fill=False, edgecolor="red", linewidth=1.5)


def _logarithm(damage: float | None) -> float:
    return math.nan if damage is None or damage <= 0 else math.log10(damage)
