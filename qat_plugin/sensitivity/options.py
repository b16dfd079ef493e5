"""What there is to choose: the groups of a model's layers, and the schemes that each could take with their bytes."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Final

from torch import nn

from qat_plugin.errors import PolicyError
from qat_plugin.policy import Candidate, LayerPlan, Plan, Policy, Rule, candidates
from qat_plugin.scheme import Scheme
from qat_plugin.sensitivity.cost import Ledger, layer_bytes, ledger_of
from qat_plugin.sensitivity.fused import Grouping, fused_groups, group_name
from qat_plugin.sensitivity.rules import exactly

CANDIDATES: Final[tuple[str, ...]] = (
    "w8a16", "w4a16-g16-asym", "w4a16-g16", "w4a16-g32-asym", "w4a16-g32", "w4a16-g64-asym", "w4a16-g64",
    "w3a16-g32-asym", "w3a16-g64-asym", "w2a16-g16-asym",
)  # fmt: skip
"""Schemes to choose from where none are given: weights only, from about 8 to 3.4 bits with all that they take."""

KEEP: Final = "keep"
"""The candidate that leaves a layer as it is."""


@dataclass(frozen=True)
class Option:
    """One scheme that a group could take.

    Attributes:
        scheme: as it would be written for the group's first layer; ``"keep"`` for none.
        layers: the plan of each layer of the group.
        bytes: what the group's weights take in the file.
    """

    scheme: str
    layers: tuple[LayerPlan, ...]
    bytes: int


@dataclass(frozen=True)
class Group:
    """Layers that take one scheme together.

    Attributes:
        name: of the group.
        layers: names of its layers.
        weights: number of distinct weights.
        options: what it could become, the cheapest first.
    """

    name: str
    layers: tuple[str, ...]
    weights: int
    options: tuple[Option, ...]

    def option(self, scheme: str) -> Option:
        """The option of that spelling.

        Raises:
            KeyError: when the group has none.
        """
        return next(option for option in self.options if option.scheme == scheme)


@dataclass(frozen=True)
class Choices:
    """All groups of one model.

    Attributes:
        groups: in module order.
        plans: candidate -> the plan in which every layer takes it.
        ledger: what the file holds beside them.
    """

    groups: tuple[Group, ...]
    plans: Mapping[str, Plan]
    ledger: Ledger

    @property
    def least(self) -> int:
        """Bytes of the chosen layers when each group takes its cheapest option."""
        return sum(group.options[0].bytes for group in self.groups)


def choices_of(
    model: nn.Module,
    schemes: Sequence[str | Scheme] = CANDIDATES,
    *,
    groups: Grouping = "fused",
    keep: Sequence[str] = (),
    embeddings: bool = False,
) -> Choices:
    """Find what there is to choose in a model. Touches no weight; the model may be on the meta device.

    A group size that does not divide a layer's ``in_features`` becomes, for that layer, the nearest divisor (in the
    ratio of sizes): 43 for 32 in a layer of 172.

    Args:
        model: the float model.
        schemes: the candidates; ``"keep"`` leaves a layer as it is.
        groups: which layers move together; see :func:`~qat_plugin.sensitivity.fused.fused_groups`.
        keep: patterns of layers that stay in float, as in a Policy.
        embeddings: let embeddings and output heads take part too.

    Raises:
        PolicyError: when there is no candidate, or no layer to choose for.
        SchemeError: for a misspelt one.
    """
    parsed = [None if scheme == KEEP else Scheme.parse(scheme) for scheme in schemes]
    if not [scheme for scheme in parsed if scheme is not None]:
        raise PolicyError(
            "there is nothing to choose from: give at least one candidate scheme, such as 'w4a16-g32-asym'"
        )
    for scheme in parsed:
        if scheme is not None and scheme.kind == "nf4":
            raise PolicyError(f"{scheme} is a frozen base for QLoRA fine-tuning, not a candidate: give integer schemes")
    found = candidates(model)
    plans = {str(scheme): _uniform(model, found, scheme, keep, embeddings) for scheme in parsed if scheme is not None}
    taking_part = {layer.name for plan in plans.values() for layer in plan.quantized}
    mine = [candidate for candidate in found if candidate.name in taking_part]
    if not mine:
        raise PolicyError(f"{type(model).__name__} has no layer to choose a scheme for: all are kept")
    made = tuple(_group(members, plans, KEEP in schemes) for members in fused_groups(mine, groups=groups))
    return Choices(made, plans, ledger_of(model, taking_part, list(plans.values())))


def nearest_divisor(number: int, wanted: int) -> int:
    """The divisor of ``number`` whose ratio to ``wanted`` is nearest to one; of two, the smaller."""
    divisors = [d for d in range(1, number + 1) if number % d == 0]
    return min(divisors, key=lambda d: (abs(math.log(d / wanted)), d))


def _uniform(
    model: nn.Module, found: Sequence[Candidate], scheme: Scheme, keep: Sequence[str], embeddings: bool
) -> Plan:
    """The plan in which every layer takes one scheme, each with a group size that divides it."""
    patterns = [Rule(pattern, None) for pattern in keep]
    rules: dict[str, str | Scheme | None] = {}
    roles: dict[str, str | Scheme | None] = {}
    for candidate in found:
        ends = [role for role in ("embedding", "head") if role in candidate.roles]
        kept = any(pattern.matches(candidate) for pattern in patterns) or (ends and not embeddings)
        if kept or candidate.blocked or candidate.kind not in ("linear", "conv1d", "embedding"):
            continue
        columns = candidate.out_in[1]
        if scheme.group_size is not None and columns % scheme.group_size:
            rules[exactly(candidate.name)] = scheme.with_group_size(nearest_divisor(columns, scheme.group_size))
        else:
            roles |= dict.fromkeys(ends, scheme)
    return Policy({**rules, **roles, "default": scheme}, keep=keep).plan(model)


def _group(members: Sequence[Candidate], plans: Mapping[str, Plan], keeping: bool) -> Group:
    names = tuple(candidate.name for candidate in members)
    options: dict[tuple[Scheme | None, ...], Option] = {}
    entries = [tuple(plan[name] for name in names) for plan in plans.values()]
    if keeping:
        entries.append(tuple(replace(layer, scheme=None, kernel="float") for layer in entries[0]))
    for layers in entries:
        if any(layer.kernel == "none" for layer in layers):  # no kernel here would run it
            continue
        first = next((layer.scheme for layer in layers if layer.scheme is not None), None)
        option = Option(KEEP if first is None else str(first), layers, sum(map(layer_bytes, layers)))
        options.setdefault(tuple(layer.scheme for layer in layers), option)
    if not options:
        raise PolicyError(f"{group_name(names)}: no candidate has a kernel here: {entries[0][0].note}")
    distinct = {id(candidate.module._parameters["weight"]): candidate for candidate in members}
    weights = sum(math.prod(candidate.out_in) for candidate in distinct.values())
    return Group(group_name(names), names, weights, tuple(sorted(options.values(), key=lambda o: (o.bytes, o.scheme))))
