"""The verdict on adapters: what fine-tuning gained, what merging and quantizing afterwards cost."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

from qat_plugin.measure import LMMetrics
from qat_plugin.report.model import BASE, FLOAT, MERGED, NF4_BASE, PTQ, QAT_LORA, QLORA, Report, Row
from qat_plugin.report.noise import paired_difference
from qat_plugin.report.units import percent

SURVIVES: Final = 0.9
"""Mean cosine below which a form of storage is said to lose the update."""

NOTABLE: Final = 0.02
"""Nats a prediction (2% of perplexity) that noise may hide and a model still be said to keep what was learned."""

_FEW: Final = "for they were not measured on the same windows, or on too few"


def verdict(report: Report) -> Iterator[str]:
    """Sentences that the rows of fine-tuning and the table of survival support; none for a report without them."""
    trained = _measured(report, QLORA) or _measured(report, QAT_LORA)
    if trained is not None:
        yield from _gained(report, trained)
        yield from _merging(report, trained)
    yield from _survival(report)


def _gained(report: Report, trained: Row) -> Iterator[str]:
    base = _measured(report, NF4_BASE) or _measured(report, BASE) or _measured(report, PTQ)
    if base is None:
        return
    change = f"from {_quality(base)} ({base.name}) to {_number(trained)}"
    before = _measured(report, FLOAT)
    beside = f"; the float model before any training has {_number(before)}" if before else ""
    difference = paired_difference(base.metrics, trained.metrics) if base.metrics and trained.metrics else None
    if difference is None:
        yield f"{trained.name} takes the model {change}{beside}; whether that is more than noise is not known, {_FEW}."
    elif not difference.beyond_noise:
        yield f"{trained.name} changes the model {change}, which is within noise{beside}."
    elif difference.mean > 0:
        yield f"{trained.name} improves the model {change}{beside}."
    else:
        yield f"{trained.name} makes the model worse, {change}: its steps or learning rate do not suit it{beside}."


def _merging(report: Report, trained: Row) -> Iterator[str]:
    for row in report.rows:
        if not (row.name == MERGED or row.name.startswith(f"{MERGED}, ")) or row.metrics is None:
            continue
        assert trained.metrics is not None
        if (row.metrics.loss, row.metrics.losses) == (trained.metrics.loss, trained.metrics.losses):
            yield f"The {row.name} model gives exactly the losses of {trained.name}."
            continue
        difference = paired_difference(trained.metrics, row.metrics)
        numbers = f"{_quality(row)} against {_number(trained)}"
        if difference is None:
            yield f"Whether the {row.name} model keeps what {trained.name} learned is not known, {_FEW}: {numbers}."
        elif not difference.beyond_noise and difference.half_width > NOTABLE:
            yield (
                f"Whether the {row.name} model keeps what {trained.name} learned is not known, the held-out text is "
                f"too short to tell within {difference.half_width:.2g} nats: {numbers}."
            )
        elif not difference.beyond_noise:
            yield f"The {row.name} model keeps what {trained.name} learned, within noise: {numbers}."
        elif difference.mean > 0:
            yield f"The {row.name} model is better than {trained.name} on its own base: {numbers}."
        else:
            yield f"The {row.name} model loses some of what {trained.name} learned: {numbers}."


def _survival(report: Report) -> Iterator[str]:
    from qat_plugin.report.tables import mean_cosine

    choices = dict.fromkeys(choice for layer in report.survival for choice in layer["cosines"])
    lost = [(choice, cosine) for choice in choices if (cosine := mean_cosine(report, choice) or 0.0) < SURVIVES]
    if lost:
        listed = ", ".join(f"{choice} ({cosine:.3f})" for choice, cosine in lost)
        yield (
            f"Of the update itself, these forms of storage keep less than {percent(SURVIVES)} (mean cosine with what "
            f"was learned): {listed}."
        )


def _measured(report: Report, name: str) -> Row | None:
    row = report.row(name)
    return row if row is not None and row.metrics is not None else None


def _quality(row: Row) -> str:
    return f"{'perplexity' if isinstance(row.metrics, LMMetrics) else 'accuracy'} {_number(row)}"


def _number(row: Row) -> str:
    assert row.quality is not None
    return f"{row.quality:.4f}" if isinstance(row.metrics, LMMetrics) else percent(row.quality)
