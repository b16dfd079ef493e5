"""Layers that must share a scheme: those that one kernel computes together, and those that hold one weight.

Runtimes put query, key and value (and gate and up) into one product, so that their rows must be of one format. Such
layers read the same input in the same parent; they are found by the names that the field uses. Layers that share a
Parameter are one weight in memory and on disk: they move together, whatever their names.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final, Literal, get_args

from qat_plugin.errors import ConfigError
from qat_plugin.policy import Candidate

Grouping = Literal["fused", "layers"]

FUSED_NAMES: Final[tuple[tuple[str, ...], ...]] = (
    ("q_proj", "k_proj", "v_proj"),
    ("query", "key", "value"),
    ("q", "k", "v"),
    ("wq", "wk", "wv"),
    ("to_q", "to_k", "to_v"),
    ("q_lin", "k_lin", "v_lin"),
    ("query_proj", "key_proj", "value_proj"),
    ("gate_proj", "up_proj"),
    ("w1", "w3"),
    ("wi_0", "wi_1"),
    ("gate", "up"),
)
"""Names, inside one parent, of layers that are computed as one product."""


def fused_groups(found: Sequence[Candidate], *, groups: Grouping = "fused") -> list[tuple[Candidate, ...]]:
    """Part layers into groups whose members take one scheme.

    Args:
        found: the layers to part, in module order.
        groups: ``"fused"``: by name and parent, and by shared Parameter; ``"layers"``: by shared Parameter alone.

    Returns:
        The groups in the order of their first members; each candidate is in exactly one.

    Raises:
        ConfigError: for another word.
    """
    if groups not in get_args(Grouping):
        raise ConfigError(f"groups={groups!r} is not one of {', '.join(get_args(Grouping))}")
    leader = list(range(len(found)))

    def root(index: int) -> int:
        while leader[index] != index:
            index = leader[index]
        return index

    first: dict[object, int] = {}
    for index, candidate in enumerate(found):
        keys: list[object] = [id(candidate.module._parameters.get("weight"))]
        if groups == "fused" and (place := _place(candidate)) is not None:
            keys.append(place)
        for key in keys:
            other = root(first.setdefault(key, index))
            mine = root(index)
            leader[max(mine, other)] = min(mine, other)
    members: dict[int, list[Candidate]] = {}
    for index, candidate in enumerate(found):
        members.setdefault(root(index), []).append(candidate)
    return [tuple(group) for group in members.values()]


def _place(candidate: Candidate) -> tuple[str, int, int] | None:
    """Parent, set of names and length of the input of a layer that may be fused with others."""
    if candidate.kind == "embedding":
        return None
    parent, _, leaf = candidate.name.rpartition(".")
    which = next((i for i, names in enumerate(FUSED_NAMES) if leaf in names), None)
    return None if which is None else (parent, which, candidate.out_in[1])


def group_name(layers: Sequence[str]) -> str:
    """``model.layers.0.self_attn.{q_proj,k_proj,v_proj}`` for layers of one parent; others joined by ``+``."""
    if len(layers) == 1:
        return layers[0]
    parents = {name.rpartition(".")[0] for name in layers}
    if len(parents) > 1:
        return "+".join(layers)
    parent, leaves = parents.pop(), ",".join(name.rpartition(".")[2] for name in layers)
    return f"{parent}.{{{leaves}}}" if parent else f"{{{leaves}}}"
