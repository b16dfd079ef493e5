"""A saved plan (``Plan.to_list()``) as the report reads it: layers left in float, blocks folded, sums by scheme."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from qat_plugin.scheme import FLOAT_DTYPES

Layer = Mapping[str, Any]


@dataclass(frozen=True)
class PlanLine:
    """Layers of a plan that differ only by the index of their block.

    Attributes:
        name: a name, with ``*`` for the index where there are several.
        count: number of layers.
        scheme: what they become; ``"kept"`` when they stay as they are.
        rule: the rule that decided.
        kernel: the kernel that runs them.
        remark: why they stay, what they are tied to, what to know about the kernel.
        bytes_before, bytes_after: of all of them together.
    """

    name: str
    count: int
    scheme: str
    rule: str
    kernel: str
    remark: str
    bytes_before: int
    bytes_after: int


def is_float(layer: Layer) -> bool:
    """Whether the layer's weight is stored as a float type: kept as it was, or cast."""
    return layer.get("scheme") is None or layer["scheme"] in FLOAT_DTYPES


def stored_bytes(layer: Layer) -> int:
    """Bytes of the layer's weight after conversion; a tied weight counts where it is seen first."""
    return int(layer.get("bytes_after") or 0)


def folded(plan: Iterable[Layer]) -> list[PlanLine]:
    """One line per group of layers that differ only by their first index, in the order of the plan."""
    groups: dict[tuple[object, ...], list[Layer]] = {}
    for layer in plan:
        pattern = re.sub(r"(?<![^.])\d+(?![^.])", "*", layer["name"], count=1)
        shape = tuple(layer.get("shape") or ())
        key = (pattern, shape, _scheme(layer), layer.get("rule"), layer.get("kernel"), _remark(layer))
        groups.setdefault(key, []).append(layer)
    return [_line(str(pattern), layers) for (pattern, *_), layers in groups.items()]


def by_scheme(plan: Iterable[Layer]) -> list[PlanLine]:
    """One line per scheme with the sums over its layers, largest after conversion first."""
    groups: dict[str, list[Layer]] = {}
    for layer in plan:
        groups.setdefault(_scheme(layer), []).append(layer)
    lines = [_line(scheme, layers) for scheme, layers in groups.items()]
    return sorted(lines, key=lambda line: -line.bytes_after)


def _line(pattern: str, layers: list[Layer]) -> PlanLine:
    first = layers[0]
    return PlanLine(
        name=first["name"] if len(layers) == 1 else pattern,
        count=len(layers),
        scheme=_scheme(first),
        rule=str(first.get("rule") or ""),
        kernel=str(first.get("kernel") or ""),
        remark=_remark(first),
        bytes_before=sum(int(layer.get("bytes_before") or 0) for layer in layers),
        bytes_after=sum(stored_bytes(layer) for layer in layers),
    )


def _scheme(layer: Layer) -> str:
    return str(layer.get("scheme") or "kept")


def _remark(layer: Layer) -> str:
    tied = f"tied to {layer['tied_to']}" if layer.get("tied_to") else ""
    return "; ".join(text for text in (layer.get("reason"), tied, layer.get("note")) if text)
