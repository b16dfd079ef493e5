"""The report as Markdown: verdict first, then the tables, the environment and the command that reproduces it."""

from __future__ import annotations

from qat_plugin.report.model import Report
from qat_plugin.report.tables import Table, tables


def to_markdown(report: Report) -> str:
    """Render the whole report; GitHub-flavoured tables, ASCII outside of the report's own words."""
    parts = [f"# {report.title}"]
    if report.recipe:
        parts.append(f"Recipe: `{report.recipe}`")
    if report.verdict:
        parts.append("## Verdict\n\n" + "\n".join(f"* {sentence}" for sentence in report.verdict))
    parts.extend(table_of(table) for table in tables(report))
    if report.environment:
        facts = tuple((name, value) for name, value in report.environment.items())
        parts.append(table_of(Table("Environment", ("what", "value"), facts, frozenset({0, 1}))))
    if report.command:
        parts.append(f"## Reproduce\n\n```\n{report.command}\n```")
    return "\n\n".join(parts) + "\n"


def table_of(table: Table) -> str:
    """One table under its title."""
    rule = ["---" if index in table.text_columns else "---:" for index in range(len(table.header))]
    lines = [_line(table.header), _line(rule), *(_line([_escape(cell) for cell in row]) for row in table.rows)]
    notes = "".join(f"\n{_escape(note)}\n" for note in table.notes)
    return f"## {table.title}\n\n" + "\n".join(lines) + (f"\n{notes.rstrip()}" if notes else "")


def _line(cells: list[str] | tuple[str, ...]) -> str:
    return "| " + " | ".join(cells) + " |"


def _escape(cell: str) -> str:
    """Keep a cell a cell: ``*`` in a name is no emphasis, ``|`` no border, and it stays on its line."""
    for mark in ("\\", "|", "*", "_", "<"):
        cell = cell.replace(mark, "\\" + mark)
    return " ".join(cell.split())
