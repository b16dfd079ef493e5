"""A report as plain values (dict, list, str, int, float, bool, None) and back."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, fields
from typing import Any, Final

from qat_plugin.errors import CheckpointError
from qat_plugin.measure import ClassifierMetrics, Latency, LMMetrics
from qat_plugin.report.model import LatencyRow, Metrics, Report, Row

SCHEMA: Final = "qat_plugin.report/1"
"""Name and version of the form; a reader refuses others."""

_KINDS: Final[dict[str, type[Metrics]]] = {"language": LMMetrics, "classifier": ClassifierMetrics}
_DERIVED: Final = ("delta", "bits_per_weight")
"""Written for readers that are no Python; computed anew from the other values when a report is read."""


def to_dict(report: Report) -> dict[str, Any]:
    """All of the report as plain values, unrounded. Infinite values stay floats here."""
    values: dict[str, Any] = _plain({f.name: getattr(report, f.name) for f in fields(report) if f.name != "rows"})
    values["latency"] = [
        {"workload": entry.workload, "model": entry.model, **asdict(entry.latency)} for entry in report.latency
    ]
    return {"schema": SCHEMA, **values, "rows": [_row_to_dict(report, row) for row in report.rows]}


def from_dict(values: Mapping[str, Any]) -> Report:
    """The inverse of :func:`to_dict`.

    Raises:
        CheckpointError: when the schema is another one, or a field is missing, unknown or of another form.
    """
    content = dict(values)
    schema = content.pop("schema", None)
    if schema != SCHEMA:
        raise CheckpointError(f"this report has the schema {schema!r}, this version of qat_plugin reads {SCHEMA!r}")
    try:
        content["rows"] = [_row_from_dict(row) for row in content.get("rows", [])]
        content["latency"] = [_latency_from_dict(**entry) for entry in content.get("latency", [])]
        return Report(**content)
    except (TypeError, ValueError, AttributeError) as error:
        raise CheckpointError(f"this report has missing, unknown or malformed fields: {error}") from error


def _row_to_dict(report: Report, row: Row) -> dict[str, Any]:
    metrics: dict[str, Any] | None = None
    if row.metrics is not None:
        kind = next(name for name, of in _KINDS.items() if type(row.metrics) is of)
        metrics = {"kind": kind, **_plain(asdict(row.metrics))}
    return {
        "name": row.name,
        "metrics": metrics,
        "bytes_memory": row.bytes_memory,
        "bytes_disk": row.bytes_disk,
        "note": row.note,
        "steps": list(row.steps),
        "delta": report.delta(row),
        "bits_per_weight": report.bits_per_weight(row),
    }


def _row_from_dict(values: Mapping[str, Any]) -> Row:
    content = {name: value for name, value in values.items() if name not in _DERIVED}
    if content.get("metrics") is not None:
        content["metrics"] = _metrics_from_dict(**content["metrics"])
    return Row(**content)


def _metrics_from_dict(kind: str, losses: list[float], counts: list[int], **numbers: Any) -> Metrics:
    if kind not in _KINDS:
        raise CheckpointError(f"unknown kind of metrics {kind!r}; known are {', '.join(_KINDS)}")
    return _KINDS[kind](**numbers, losses=tuple(losses), counts=tuple(counts))


def _latency_from_dict(workload: str, model: str, **numbers: Any) -> LatencyRow:
    return LatencyRow(workload, model, Latency(**numbers))


def _plain(value: Any) -> Any:
    """Mappings as dicts and sequences as lists, all the way down."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return value
