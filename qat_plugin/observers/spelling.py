"""How an observer is spelled: ``minmax``, ``moving-average:0.95``, ``percentile:99.9``, ``mse``, ``entropy``.

No torch here: a recipe's mistake is answered before anything heavy is imported.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Final

from qat_plugin.errors import ConfigError, did_you_mean

KINDS: Final = ("minmax", "moving-average", "percentile", "mse", "entropy")
DEFAULT_FOR_TRAINING: Final = "moving-average"
DEFAULT_FOR_CALIBRATION: Final = "mse"  # half the KL divergence of minmax on a language model, and no number to choose
_DEFAULTS: Final = {"moving-average": 0.9, "percentile": 99.99}


@dataclass(frozen=True)
class ObserverSpec:
    """One kind of observer with its number.

    Attributes:
        kind: one of :data:`KINDS`.
        value: the moving average's momentum in [0, 1), or the percentile in (0, 100]; ``None`` for other kinds.
    """

    kind: str
    value: float | None = None

    @classmethod
    def parse(cls, spelling: str | ObserverSpec, key: str = "observer") -> ObserverSpec:
        """The spec of a spelling ``KIND`` or ``KIND:NUMBER``.

        Args:
            spelling: a spec is returned as it is.
            key: what the error calls it.

        Raises:
            ConfigError: listing the kinds, or the numbers that one takes.
        """
        if isinstance(spelling, ObserverSpec):
            return spelling
        kind, colon, number = spelling.partition(":") if isinstance(spelling, str) else (repr(spelling), "", "")
        if kind not in KINDS:
            raise ConfigError(
                f"{key}={spelling} is not allowed: it is one of {', '.join(KINDS)} (percentile:99.9 and "
                f"moving-average:0.95 take a number).{did_you_mean(kind, KINDS)}"
            )
        if not colon:
            return cls(kind, _DEFAULTS.get(kind))
        if kind not in _DEFAULTS:
            raise ConfigError(f"{key}={spelling} is not allowed: {kind} takes no number")
        return cls(kind, _number(key, spelling, kind, number))

    def __str__(self) -> str:
        """The shortest spelling that parses to the same spec."""
        return self.kind if self.value == _DEFAULTS.get(self.kind) else f"{self.kind}:{self.value:.12g}"


def _number(key: str, spelling: str, kind: str, number: str) -> float:
    try:
        value = float(number)
    except ValueError:
        value = math.nan
    if not (0 < value <= 100 if kind == "percentile" else 0 <= value < 1):
        allowed = "a number above 0 and at most 100" if kind == "percentile" else "a momentum from 0 to below 1"
        raise ConfigError(f"{key}={spelling} is not allowed: {kind} takes {allowed}, such as {kind}:{_DEFAULTS[kind]}")
    return value
