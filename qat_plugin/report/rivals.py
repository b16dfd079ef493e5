"""What QAT is compared with: float weights of as many training steps, then quantized without training."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

from qat_plugin.report.model import FINE_TUNED, FINE_TUNED_PTQ, FLOAT, FURTHER, FURTHER_PTQ, PTQ, QAT, Report, Row

_PAIRS: Final = (
    (FURTHER, FURTHER_PTQ, "fine-tuning further, then PTQ"),
    (FINE_TUNED, FINE_TUNED_PTQ, "fine-tuning, then PTQ"),
    (FLOAT, PTQ, "PTQ"),
)


@dataclass(frozen=True)
class Rival:
    """One way without QAT.

    Attributes:
        start: the float row; ``None`` where it was not measured.
        quantized: its row after PTQ.
        name: as it is called in sentences.
        fair: whether its weights had as many training steps as QAT's.
    """

    start: Row | None
    quantized: Row
    name: str
    fair: bool


def rivals(report: Report, qat: Row) -> list[Rival]:
    """The measured ones: those of as many steps as QAT first, then those of more steps before those of fewer."""
    found = []
    for start, quantized, name in _PAIRS:
        row = report.row(quantized)
        if row is not None and row.metrics is not None:
            before = report.row(start)
            measured = before if before is not None and before.metrics is not None else None
            found.append(Rival(measured, row, name, _as_long(row, qat)))
    return sorted(found, key=lambda rival: not rival.fair)


def steps_compared(report: Report) -> Iterator[str]:
    """What QAT that began from fine-tuned weights had more of than others; nothing where it began with them."""
    qat = report.row(QAT)
    if qat is None or len(qat.steps) < 2:
        return
    began = f"QAT began from the fine-tuned weights and had {steps(qat)} optimizer steps"
    against = rivals(report, qat)
    if against and against[0].fair:
        yield f"{began}, as many as {against[0].name}."
        return
    other = next((rival for rival in against if rival.quantized.steps), None)
    had = f", {other.name} {steps(other.quantized)}" if other is not None else ""
    yield (
        f"{began}{had}: any gain of QAT over PTQ may be that of the longer training and not of the quantizer. "
        f"Fine-tuning for {steps(qat)} steps, then PTQ, was not measured: the stages further and further-ptq do."
    )


def steps(row: Row) -> str:
    """``200`` or ``200 + 100``."""
    return " + ".join(map(str, row.steps))


def _as_long(row: Row, qat: Row) -> bool:
    if not row.steps or not qat.steps:  # not known: a ladder trains these two alike
        return row.name == FINE_TUNED_PTQ and len(qat.steps) < 2
    return sum(row.steps) == sum(qat.steps)
