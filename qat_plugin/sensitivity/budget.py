"""How much a model may weigh, and how much worse it may become: spellings and what they stand for."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import Final, Literal

from qat_plugin.errors import ConfigError
from qat_plugin.sensitivity.cost import Ledger
from qat_plugin.sensitivity.damage import Damage

_UNITS: Final = {
    "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12,
    "KiB": 2**10, "MiB": 2**20, "GiB": 2**30, "TiB": 2**40,
}  # fmt: skip
_NUMBER = re.compile(r"\s*([0-9]*\.?[0-9]+(?:[eE][-+]?[0-9]+)?)\s*([A-Za-z%]*)\s*")


@dataclass(frozen=True)
class Budget:
    """The bytes that a converted model's file may take.

    Attributes:
        kind: ``"share"`` of the bytes of the float model's tensors as they are now; ``"bpw"``: bits per weight, over
            the weights of the layers whose schemes are chosen and over nothing else, scales and zero points included;
            ``"bytes"`` of the whole file ``model.safetensors``.
        amount: the share, the bits, or the bytes.
        text: as it was written.
    """

    kind: Literal["share", "bpw", "bytes"]
    amount: float
    text: str

    @classmethod
    def parse(cls, text: str | Budget) -> Budget:
        """Read ``40%``, ``4.6bpw``, ``25MB`` or ``24MiB``.

        Raises:
            ConfigError: for anything else; the message lists the spellings.
        """
        if isinstance(text, Budget):
            return text
        match = _NUMBER.fullmatch(str(text))
        number, unit = (float(match[1]), match[2]) if match else (math.nan, "")
        if not number > 0 or not math.isfinite(number):
            raise _no_budget(text)
        if unit == "%":
            return cls("share", number / 100, str(text).strip())
        if unit.lower() == "bpw":
            return cls("bpw", number, str(text).strip())
        bytes_each = next((size for name, size in _UNITS.items() if name.lower() == unit.lower()), None)
        if bytes_each is None:
            raise _no_budget(text)
        return cls("bytes", number * bytes_each, str(text).strip())

    def limit(self, ledger: Ledger) -> int:
        """Bytes that the layers whose schemes are chosen may take together; negative when the rest exceeds it."""
        if self.kind == "bpw":
            return math.floor(self.amount * ledger.weights / 8 + 1e-6)
        total = self.amount * ledger.floats if self.kind == "share" else self.amount
        return math.floor(total + 1e-6) - ledger.fixed

    def spelled(self, layers: int, ledger: Ledger) -> str:
        """What a choice of so many bytes would be called in this budget's unit, rounded up."""
        if self.kind == "bpw":
            return f"{_up(8 * layers / ledger.weights, 2)}bpw"
        total = layers + ledger.fixed
        if self.kind == "share":
            return f"{_up(100 * total / ledger.floats, 1)}%"
        unit, size = next((u, s) for u, s in reversed(_UNITS.items()) if (u.endswith("iB") or u == "B") and total >= s)
        return f"{_up(total / size, 2)}{unit}" if size > 1 else f"{total}B"


def _no_budget(text: object) -> ConfigError:
    return ConfigError(
        f"budget={text} is not a budget: give a share of the float file (budget=40%), bits per weight of the layers "
        "that are quantized (budget=4.6bpw), or the size of the file (budget=25MB, budget=24MiB)"
    )


def _up(value: float, digits: int) -> str:
    return f"{math.ceil(value * 10**digits - 1e-9) / 10**digits:.{digits}f}"


@dataclass(frozen=True)
class MaxDrop:
    """How much worse a model may predict than its float model, measured on the calibration data.

    Attributes:
        kind: ``"kl"``: mean KL to the float model in nats a prediction; ``"perplexity"``: relative increase of the
            perplexity, which needs labels.
        amount: nats, or the increase as a share.
        text: as it was written.
    """

    kind: Literal["kl", "perplexity"]
    amount: float
    text: str

    @classmethod
    def parse(cls, text: str | float | MaxDrop) -> MaxDrop:
        """Read ``0.02`` (nats) or ``1%`` (perplexity).

        Raises:
            ConfigError: for anything else.
        """
        if isinstance(text, MaxDrop):
            return text
        match = _NUMBER.fullmatch(str(text))
        number, unit = (float(match[1]), match[2]) if match else (math.nan, "")
        if not number > 0 or not math.isfinite(number) or unit not in ("", "%", "nats"):
            raise ConfigError(
                f"max_drop={text} is not allowed: give the mean KL to the float model in nats (max_drop=0.02), or how "
                "much the perplexity may grow (max_drop=1%)"
            )
        if unit == "%":
            return cls("perplexity", number / 100, str(text).strip())
        return cls("kl", number, str(text).strip())

    def allows(self, damage: Damage) -> bool:
        """Whether a damage is within it."""
        if self.kind == "kl":
            return damage.kl <= self.amount
        return damage.loss_increase is not None and damage.loss_increase <= math.log1p(self.amount)
