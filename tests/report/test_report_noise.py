from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qat_plugin.measure import LMMetrics
from qat_plugin.report import paired_difference
from qat_plugin.report.noise import _student_t


def measured(losses: list[float], counts: list[int] | None = None) -> LMMetrics:
    counts = counts or [10] * len(losses)
    loss = float(np.average(losses, weights=counts)) if losses else 1.0
    return LMMetrics(loss, math.exp(loss), sum(counts), losses=tuple(losses), counts=tuple(counts))


T_TABLE = {4: 2.776445, 5: 2.570582, 10: 2.228139, 30: 2.042272, 1000: 1.962339}
"""97.5% quantiles of Student's t by degrees of freedom, from the printed table."""


@settings(max_examples=50, deadline=None)
@given(seed=st.integers(0, 2**31), freedom=st.sampled_from([4, 5, 10, 30]), gap=st.floats(-1, 1))
def test_with_equal_windows_it_is_the_paired_t_interval(seed: int, freedom: int, gap: float) -> None:
    generator = np.random.default_rng(seed)
    first, second = generator.normal(3 + gap, 1, freedom + 1), generator.normal(3, 1, freedom + 1)
    difference = paired_difference(measured(first.tolist()), measured(second.tolist()))
    mean = (first - second).mean()
    half = T_TABLE[freedom] * (first - second).std(ddof=1) / math.sqrt(freedom + 1)
    assert difference is not None
    assert difference.mean == pytest.approx(mean)
    assert difference.half_width == pytest.approx(half, rel=0.005)
    if abs(abs(mean) - half) > 0.01 * half:
        assert difference.beyond_noise == (abs(mean) > half)


def test_the_mean_is_the_difference_of_the_token_weighted_losses() -> None:
    counts = [1, 50, 3, 100, 20, 7]
    first, second = measured([1, 2, 3, 4, 5, 6], counts), measured([2, 2, 1, 4.5, 5, 5.5], counts)
    difference = paired_difference(first, second)
    assert difference is not None
    assert difference.mean == pytest.approx(first.loss - second.loss)
    assert difference.pairs == 6


def test_the_interval_covers_the_truth_about_95_times_in_100() -> None:
    generator = np.random.default_rng(1)
    covered = 0
    for _ in range(1000):
        counts = generator.integers(20, 200, 25)
        hard = generator.normal(3, 1, 25)  # shared by both models, and much larger than their difference
        first, second = hard + generator.normal(0.05, 0.1, 25), hard + generator.normal(0, 0.1, 25)
        difference = paired_difference(
            measured(first.tolist(), counts.tolist()), measured(second.tolist(), counts.tolist())
        )
        assert difference is not None
        covered += abs(difference.mean - 0.05) <= difference.half_width
    assert 0.92 < covered / 1000 < 0.98


def test_equal_losses_are_within_noise() -> None:
    difference = paired_difference(measured([1.0] * 9), measured([1.0] * 9))
    assert difference is not None
    assert (difference.mean, difference.half_width, difference.beyond_noise) == (0.0, 0.0, False)


@pytest.mark.parametrize(
    ("first", "second"),
    [
        (measured([]), measured([])),
        (measured([1.0] * 9), measured([1.0] * 8)),
        (measured([1.0] * 9, [5] * 9), measured([1.0] * 9, [6] * 9)),
        (measured([1.0] * 4), measured([2.0] * 4)),
    ],
    ids=["none kept", "other windows", "other counts", "too few"],
)
def test_what_cannot_be_paired_gives_nothing(first: LMMetrics, second: LMMetrics) -> None:
    assert paired_difference(first, second) is None


@pytest.mark.parametrize(("freedom", "quantile"), T_TABLE.items())
def test_the_factor_is_students_t(freedom: int, quantile: float) -> None:
    assert _student_t(freedom) == pytest.approx(quantile, rel=0.005)
