"""A sensitivity as files: a table to read, JSON to compute with, a picture where matplotlib is installed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Final

from qat_plugin.errors import ConfigError
from qat_plugin.sensitivity.auto import AutoPolicy
from qat_plugin.sensitivity.plot import plot
from qat_plugin.sensitivity.ranking import Sensitivity

SCHEMA: Final = "qat_plugin.sensitivity/1"


def write_sensitivity(sensitivity: Sensitivity, folder: Path, found: AutoPolicy | None = None) -> str:
    """Write ``sensitivity.md``, ``sensitivity.json`` and ``sensitivity.png``.

    Args:
        sensitivity: the figures.
        folder: where to; it exists.
        found: the policy that was chosen by them.

    Returns:
        Why there is no picture, with the line that installs what is missing; else an empty string.
    """
    (folder / "sensitivity.md").write_text(to_markdown(sensitivity, found), encoding="utf-8")
    values: dict[str, Any] = {"schema": SCHEMA, **sensitivity.to_dict()}
    if found is not None:
        values["policy"] = found.to_dict()
    (folder / "sensitivity.json").write_text(json.dumps(values, indent=1) + "\n", encoding="utf-8")
    try:
        plot(sensitivity, folder / "sensitivity.png", chosen=None if found is None else found.schemes)
    except ConfigError as error:
        return f"no sensitivity.png: {error}"
    return ""


def to_markdown(sensitivity: Sensitivity, found: AutoPolicy | None = None) -> str:
    """The table, the most sensitive group first, and the policy chosen by it."""
    header, rows = sensitivity.cells()
    kind = "mean KL to the float model" if sensitivity.method == "kl" else "an estimate from gradients"
    lines = [
        "# Sensitivity",
        "",
        f"Damage in 1e-3 nats a prediction ({kind}), one group of layers at a time, all others in float; bits a weight "
        f"in brackets. Measured on {sensitivity.tokens} predictions; weights by {sensitivity.quantize}.",
        "",
        "| " + " | ".join(header) + " |",
        "| --- |" + " ---: |" * (len(header) - 1),
        *("| " + " | ".join(row) + " |" for row in rows),
        "",
    ]
    if found is not None:
        lines += ["## The policy chosen", "", "```", str(found), "```", ""]
    return "\n".join(lines)
