"""Chosen schemes as the rules of an ordinary Policy: as few as say it, none that says more."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from torch import nn

from qat_plugin.errors import PolicyError
from qat_plugin.policy import Candidate, Plan, Policy, Rule, candidates
from qat_plugin.scheme import Scheme


def exactly(name: str) -> str:
    """A policy's pattern that matches the layer of this name and no other."""
    return f"re:{re.escape(name)}$"


def policy_from(model: nn.Module, plan: Plan, schemes: Mapping[str, Scheme | None]) -> Policy:
    """The policy that gives each layer its scheme and keeps all others.

    Layers that differ only by indices in their names and take one scheme share a rule
    (``model.layers.*.mlp.down_proj``); others have one each, on the exact name.

    Args:
        model: the model.
        plan: of that model.
        schemes: layer -> its scheme; ``None`` keeps it.

    Raises:
        PolicyError: when the rules would not give these schemes; that would be a bug.
    """
    found = candidates(model)
    wanted: dict[str, Scheme | None] = {layer.name: schemes.get(layer.name) for layer in plan}
    rules: dict[str, Scheme | None] = {}
    said: set[str] = set()
    for name, scheme in wanted.items():
        if scheme is None or name in said:
            continue
        pattern, names = _pattern(name, scheme, wanted, found)
        rules[pattern] = scheme
        said |= names
    policy = Policy(rules, indivisible="error")
    made = {layer.name: layer.scheme for layer in policy.plan(model)}
    if wrong := [name for name, scheme in wanted.items() if made[name] != scheme]:
        raise PolicyError(f"the rules found give {wrong[0]} {made[wrong[0]] or 'no scheme'}, not {wanted[wrong[0]]}")
    return policy


def _pattern(
    name: str, scheme: Scheme, wanted: Mapping[str, Scheme | None], found: Sequence[Candidate]
) -> tuple[str, set[str]]:
    """The widest pattern, of those that suggest themselves, all of whose layers take this scheme."""
    for pattern in dict.fromkeys((re.sub(r"(?<![^.])\d+(?![^.])", "*", name), name)):
        names = {c.name for c in found if c.kind != "norm" and Rule(pattern, None).matches(c)}
        if name in names and all(wanted.get(other) == scheme for other in names):
            return pattern, names
    return exactly(name), {name}
