"""The model card that lies beside each export: what it is, what it holds, what it costs, how to load it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from qat_plugin.exporting.contents import Exportable
from qat_plugin.exporting.formats import Format
from qat_plugin.exporting.verification import Verification
from qat_plugin.measure import model_bytes, parameter_count
from qat_plugin.policy.plan import human_bytes
from qat_plugin.report.markdown import table_of
from qat_plugin.report.model import Report
from qat_plugin.report.tables import Table, ladder

SIGN: Final = "Quantized by qat_plugin."
"""What each card says, by which a folder is known to be an export."""


@dataclass(frozen=True)
class CardFacts:
    """What the exporter cannot see in the model.

    Attributes:
        title: of the card; the model's class by default.
        recipe, command: where the model comes from.
        report: of the run, whose accuracy table is repeated.
    """

    title: str = ""
    recipe: str = ""
    command: str = ""
    report: Report | None = None


def model_card(
    model: Exportable,
    chosen: Format,
    usage: str,
    size: int,
    verification: Verification | None,
    facts: CardFacts,
    *,
    exact: bool = True,
) -> str:
    """Markdown.

    Args:
        model: what was exported.
        chosen: into what.
        usage: lines of code, or a command, that load it.
        size: bytes on disk.
        verification: what reading it back has shown.
        facts: what is known of its training.
        exact: whether it holds the model's own integers.
    """
    proven = "It was not read back." if verification is None else f"{verification}."
    kept = (
        "The integers and scales in it are those that the model was trained or calibrated with"
        if exact
        else "Its weights were quantized anew for this file: the integers that the model was trained with are NOT in it"
    )
    parts = [
        f"# {facts.title or type(model.network).__name__}, {chosen.title}",
        f"{SIGN} {kept}. Read back: {proven}",
        f"## Load\n\n```\n{usage.strip()}\n```",
        table_of(_sizes(model, chosen, size)),
    ]
    if facts.report is not None:
        parts.append(table_of(ladder(facts.report)))
    parts.append(f"## Plan\n\n{model.plan.summary()}\n\n```\n{model.plan}\n```")
    if facts.recipe or facts.command:
        parts.append(f"## Reproduce\n\nRecipe: {facts.recipe or 'none'}\n\n```\n{facts.command}\n```")
    return "\n\n".join(parts) + "\n"


def _sizes(model: Exportable, chosen: Format, size: int) -> Table:
    weights = parameter_count(model.network)
    rows = [
        (chosen.title, human_bytes(size), f"{8 * size / weights:.2f}"),
        ("fp16 weights alone", human_bytes(2 * weights), "16.00"),
        ("fp32 weights alone", human_bytes(4 * weights), "32.00"),
        ("in memory here", human_bytes(model_bytes(model.network)), f"{8 * model_bytes(model.network) / weights:.2f}"),
    ]
    return Table("Size", ("form", "bytes", "bits a weight"), tuple(rows))
