"""The report as strict JSON: exactly what was measured, no rounding, no NaN or Infinity literals."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any, Final

from qat_plugin.errors import CheckpointError
from qat_plugin.report.dictionary import from_dict, to_dict
from qat_plugin.report.model import Report

NON_FINITE: Final = "non_finite"
"""Top-level key: JSON pointer (RFC 6901) of a null -> "inf", "-inf" or "nan", the number that it stands for."""


def to_json(report: Report) -> str:
    """The report as JSON text; floats are written so that they read back bit by bit.

    JSON has no infinities: such a number is written as null and listed under ``"non_finite"`` by its JSON pointer, so
    that a layer without any distortion (SQNR ``inf``) can be told from one that was not measured.
    """
    found: dict[str, str] = {}
    clean = _without_non_finite(to_dict(report), "", found)
    return json.dumps({**clean, NON_FINITE: found}, indent=2, allow_nan=False) + "\n"


def from_json(text: str) -> Report:
    """The inverse of :func:`to_json`.

    Raises:
        CheckpointError: when the text is no JSON, no report, or one of another schema.
    """
    try:
        values = json.loads(text)
    except json.JSONDecodeError as error:
        raise CheckpointError(f"this is no report: {error}") from error
    if not isinstance(values, dict):
        raise CheckpointError(f"this is no report: expected a JSON object, found {type(values).__name__}")
    for pointer, number in values.pop(NON_FINITE, {}).items():
        _put(values, pointer, float(number))
    return from_dict(values)


def read_report(path: str | Path) -> Report:
    """Read ``report.json``.

    Raises:
        CheckpointError: when the file is missing or is no report; the message names it.
    """
    try:
        return from_json(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise CheckpointError(f"cannot read the report {str(path)!r}: {error.strerror}") from error
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error}") from error


def _without_non_finite(value: Any, pointer: str, found: dict[str, str]) -> Any:
    if isinstance(value, dict):
        return {key: _without_non_finite(item, f"{pointer}/{_escape(key)}", found) for key, item in value.items()}
    if isinstance(value, list):
        return [_without_non_finite(item, f"{pointer}/{index}", found) for index, item in enumerate(value)]
    if isinstance(value, float) and not math.isfinite(value):
        found[pointer] = str(value)
        return None
    return value


def _put(values: Any, pointer: str, number: float) -> None:
    *parents, last = (part.replace("~1", "/").replace("~0", "~") for part in pointer.split("/")[1:])
    try:
        for part in parents:
            values = values[int(part) if isinstance(values, list) else part]
        values[int(last) if isinstance(values, list) else last] = number
    except (KeyError, IndexError, TypeError, ValueError) as error:
        raise CheckpointError(f"this report lists {pointer!r} under {NON_FINITE!r} but has no such value") from error


def _escape(key: str) -> str:
    return key.replace("~", "~0").replace("/", "~1")
