"""Is a difference between two models more than the luck of the held-out sample? Paired comparison by windows."""

from __future__ import annotations

import math
from dataclasses import dataclass

from qat_plugin.report.model import Metrics

MIN_PAIRS = 5
"""Below this many windows no spread is estimated."""


@dataclass(frozen=True)
class PairedDifference:
    """Mean difference in loss between two models on the same windows.

    Attributes:
        mean: loss of the first minus loss of the second, in nats per prediction.
        half_width: half the 95% confidence interval of ``mean``.
        pairs: number of windows (batches of a classifier) compared.
    """

    mean: float
    half_width: float
    pairs: int

    @property
    def beyond_noise(self) -> bool:
        """Whether zero lies outside the 95% confidence interval."""
        return abs(self.mean) > self.half_width


def paired_difference(first: Metrics, second: Metrics) -> PairedDifference | None:
    """Compare two models window by window; ``None`` when they were not measured on the same windows or on too few.

    What makes a window hard is hard for both models and cancels in the difference, so far smaller gains can be told
    from noise than by comparing two means. Windows are weighted by their number of predictions; the standard error is
    that of a ratio estimator (Cochran, Sampling Techniques, section 2.11), the factor Student's t. Windows of one
    document are not quite independent, which makes the interval a little too narrow.
    """
    if not first.losses or first.counts != second.counts or len(first.losses) != len(second.losses):
        return None
    pairs = len(first.losses)
    if pairs < MIN_PAIRS:
        return None
    differences = [a - b for a, b in zip(first.losses, second.losses, strict=True)]
    total = sum(first.counts)
    mean = math.fsum(w * d for w, d in zip(first.counts, differences, strict=True)) / total
    squares = math.fsum((w * (d - mean)) ** 2 for w, d in zip(first.counts, differences, strict=True))
    error = math.sqrt(pairs / (pairs - 1) * squares) / total
    return PairedDifference(mean, _student_t(pairs - 1) * error, pairs)


def _student_t(freedom: int) -> float:
    """97.5% quantile of Student's t (Abramowitz and Stegun 26.7.5; within 0.5% from 4 degrees of freedom on)."""
    z = 1.959963984540054
    return (
        z
        + (z**3 + z) / (4 * freedom)
        + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * freedom**2)
        + (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / (384 * freedom**3)
    )
