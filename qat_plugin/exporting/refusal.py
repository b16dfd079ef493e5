"""Plans that a format cannot hold: refused before anything is written, layer by layer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from qat_plugin.errors import ExportError

_SHOWN = 8


@dataclass(frozen=True)
class Refusal:
    """One layer that a format cannot hold as it is.

    Attributes:
        layer: its name in the plan.
        scheme: its spelling.
        reason: why not, a few words.
        nearest: the spelling of the nearest scheme that fits, or an empty string.
    """

    layer: str
    scheme: str
    reason: str
    nearest: str = ""

    def __str__(self) -> str:
        """As one line of a message."""
        instead = f"; nearest that fits: {self.nearest}" if self.nearest else ""
        return f"{self.layer} ({self.scheme}): {self.reason}{instead}"


def check_refusals(refusals: Sequence[Refusal], title: str) -> None:
    """Raise when there are any; layers refused for the same reason are told together.

    Raises:
        ExportError: naming the layers, the reasons and what would fit.
    """
    if not refusals:
        return
    groups: dict[tuple[str, str, str], list[str]] = {}
    for refusal in refusals:
        groups.setdefault((refusal.scheme, refusal.reason, refusal.nearest), []).append(refusal.layer)
    lines = []
    for (scheme, reason, nearest), layers in groups.items():
        more = f" and {len(layers) - _SHOWN} more" if len(layers) > _SHOWN else ""
        lines.append(str(Refusal(", ".join(layers[:_SHOWN]) + more, scheme, reason, nearest)))
    raise ExportError(
        f"{title} cannot hold this plan, and nothing was written:\n  "
        + "\n  ".join(lines)
        + "\nGive these layers another scheme in the policy (or keep them float)"
    )
