"""Writes a report into a run's folder: whole files or none."""

from __future__ import annotations

from pathlib import Path
from typing import Final

from qat_plugin.atomic import write_text
from qat_plugin.errors import ConfigError
from qat_plugin.report.json import to_json
from qat_plugin.report.markdown import to_markdown
from qat_plugin.report.model import Report

REPORT_JSON: Final = "report.json"


def write_report(report: Report, directory: str | Path) -> tuple[Path, Path]:
    """Write ``report.json`` and ``report.md``, each atomically; an existing pair is replaced.

    Raises:
        ConfigError: when the folder cannot be made or written to.
    """
    folder = Path(directory)
    texts = {REPORT_JSON: to_json(report), "report.md": to_markdown(report)}  # both rendered before either is written
    try:
        for name, text in texts.items():
            write_text(folder / name, text)
    except OSError as error:
        raise ConfigError(
            f"cannot write the report into {str(folder)!r}: {error.strerror}; choose another output folder"
        ) from error
    return folder / REPORT_JSON, folder / "report.md"
