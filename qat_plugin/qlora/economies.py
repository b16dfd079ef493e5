"""What to change so that a run fits into the memory there is, the least harmful first."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any, Final

from qat_plugin.errors import ConfigError
from qat_plugin.qlora.forecast import Forecast, Settings, forecast_of

_SHORTEST: Final = 512
_LOWEST_RANK: Final = 8


@dataclass(frozen=True)
class Change:
    """A change of settings under which a run fits.

    Attributes:
        settings: field -> new value, in the order tried.
        costs: what each costs, in words.
        forecast: of the run with them.
    """

    settings: dict[str, Any]
    costs: tuple[str, ...]
    forecast: Forecast

    def __str__(self) -> str:
        changed = (
            f"{name}={value} ({cost})" for (name, value), cost in zip(self.settings.items(), self.costs, strict=True)
        )
        return "; ".join(changed) or "nothing needs to change"


@dataclass(frozen=True)
class _Option:
    field: str
    cost: str
    values: Callable[[Settings], Iterator[Any]]


def _halves(least: int) -> Callable[[int], Iterator[int]]:
    def halved(value: int) -> Iterator[int]:
        while value // 2 >= least:
            value //= 2
            yield value

    return halved


def _switch(field: str, wanted: Any) -> Callable[[Settings], Iterator[Any]]:
    return lambda settings: iter(() if getattr(settings, field) == wanted else (wanted,))


_OPTIONS: Final = (
    _Option("chunked_loss", "the same loss, no slower", lambda s: iter(() if s.chunked_loss else (True,))),
    _Option("optimizer", "moments in 8 bits", _switch("optimizer", "adamw8bit")),
    _Option("gradient_checkpointing", "about a third slower, same result", _switch("gradient_checkpointing", True)),
    _Option("offload", "slower by the transfers, same result", lambda s: iter((True,) * (s.on_cuda and not s.offload))),
    _Option("batch_size", "same result with more accumulated steps", _switch("batch_size", 1)),
    _Option(
        "sequence_length",
        "longer examples are cut off, or with packing go on without their beginning",
        lambda s: _halves(_SHORTEST)(s.sequence_length),
    ),
    _Option("rank", "adapters of less capacity", lambda s: _halves(_LOWEST_RANK)(s.rank)),
)


def cheapest_change(forecast: Forecast, gib: float) -> Change | None:
    """The smallest set of changes under which a run fits, of equally small ones the least harmful.

    Tried in this order, one alone first, then two, and so on: chunked loss, 8-bit moments, gradient checkpointing,
    offloaded activations, batch size 1, half the sequence length (down to 512), half the rank (down to 8).

    Args:
        forecast: of the run as it is.
        gib: memory that torch can have, in GiB (2^30 bytes).

    Returns:
        The changes, none of them where it fits already; ``None`` where all together do not help.

    Raises:
        ConfigError: when ``gib`` is not above 0.
    """
    if not gib > 0:
        raise ConfigError(f"gib={gib} is not allowed: it is memory in GiB, above 0")
    if forecast.fits(gib):
        return Change({}, (), forecast)
    given = forecast.settings
    open_options = [(option, values) for option in _OPTIONS if (values := list(option.values(given)))]
    for size in range(1, len(open_options) + 1):
        for chosen in itertools.combinations(open_options, size):
            for picked in itertools.product(*(values for _, values in chosen)):
                changed = {option.field: value for (option, _), value in zip(chosen, picked, strict=True)}
                tried = forecast_of(forecast.outline, replace(given, **changed))
                if tried.fits(gib):
                    return Change(changed, tuple(option.cost for option, _ in chosen), tried)
    return None
