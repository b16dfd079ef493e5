"""From the sum of single damages to the damage that is: assignments measured as a whole, and improved in exchanges.

Single-layer damages under-predict their joint effect, and not evenly. So after the solver each group is tried one step
cheaper and one step dearer **in the midst of all the others as they are**, and pairs of such steps (one saves, one
spends) are taken in the order of what they promise, each only if the model measured with it is better.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Final

from qat_plugin.sensitivity.options import Group
from qat_plugin.sensitivity.solver import front

_HOPE: Final = 0.1
"""A move that promises to be worse by less than this share of the damage is tried, after all that promise more."""

Assignment = tuple[int, ...]
"""Index of the option that each group takes."""


@dataclass
class Search:
    """A local search over assignments with a limited number of measurements.

    Args:
        groups: what there is to choose.
        single: damage of each option of each group, measured alone.
        measure: the damage of a whole assignment, the less the better; each new one costs a measurement.
        measurements: how many may be made.
        on_measured: told how many were made, after each.
    """

    groups: Sequence[Group]
    single: Sequence[Sequence[float]]
    measure: Callable[[Assignment], float]
    measurements: int
    on_measured: Callable[[int], None] = lambda made: None
    made: int = 0
    _known: dict[Assignment, float] = field(default_factory=dict)

    def bytes(self, assignment: Assignment) -> int:
        """Bytes that an assignment takes."""
        return sum(group.options[option].bytes for group, option in zip(self.groups, assignment, strict=True))

    def predicted(self, assignment: Assignment) -> float:
        """The sum of single damages."""
        return sum(damages[option] for damages, option in zip(self.single, assignment, strict=True))

    def damage(self, assignment: Assignment) -> float:
        """The measured damage; one that was measured before is not measured again."""
        if assignment not in self._known:
            self._known[assignment] = self.measure(assignment)
            self.made += 1
            self.on_measured(self.made)
        return self._known[assignment]

    @property
    def spent(self) -> bool:
        """Whether no measurement is left."""
        return self.made >= self.measurements

    def least_damage(self, start: Assignment, budget: int) -> Assignment:
        """Improve an assignment within a budget of bytes.

        Args:
            start: fits the budget.
            budget: bytes.

        Returns:
            The best that was measured; ``start`` when nothing is better.
        """
        best = start
        self.damage(best)
        while not self.spent:
            steps = self._steps(best)
            solved = self._solved(best, steps, budget)
            better = solved if not self.spent and self.damage(solved) < self.damage(best) else best
            better = better if better != best else self._exchanged(best, steps, budget)
            if better == best:
                return best
            best = better
        return best

    def fewest_bytes(self, start: Assignment, allowed: Callable[[Assignment], bool]) -> Assignment:
        """Save bytes step by step while the assignment is allowed.

        Args:
            start: allowed.
            allowed: whether an assignment, which it measures, is good enough.
        """
        best = start
        left = self._savings(best)
        while left and not self.spent:
            cheaper = left.pop(0)
            if allowed(cheaper):
                best = cheaper
                left = self._savings(best)
        return best

    def _steps(self, around: Assignment) -> dict[tuple[int, int], float]:
        """(group, option) -> change of the damage; measured one step away while measurements last, else estimated."""
        base = self.damage(around)
        ratio = base / total if (total := self.predicted(around)) > 0 else 1.0
        found: dict[tuple[int, int], float] = {}
        for group, single in enumerate(self.single):
            for option in self._useful(group):
                if option != around[group]:
                    found[group, option] = ratio * (single[option] - single[around[group]])
        wanted = [
            (group, option) for group in range(len(self.groups)) for option in self._neighbours(group, around[group])
        ]
        wanted.sort(key=lambda step: (self._promise(step, around), step))
        for group, option in wanted:
            there = _with(around, group, option)
            if there in self._known or self.made < self.measurements // 2 + self.measurements // 4:
                found[group, option] = self.damage(there) - base
        return found

    def _solved(self, around: Assignment, steps: dict[tuple[int, int], float], budget: int) -> Assignment:
        """What the solver makes of the damages as they are in the midst of the others."""
        values = []
        for group, options in enumerate(self.groups):
            here, never = around[group], float("inf")
            change = [0.0 if i == here else steps.get((group, i), never) for i in range(len(options.options))]
            values.append([(option.bytes, damage) for option, damage in zip(options.options, change, strict=True)])
        solutions = front(values)
        index = solutions.within(budget)
        return around if index is None else tuple(solutions.choice(index))

    def _promise(self, step: tuple[int, int], around: Assignment) -> float:
        """Change of the damage for each byte that a step changes: the steepest gains and the mildest losses first."""
        group, option = step
        damage = self.single[group][option] - self.single[group][around[group]]
        size = self.groups[group].options[option].bytes - self.groups[group].options[around[group]].bytes
        return damage / size if size > 0 else -damage / min(size, -1)

    def _neighbours(self, group: int, option: int) -> list[int]:
        """The next useful options below and above in bytes: those that no cheaper one betters."""
        useful = self._useful(group)
        below, above = [i for i in useful if i < option], [i for i in useful if i > option]
        return [*below[-1:], *above[:1]]

    def _useful(self, group: int) -> list[int]:
        damages = self.single[group]
        return [i for i in range(len(damages)) if all(damages[i] < damages[j] for j in range(i))]

    def _exchanged(self, best: Assignment, steps: dict[tuple[int, int], float], budget: int) -> Assignment:
        """Take steps and pairs of steps that promise most, each if it measures better."""
        moves: list[tuple[float, tuple[tuple[int, int], ...]]] = [(change, (step,)) for step, change in steps.items()]
        listed = sorted(steps.items())
        moves += [
            (first_change + second_change, (first, second))
            for i, (first, first_change) in enumerate(listed)
            for second, second_change in listed[i + 1 :]
            if first[0] != second[0]
        ]
        moves = sorted(move for move in moves if move[0] < _HOPE * self.damage(best))
        moved: set[int] = set()
        for _, parts in moves:
            if self.spent:
                break
            if moved & {group for group, _ in parts}:
                continue
            candidate = best
            for group, option in parts:
                candidate = _with(candidate, group, option)
            if self.bytes(candidate) > budget:
                continue
            if self.damage(candidate) < self.damage(best):
                best = candidate
                moved |= {group for group, _ in parts}
        return best

    def _savings(self, best: Assignment) -> list[Assignment]:
        """Assignments with one group a step cheaper, those first whose damage is least for each byte."""
        found = []
        for group in range(len(self.groups)):
            for option in self._neighbours(group, best[group]):
                if option < best[group]:
                    cheaper = _with(best, group, option)
                    saved = self.bytes(best) - self.bytes(cheaper)
                    cost = self.single[group][option] - self.single[group][best[group]]
                    if saved > 0:
                        found.append((cost / saved, cheaper))
        return [cheaper for _, cheaper in sorted(found)]


def _with(assignment: Assignment, group: int, option: int) -> Assignment:
    return (*assignment[:group], option, *assignment[group + 1 :])
