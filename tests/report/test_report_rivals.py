"""QAT that began from fine-tuned weights is compared with as many steps, or the difference is said."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

from qat_plugin.report import (
    FINE_TUNED,
    FINE_TUNED_PTQ,
    FURTHER,
    FURTHER_PTQ,
    PTQ,
    QAT,
    Report,
    Row,
    from_json,
    to_json,
    verdict_of,
)

from .conftest import ladder, metrics

Make = Callable[..., Report]
STEPS = {FINE_TUNED: (200,), FINE_TUNED_PTQ: (200,), QAT: (200, 100)}


def began_fine_tuned(further: float | None = None) -> tuple[Row, ...]:
    """The seven rows with their steps; with ``further``, that loss for the baseline of as many steps as QAT."""
    rows = tuple(replace(row, steps=STEPS.get(row.name, ())) for row in ladder())
    if further is None:
        return rows
    quantized = metrics(further, kl=0.01, top1_agreement=0.97)
    return (
        *rows,
        Row(FURTHER, metrics(further - 0.1), steps=(200, 100)),
        Row(FURTHER_PTQ, quantized, steps=(200, 100)),
    )


def test_a_baseline_of_fewer_steps_is_named_as_one(make_report: Make) -> None:
    verdict = verdict_of(make_report(rows=began_fine_tuned()))
    assert verdict[0].startswith("QAT is better than fine-tuning, then PTQ: perplexity 4.0108 against 4.3319")
    assert verdict[1].startswith(
        "QAT began from the fine-tuned weights and had 200 + 100 optimizer steps, fine-tuning, then PTQ 200: any gain"
    )
    assert "Fine-tuning for 200 + 100 steps, then PTQ, was not measured" in verdict[1]
    assert any("QAT, after 200 + 100 steps: 4.0108)" in sentence for sentence in verdict)
    assert not any("same steps" in sentence for sentence in verdict)


def test_the_baseline_of_as_many_steps_decides(make_report: Make) -> None:
    verdict = verdict_of(make_report(rows=began_fine_tuned(1.38)))
    assert verdict[0].startswith("QAT is worse than fine-tuning further, then PTQ: perplexity 4.0108 against 3.9749")
    assert verdict[1] == (
        "QAT began from the fine-tuned weights and had 200 + 100 optimizer steps, as many as fine-tuning further, "
        "then PTQ."
    )
    verdict = verdict_of(make_report(rows=began_fine_tuned(1.43)))
    lost, regained = math.exp(1.43) - math.exp(1.33), math.exp(1.43) - math.exp(1.389)
    assert verdict[2].startswith(f"QAT recovers {100 * regained / lost:.2f}% of the perplexity that PTQ loses")
    assert "after 200 + 100" not in verdict[2]


def test_without_any_fine_tuned_baseline_the_doubt_is_said_once(make_report: Make) -> None:
    rows = [row for row in began_fine_tuned() if row.name not in (FINE_TUNED, FINE_TUNED_PTQ)]
    verdict = verdict_of(make_report(rows=rows))
    assert verdict[0].startswith("QAT is better than PTQ:")
    assert verdict[1].startswith("QAT began from the fine-tuned weights and had 200 + 100 optimizer steps: any gain")
    assert sum("was not measured" in sentence for sentence in verdict) == 1


def test_a_run_that_began_with_the_others_says_nothing_of_steps(make_report: Make) -> None:
    rows = [replace(row, steps=(200,) if row.name in STEPS else ()) for row in ladder()]
    assert verdict_of(make_report(rows=rows)) == verdict_of(make_report())
    assert verdict_of(make_report(rows=[row for row in rows if row.name != PTQ]))[0].startswith(
        "QAT is better than fine"
    )


def test_steps_survive_the_file(make_report: Make) -> None:
    report = make_report(rows=began_fine_tuned(1.4))
    assert from_json(to_json(report)) == report
