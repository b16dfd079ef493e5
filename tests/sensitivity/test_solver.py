"""The knapsack solver against brute force, and the search in exchanges against all assignments."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qat_plugin.sensitivity.improvement import Assignment, Search
from qat_plugin.sensitivity.options import Group, Option
from qat_plugin.sensitivity.solver import front

Values = list[list[tuple[int, float]]]
values = st.lists(
    st.lists(st.tuples(st.integers(0, 40), st.integers(0, 64).map(lambda n: n / 8)), min_size=1, max_size=4),
    min_size=1,
    max_size=5,
)  # eighths: sums of them are exact


def every(groups: Values) -> list[tuple[int, float]]:
    return [(sum(b for b, _ in c), sum(d for _, d in c)) for c in itertools.product(*groups)]


@settings(max_examples=150, deadline=None)
@given(values, st.integers(0, 160))
def test_the_least_damage_in_a_budget_is_brute_forces(groups: Values, budget: int) -> None:
    found = front(groups)
    best = min((d for b, d in every(groups) if b <= budget), default=None)
    index = found.within(budget)
    assert (index is None) == (best is None)
    if index is None:
        return
    chosen = [options[o] for options, o in zip(groups, found.choice(index), strict=True)]
    assert sum(d for _, d in chosen) == best == float(found.damage[index])
    assert sum(b for b, _ in chosen) == int(found.bytes[index]) <= budget


@settings(max_examples=150, deadline=None)
@given(values, st.integers(0, 200).map(lambda n: n / 8))
def test_the_fewest_bytes_for_a_damage_are_brute_forces(groups: Values, allowed: float) -> None:
    found = front(groups)
    index = found.least(allowed)
    best = min((b for b, d in every(groups) if d <= allowed), default=None)
    assert best == (None if index is None else int(found.bytes[index]))


@settings(max_examples=80, deadline=None)
@given(values)
def test_nothing_on_the_front_is_dominated(groups: Values) -> None:
    found = front(groups)
    assert found.exact
    pairs = list(zip(found.bytes.tolist(), found.damage.tolist(), strict=True))
    assert all(a[0] < b[0] and a[1] > b[1] for a, b in itertools.pairwise(pairs))


@settings(max_examples=60, deadline=None)
@given(values, st.integers(0, 160))
def test_with_few_states_what_is_found_is_still_a_choice_that_fits(groups: Values, budget: int) -> None:
    found = front(groups, states=4)
    exact = front(groups)
    index = found.within(budget)
    assert (index is None) == (exact.within(budget) is None), "the least reachable is never lost"
    if index is not None:
        chosen = [options[o] for options, o in zip(groups, found.choice(index), strict=True)]
        assert (sum(b for b, _ in chosen), sum(d for _, d in chosen)) == (
            int(found.bytes[index]), pytest.approx(float(found.damage[index])),
        )  # fmt: skip


def test_many_groups_with_odd_sizes_are_solved_closely_and_fast() -> None:
    groups = [[(8 * n + 7 * g, 1.0 * (g % 9 + 1) / (n + 1) ** 2) for n in range(6)] for g in range(120)]
    found = front(groups, states=2000)
    exact = front(groups, states=1 << 18)
    for budget in (60_000, 65_000, 75_000):
        a, b = found.within(budget), exact.within(budget)
        assert a is not None and b is not None
        assert float(found.damage[a]) <= 1.02 * float(exact.damage[b])


def test_a_group_without_options() -> None:
    with pytest.raises(ValueError, match="without options"):
        front([[(1, 1.0)], []])


def groups_of(sizes: list[list[int]]) -> list[Group]:
    return [
        Group(f"g{i}", (f"g{i}",), 1, tuple(Option(f"s{n}", (), size) for n, size in enumerate(options)))
        for i, options in enumerate(sizes)
    ]


SIZES = [[1, 2, 4], [2, 3, 6], [1, 3, 5], [2, 4, 8], [1, 2, 3]]
SINGLE = [[3.0, 1.5, 0.2], [2.5, 1.0, 0.1], [4.0, 2.0, 0.3], [2.0, 1.2, 0.2], [1.0, 0.6, 0.1]]


def interacting(assignment: Assignment) -> float:
    """Damages that add up to more than their sum, two groups most of all."""
    single = [damages[option] for damages, option in zip(SINGLE, assignment, strict=True)]
    return sum(single) + 0.3 * single[0] * single[2] + 0.1 * single[1] * single[3]


def test_exchanges_find_what_single_damages_do_not_tell() -> None:
    solved = front([[(b, d) for b, d in zip(s, v, strict=True)] for s, v in zip(SIZES, SINGLE, strict=True)])
    improved = 0
    for budget in range(9, 24):
        index = solved.within(budget)
        assert index is not None
        start = tuple(solved.choice(index))
        search = Search(groups_of(SIZES), SINGLE, interacting, 100)
        best = search.least_damage(start, budget)
        allowed = [a for a in itertools.product(range(3), repeat=5) if search.bytes(a) <= budget]
        assert search.bytes(best) <= budget
        assert interacting(best) <= 1.1 * min(map(interacting, allowed))
        improved += interacting(best) < interacting(start)
    assert improved >= 2


@pytest.mark.parametrize("measurements", [1, 2, 5, 12, 40])
def test_a_search_measures_no_more_than_it_may_and_never_worsens(measurements: int) -> None:
    told: list[int] = []
    search = Search(groups_of(SIZES), SINGLE, interacting, measurements, told.append)
    start = (1, 1, 1, 1, 1)
    best = search.least_damage(start, 14)
    assert interacting(best) <= interacting(start)
    assert search.made == len(told) <= measurements
    assert search.bytes(best) <= 14


def test_bytes_are_saved_only_while_the_damage_is_allowed() -> None:
    search = Search(groups_of(SIZES), SINGLE, interacting, 60)
    best = search.fewest_bytes((2, 2, 2, 2, 2), lambda a: search.damage(a) <= 5.0)
    assert interacting(best) <= 5.0
    assert search.bytes(best) < search.bytes((2, 2, 2, 2, 2))
