"""What the results say, in sentences that may be unflattering and must be true. A pure function of the report."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import Any, Final

from qat_plugin.measure import LMMetrics
from qat_plugin.report import adapters
from qat_plugin.report.model import (
    BF16,
    CONVERTED,
    FINE_TUNED,
    FLOAT,
    PTQ,
    QAT,
    QAT_LORA,
    RELOADED,
    Metrics,
    Report,
    Row,
)
from qat_plugin.report.noise import PairedDifference, paired_difference
from qat_plugin.report.plan import is_float, stored_bytes
from qat_plugin.report.rivals import rivals, steps, steps_compared
from qat_plugin.report.units import in_bytes, percent, times

SAME_SPEED: Final = 0.05
"""Medians closer than this share are called equally fast."""

SAME_PERPLEXITY: Final = 5e-5
"""Half a unit in the fourth decimal."""


def verdict_of(report: Report) -> list[str]:
    """The sentences that the report's numbers support, most important first; nothing is said about what is missing."""
    parts: tuple[Callable[[Report], Iterator[str]], ...] = (
        _worth_training,
        steps_compared,
        _recovered,
        _training_alone,
        adapters.verdict,
        _kept_by_conversion,
        _kept_by_saving,
        _proven,
        _speed,
        _size,
        _left_in_float,
    )
    return [sentence for part in parts for sentence in part(report)]


def with_verdict(report: Report) -> Report:
    """The same report with its verdict filled in."""
    return replace(report, verdict=tuple(verdict_of(report)))


def _worth_training(report: Report) -> Iterator[str]:
    qat = _measured(report, QAT)
    against = [] if qat is None else rivals(report, qat)
    if qat is None or not against:
        return
    baseline, name = against[0].quantized, against[0].name
    numbers = f"{_quality(qat)} against {_number(baseline)}"
    difference = paired_difference(_metrics(baseline), _metrics(qat))
    if difference is None:
        yield (
            f"QAT has {numbers} of {name}; whether that is more than noise is not known, for they were not measured on "
            "the same windows, or on too few."
        )
    elif not difference.beyond_noise:
        yield (
            f"PTQ is within noise of QAT here: QAT is not worth its cost (QAT has {numbers} of "
            f"{name}; {_interval(difference, qat)})."
        )
    elif difference.mean > 0:
        yield f"QAT is better than {name}: {numbers} ({_interval(difference, qat)})."
    else:
        yield f"QAT is worse than {name}: {numbers} ({_interval(difference, qat)}); ship the PTQ model."
    if baseline.name == PTQ and len(qat.steps) < 2:
        yield (
            "Fine-tuning for the same steps, then PTQ, was not measured: any gain of QAT over PTQ may be that of the "
            "training and not of the quantizer."
        )


def _training_alone(report: Report) -> Iterator[str]:
    before, after = _measured(report, FLOAT), _measured(report, FINE_TUNED)
    if before is None or after is None:
        return
    difference = paired_difference(_metrics(before), _metrics(after))
    if difference is None or not difference.beyond_noise:
        return
    change = f"from {_quality(before)} to {_number(after)}"
    if difference.mean > 0:
        yield f"Fine-tuning alone takes the float model {change}: QAT has to be compared with the fine-tuned rows."
    else:
        yield f"Fine-tuning alone makes the float model worse, {change}: its steps or learning rate do not suit it."


def _recovered(report: Report) -> Iterator[str]:
    qat = _measured(report, QAT)
    rival = next((rival for rival in rivals(report, qat) if rival.start is not None), None) if qat else None
    if qat is None or rival is None or rival.start is None:
        return
    start, quantized = rival.start, rival.quantized
    what = _unit_of_quality(qat)
    lost, regained = _worse_by(quantized, start), _worse_by(quantized, qat)
    longer = f", after {steps(qat)} steps" if not rival.fair and len(qat.steps) > 1 else ""
    numbers = f"{start.name}: {_number(start)}; {quantized.name}: {_number(quantized)}; QAT{longer}: {_number(qat)}"
    if not (math.isfinite(lost) and math.isfinite(regained)):
        return
    noise = paired_difference(_metrics(quantized), _metrics(start))
    if lost <= 0 or (noise is not None and not noise.beyond_noise):
        yield f"PTQ loses no measurable {what} here, so there is nothing for QAT to recover ({numbers})."
    elif regained <= 0:
        yield f"QAT recovers none of the {what} that PTQ loses ({numbers})."
    elif regained > lost:
        yield f"QAT recovers all of the {what} that PTQ loses and more: it ends better than {start.name} ({numbers})."
    else:
        yield f"QAT recovers {percent(regained / lost)} of the {what} that PTQ loses ({numbers})."


def _kept_by_conversion(report: Report) -> Iterator[str]:
    qat, converted = _measured(report, QAT) or _measured(report, QAT_LORA), _measured(report, CONVERTED)
    if qat is None or converted is None:
        return
    before, after = _value(qat), _value(converted)
    what = _unit_of_quality(qat)
    if after == before:
        yield f"The converted model has exactly the {what} of {qat.name} ({_quality(converted)})."
    elif abs(after - before) < SAME_PERPLEXITY:
        yield (
            f"The converted model keeps {qat.name}'s {what} to 4 decimals ({_quality(converted)}; they differ by "
            f"{after - before:+.1e})."
        )
    else:
        yield (
            f"The converted model does not keep {qat.name}'s {what}: {_quality(qat)} became {_number(converted)} "
            f"({after - before:+.2g}); what was trained is not quite what ships."
        )


