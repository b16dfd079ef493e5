"""The tables of a report as plain cells; Markdown and the console print the same ones."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

from qat_plugin.measure import ClassifierMetrics
from qat_plugin.report.model import BF16, Report, Row
from qat_plugin.report.plan import by_scheme, folded
from qat_plugin.report.units import decibels, in_bytes, in_milliseconds, percent, times

WORST_LAYERS = 10
"""Layers shown in the SQNR and the proof table."""

Cells = tuple[str, ...]
Number = TypeVar("Number", int, float)


@dataclass(frozen=True)
class Table:
    """A table ready to print.

    Attributes:
        title: what it shows.
        header: column titles.
        rows: cells, as many as the header has.
        text_columns: indices of the columns that are text; the others are numbers and align right.
        notes: sentences below the table.
    """

    title: str
    header: Cells
    rows: tuple[Cells, ...]
    text_columns: frozenset[int] = frozenset({0})
    notes: Cells = ()


def tables(report: Report) -> list[Table]:
    """All tables of the report that have rows, in the order of reading."""
    made = (ladder(report), sizes(report), latencies(report), plan(report), proof(report), sqnr(report),
            survival(report))  # fmt: skip
    return [table for table in made if table.rows]


def ladder(report: Report) -> Table:
    """Quality and size of the model in each form."""
    classifier = any(isinstance(row.metrics, ClassifierMetrics) for row in report.rows)
    quality = "accuracy" if classifier else "perplexity"
    header = ("model", "loss", quality, "delta to float", "KL to float", "top-1 agreement",
              "in memory", "on disk", "bits/weight")  # fmt: skip
    notes = tuple(f"{row.name}: {row.note}" for row in report.rows if row.note)
    return Table("Ladder", header, tuple(_rung(report, row) for row in report.rows), notes=notes)


def _rung(report: Report, row: Row) -> Cells:
    metrics, bits, delta = row.metrics, report.bits_per_weight(row), report.delta(row)
    accuracy = isinstance(metrics, ClassifierMetrics)
    return (
        row.name,
        _cell(None if metrics is None else metrics.loss, _four),
        _cell(row.quality, percent if accuracy else _four),
        _cell(delta, lambda value: f"{100 * value:+.2f} points" if accuracy else f"{value:+.4f}"),
        _cell(None if metrics is None else metrics.kl, _small),
        _cell(None if metrics is None else metrics.top1_agreement, percent),
        _cell(row.bytes_memory, in_bytes),
        _cell(row.bytes_disk, in_bytes),
        _cell(bits, lambda value: f"{value:.2f}"),
    )


def sizes(report: Report) -> Table:
    """Where the bytes of the planned layers are, by scheme."""
    lines = by_scheme(report.plan)
    total = sum(line.bytes_after for line in lines)
    rows = tuple(
        (
            line.scheme,
            str(line.count),
            in_bytes(line.bytes_before),
            in_bytes(line.bytes_after),
            percent(line.bytes_after / total) if total else "-",
        )
        for line in lines
    )
    return Table("Size by scheme", ("scheme", "layers", "before", "after", "share after"), rows)


def latencies(report: Report) -> Table:
    """Median and 95th percentile of each model on each workload, and its speed against bf16."""
    rows = []
    for entry in report.latency:
        half = report.latency_of(entry.workload, BF16)
        speed = "-" if half is None else times(half.p50 / entry.latency.p50)
        took = (in_milliseconds(entry.latency.p50), in_milliseconds(entry.latency.p95), str(entry.latency.rounds))
        rows.append((entry.workload, entry.model, *took, speed))
    header = ("workload", "model", "p50", "p95", "rounds", "speed against bf16")
    return Table("Latency", header, tuple(rows), frozenset({0, 1}))


def plan(report: Report) -> Table:
    """What became of each layer and why; blocks that are alike share a line."""
    rows = tuple(
        (
            line.name,
            str(line.count),
            line.scheme,
            line.rule,
            in_bytes(line.bytes_before),
            in_bytes(line.bytes_after),
            line.kernel,
            line.remark,
        )
        for line in folded(report.plan)
    )
    header = ("layer", "layers", "scheme", "rule", "before", "after", "kernel", "reason and remarks")
    return Table("Plan", header, rows, frozenset({0, 2, 3, 6, 7}))


def proof(report: Report) -> Table:
    """The converted layers whose output is furthest from the fake-quantized layer's, relative to what is allowed."""
    layers = sorted(report.proof, key=lambda layer: -_strain(layer.get("output_error"), layer.get("tolerance")))
    rows = tuple(
        (
            str(layer["name"]),
            str(layer.get("scheme") or ""),
            str(layer.get("kernel") or ""),
            _cell(layer.get("weight_difference"), lambda value: f"{value:g}"),
            _cell(layer.get("output_error"), lambda value: f"{value:.2e}"),
            _cell(layer.get("tolerance"), lambda value: f"{value:.2e}"),
            str(layer.get("inputs") or ""),
        )
        for layer in layers[:WORST_LAYERS]
    )
    header = ("layer", "scheme", "kernel", "weight difference", "output error", "allowed", "inputs")
    return Table(
        "Proof",
        header,
        rows,
        frozenset({0, 1, 2, 6}),
        _only_some(len(rows), len(layers), "layers closest to their limits"),
    )


