"""Writes a report into a run's folder: whole files or none."""

from __future__ import annotations

import os
from pathlib import Path

from qat_plugin.errors import ConfigError
from qat_plugin.report.json import to_json
from qat_plugin.report.markdown import to_markdown
from qat_plugin.report.model import Report


def write_report(report: Report, directory: str | Path) -> tuple[Path, Path]:
    """Write ``report.json`` and ``report.md``, each atomically; an existing pair is replaced.

    Raises:
        ConfigError: when the folder cannot be made or written to.
    """
    folder = Path(directory)
    texts = {"report.json": to_json(report), "report.md": to_markdown(report)}  # both rendered before either is written
    try:
        folder.mkdir(parents=True, exist_ok=True)
        paths = [_write(folder / name, text) for name, text in texts.items()]
    except OSError as error:
        raise ConfigError(
            f"cannot write the report into {str(folder)!r}: {error.strerror}; choose another output folder"
        ) from error
    return paths[0], paths[1]


def _write(path: Path, text: str) -> Path:
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_text(text, encoding="utf-8")
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    return path