def _kept_by_saving(report: Report) -> Iterator[str]:
    converted, reloaded = _measured(report, CONVERTED), _measured(report, RELOADED)
    if converted is None or reloaded is None:
        return
    first, second = _metrics(converted), _metrics(reloaded)
    if (first.loss, first.losses) == (second.loss, second.losses):
        yield "Reloaded from disk, the model gives exactly the losses of the converted one."
    else:
        yield (
            "Reloaded from disk, the model is not the converted one: its loss differs by "
            f"{second.loss - first.loss:+.2g} nats on average; do not ship the file."
        )


def _proven(report: Report) -> Iterator[str]:
    if not report.proof:
        return
    count = len(report.proof)
    broken = [str(layer["name"]) for layer in report.proof if not _holds(layer)]
    if broken:
        yield f"{len(broken)} of {count} converted layers are not what training saw: {_some(broken)}; do not ship them."
        return
    yield (
        f"{count} of {count} converted layers hold exactly the weights that training saw, with outputs within their "
        "kernels' stated rounding."
    )
    random = sum(layer.get("inputs") == "random" for layer in report.proof)
    if random:
        yield f"Outputs of {random} of these layers were checked on random inputs only, for lack of recorded ones."


def _speed(report: Report) -> Iterator[str]:
    place = _place(report)
    for workload in report.workloads():
        converted = report.latency_of(workload, CONVERTED)
        trained, half = report.latency_of(workload, FLOAT), report.latency_of(workload, BF16)
        rival, name = (half, "bf16") if half else (trained, "the float model as trained")
        if converted is None or rival is None:
            continue
        speed = rival.p50 / converted.p50
        yield f"This model is {_pace(speed, name)} on {place} at {workload} ({times(speed)})."
        if half and trained and trained.p50 < half.p50 * (1 - SAME_SPEED):
            yield (
                f"bf16 is itself slower than the float model as trained there ({times(trained.p50 / half.p50)}); "
                f"against that one the converted model runs at {times(trained.p50 / converted.p50)}."
            )


def _size(report: Report) -> Iterator[str]:
    before = report.row(FLOAT) or report.row(QAT)
    after = report.row(CONVERTED) or report.row(RELOADED)
    if before is None or after is None or not before.bytes_memory or not after.bytes_memory:
        return
    bits = report.bits_per_weight(after)
    detail = f"; {bits:.2f} bits a weight, where bf16 takes 16" if bits is not None else ""
    sizes = f"{in_bytes(after.bytes_memory)} in memory against {in_bytes(before.bytes_memory)}"
    if after.bytes_memory < before.bytes_memory:
        ratio = before.bytes_memory / after.bytes_memory
        yield f"The model became {times(ratio)} smaller than as it was trained: {sizes}{detail}."
    else:
        yield f"The model did not become smaller: {sizes}{detail}."


def _left_in_float(report: Report) -> Iterator[str]:
    if not report.plan:
        return
    kept = [layer for layer in report.plan if is_float(layer)]
    if not kept:
        yield f"All {len(report.plan)} layers of the plan are quantized."
        return
    total = sum(stored_bytes(layer) for layer in report.plan)
    share = sum(stored_bytes(layer) for layer in kept) / total if total else 0.0
    largest = sorted(kept, key=stored_bytes, reverse=True)
    sentence = (
        f"{len(kept)} of {len(report.plan)} layers stay in float and hold {percent(share)} of the layers' bytes: "
        f"{_some([str(layer['name']) for layer in largest])}"
    )
    yield sentence + ("; they, not the quantized ones, decide the size." if share > 0.5 else ".")


def _measured(report: Report, name: str) -> Row | None:
    row = report.row(name)
    return row if row is not None and row.metrics is not None else None


def _metrics(row: Row) -> Metrics:
    assert row.metrics is not None
    return row.metrics


def _value(row: Row) -> float:
    assert row.quality is not None
    return row.quality


def _unit_of_quality(row: Row) -> str:
    return "perplexity" if isinstance(row.metrics, LMMetrics) else "accuracy"


def _quality(row: Row) -> str:
    return f"{_unit_of_quality(row)} {_number(row)}"


def _number(row: Row) -> str:
    value = _value(row)
    return f"{value:.4f}" if isinstance(row.metrics, LMMetrics) else percent(value)


def _worse_by(row: Row, than: Row) -> float:
    """How much worse: perplexity above, or accuracy below."""
    difference = _value(row) - _value(than)
    return difference if isinstance(row.metrics, LMMetrics) else -difference


def _interval(difference: PairedDifference, row: Row) -> str:
    """A paired difference, first minus second being a gain of QAT."""
    per, groups = ("a token", "windows") if isinstance(row.metrics, LMMetrics) else ("an example", "batches")
    if difference.mean == difference.half_width == 0:
        return f"with equal losses on all {difference.pairs} {groups}"
    direction = "lower" if difference.mean > 0 else "higher"
    return (
        f"QAT's loss is {abs(difference.mean):.3g} +/- {difference.half_width:.2g} nats {per} {direction}, "
        f"95% over {difference.pairs} {groups}"
    )


def _pace(speed: float, rival: str) -> str:
    if abs(speed - 1) <= SAME_SPEED:
        return f"as fast as {rival}, no faster,"
    return f"slower than {rival}" if speed < 1 else f"faster than {rival}"


def _place(report: Report) -> str:
    device = report.environment.get("device", "").split(":")[0]
    return {"cpu": "this CPU", "cuda": "this GPU"}.get(device, "this device")


def _holds(layer: Mapping[str, Any]) -> bool:
    equal = float(layer.get("weight_difference") or 0.0) == 0.0
    error, tolerance = layer.get("output_error"), layer.get("tolerance")
    return equal and (error is None or tolerance is None or float(error) <= float(tolerance))


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