def sqnr(report: Report) -> Table:
    """The layers that quantization distorts most."""
    worst = sorted(report.sqnr.items(), key=lambda item: item[1])
    rows = tuple((name, decibels(value)) for name, value in worst[:WORST_LAYERS])
    return Table(
        "SQNR of the weights", ("layer", "SQNR"), rows, notes=_only_some(len(rows), len(worst), "worst layers")
    )


def survival(report: Report) -> Table:
    """Cosine between what stored weights changed by and the adapter's true update: the mean, then the worst layers."""
    if not report.survival:
        return Table("Survival of the update", (), ())
    choices = list(dict.fromkeys(choice for layer in report.survival for choice in layer["cosines"]))
    worst = sorted(report.survival, key=lambda layer: min(layer["cosines"].values()))
    rows = [("mean of all layers", "-", *(_cosine(mean_cosine(report, choice)) for choice in choices))]
    for layer in worst[:WORST_LAYERS]:
        cosines = (_cosine(layer["cosines"].get(choice)) for choice in choices)
        rows.append((str(layer["name"]), percent(float(layer["size"])), *cosines))
    notes = (
        "Cosine between the change of the stored weights and the update that was learned: 1 is all of it, 0 nothing. "
        "original: into the float weights in 16 bits; nf4-exact: into the dequantized NF4 weights in 16 bits; "
        "the others: quantized after merging.",
        *_only_some(len(rows) - 1, len(worst), "worst layers"),
    )
    return Table("Survival of the update", ("layer", "|update|/|weight|", *choices), tuple(rows), notes=notes)


def mean_cosine(report: Report, choice: str) -> float | None:
    """Mean over the layers that have this choice."""
    found = [float(layer["cosines"][choice]) for layer in report.survival if choice in layer["cosines"]]
    return sum(found) / len(found) if found else None


def _cosine(value: float | None) -> str:
    return _cell(value, lambda number: f"{number:.4f}")


def _only_some(shown: int, total: int, which: str) -> Cells:
    return (f"The {shown} {which} of {total}; all are in report.json.",) if shown < total else ()


def _strain(error: float | None, allowed: float | None) -> float:
    """Share of the allowed error that was used; unmeasured last, NaN and a violated zero tolerance first."""
    if error is None or not allowed:
        return math.inf if error else -1.0
    return math.inf if math.isnan(error) else error / allowed


def _four(value: float) -> str:
    return f"{value:.4f}"


def _small(value: float) -> str:
    return "0" if value == 0 else f"{value:.4g}"


def _cell(value: Number | None, show: Callable[[Number], str]) -> str:
    return "-" if value is None else show(value)
