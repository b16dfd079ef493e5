"""The report on the console: rich tables on a terminal, the same ones as plain text in a pipe or a log."""

from __future__ import annotations

import sys

from rich import box
from rich.console import Console
from rich.table import Table as RichTable
from rich.text import Text

from qat_plugin.report.model import Report
from qat_plugin.report.tables import Table, ladder, latencies, proof, sizes, survival

PLAIN_WIDTH = 160
"""Columns assumed where the output is no terminal."""

_GAP = 3  # columns between two cells


def print_report(report: Report, console: Console | None = None) -> None:
    """Print verdict, ladder, sizes, latency, proof and survival; plan, SQNR and environment are left to the files.

    Args:
        report: the results.
        console: where to print; stdout by default, ``PLAIN_WIDTH`` columns wide where that is no terminal.
    """
    console = console or Console(width=None if sys.stdout.isatty() else PLAIN_WIDTH)
    console.print(Text(report.title, style="bold"))
    for table in (ladder(report), sizes(report), latencies(report), proof(report), survival(report)):
        if table.rows:
            for piece in _pieces(table, console.width):
                console.print()
                console.print(_rich(piece))
            for note in table.notes:
                console.print(Text(f"  {note}"))
    if report.verdict:
        console.print()
        console.print(Text("Verdict", style="bold"))
        for sentence in report.verdict:
            console.print(Text(f"* {sentence}"), soft_wrap=not console.is_terminal)


def _pieces(table: Table, width: int) -> list[Table]:
    """The table as it is where it fits, else cut between columns into tables that do, the first column in each."""
    widths = [max(map(len, column)) for column in zip(table.header, *table.rows, strict=True)]
    pieces: list[list[int]] = [[0]]
    used = widths[0]
    for index in range(1, len(widths)):
        if used + _GAP + widths[index] > width and len(pieces[-1]) > 1:
            pieces.append([0])
            used = widths[0]
        pieces[-1].append(index)
        used += _GAP + widths[index]
    return [_columns(table, piece, first=number == 0) for number, piece in enumerate(pieces)]


def _columns(table: Table, kept: list[int], *, first: bool) -> Table:
    return Table(
        table.title if first else f"{table.title}, continued",
        tuple(table.header[index] for index in kept),
        tuple(tuple(row[index] for index in kept) for row in table.rows),
        frozenset(number for number, index in enumerate(kept) if index in table.text_columns),
    )


def _rich(table: Table) -> RichTable:
    rich = RichTable(
        title=table.title,
        title_justify="left",
        title_style="bold",
        box=box.SIMPLE_HEAD,
        show_edge=False,
        pad_edge=False,
    )
    for index, title in enumerate(table.header):
        text = index in table.text_columns
        rich.add_column(title, justify="left" if text else "right", no_wrap=not text, overflow="fold")
    for row in table.rows:
        rich.add_row(*(Text(cell) for cell in row))  # Text: names such as "layers[0]" are no markup
    return rich
