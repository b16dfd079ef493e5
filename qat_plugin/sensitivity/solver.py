"""One option a group so that bytes and damage are both as small as can be: the multiple-choice knapsack problem.

Groups are added one after another to the list of undominated (bytes, damage) sums (Nemhauser and Ullmann, Management
Science 15(9), 1969). The list holds every best choice for every budget. Layers repeat, so that sums of bytes coincide
and the list stays short; where it does not, one sum is kept in each of many equal slices of bytes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

STATES: Final = 1 << 15
"""Sums that are kept. With no more the result is exact; beyond it, within one slice of bytes a group."""

Value = tuple[int, float]
"""(bytes, damage) of one option."""


@dataclass(frozen=True)
class Front:
    """All choices that nothing betters in both bytes and damage.

    Attributes:
        bytes: int64 [n], ascending.
        damage: float64 [n], descending.
        exact: whether no sum was left out.
    """

    bytes: Tensor
    damage: Tensor
    exact: bool
    _steps: tuple[tuple[Tensor, Tensor], ...]

    def __len__(self) -> int:
        return len(self.bytes)

    def choice(self, index: int) -> list[int]:
        """The option of each group in one of the choices."""
        chosen = []
        for previous, option in reversed(self._steps):
            chosen.append(int(option[index]))
            index = int(previous[index])
        return chosen[::-1]

    def within(self, budget: int) -> int | None:
        """Index of the least damage in so many bytes; ``None`` when nothing fits."""
        fitting = int((self.bytes <= budget).sum())
        return fitting - 1 if fitting else None

    def least(self, damage: float) -> int | None:
        """Index of the fewest bytes with no more than this damage; ``None`` when there is none."""
        allowed = (self.damage <= damage).nonzero()
        return int(allowed[0]) if len(allowed) else None


def front(groups: Sequence[Sequence[Value]], *, states: int = STATES) -> Front:
    """Find all undominated choices of one option a group.

    Args:
        groups: (bytes, damage) of each option of each group; damages add up.
        states: sums to keep.

    Raises:
        ValueError: when a group has no option.
    """
    sizes = torch.zeros(1, dtype=torch.int64)
    damages = torch.zeros(1, dtype=torch.float64)
    steps: list[tuple[Tensor, Tensor]] = []
    exact = True
    for options in groups:
        if not options:
            raise ValueError("a group without options cannot be chosen for")
        option_bytes = torch.tensor([size for size, _ in options], dtype=torch.int64)
        option_damage = torch.tensor([damage for _, damage in options], dtype=torch.float64)
        every_size = (sizes[:, None] + option_bytes).flatten()
        every_damage = (damages[:, None] + option_damage).flatten()
        kept = _undominated(every_size, every_damage)
        if len(kept) > states:
            kept, exact = kept[_sliced(every_size[kept], states)], False
        steps.append((kept // len(options), kept % len(options)))
        sizes, damages = every_size[kept], every_damage[kept]
    return Front(sizes, damages, exact, tuple(steps))


def _undominated(sizes: Tensor, damages: Tensor) -> Tensor:
    """Indices, by ascending bytes, of the sums to which none is equal or better; of equal ones the first."""
    order = torch.sort(damages, stable=True).indices
    order = order[torch.sort(sizes[order], stable=True).indices]
    damage = damages[order]
    lowest_before = torch.cummin(damage, 0).values.roll(1)
    lowest_before[0] = torch.inf
    return order[damage < lowest_before]


def _sliced(sizes: Tensor, states: int) -> Tensor:
    """Positions of the last (least damaging) sum in each of ``states`` slices of bytes, and of the first of all."""
    low, high = int(sizes[0]), int(sizes[-1])
    piece = ((sizes - low).double() * (states - 1) / max(high - low, 1)).long()
    last = torch.ones(len(sizes), dtype=torch.bool)
    last[:-1] = piece[1:] != piece[:-1]
    last[0] = True  # the least reachable
    return last.nonzero()[:, 0]
