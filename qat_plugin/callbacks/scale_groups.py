"""Learned scales in optimizer groups of their own: without weight decay, with a learning rate of their own.

An unmodified module hands ``self.parameters()`` to its optimizer, learned scales among them. After
``configure_optimizers`` and before a checkpoint's optimizer states are restored (Lightning's ``on_fit_start``), each
group that holds some is split in two; the schedulers that follow the group follow both parts.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, Final

import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import nn

from qat_plugin.errors import ConfigError

_RATES_OF_GROUP: Final = ("lr", "initial_lr", "max_lr", "min_lr")
_RATES_OF_SCHEDULER: Final = ("base_lrs", "_last_lr", "max_lrs", "min_lrs")
_PER_GROUP: Final = ("lr_lambdas", "base_momentums", "max_momentums")


def check_rate(rate: float | None) -> None:
    """Raise unless it is a learning rate.

    Raises:
        ConfigError: for zero or less.
    """
    if rate is not None and not rate > 0:
        raise ConfigError(f"scale_learning_rate={rate} is not allowed: it must be above 0, or None for the weights'")


def split_scales(
    optimizers: Iterable[torch.optim.Optimizer],
    schedulers: Iterable[Any],
    scales: dict[str, nn.Parameter],
    rate: float | None,
) -> None:
    """Give learned scales and zero points their own groups.

    Args:
        optimizers: as ``configure_optimizers`` made them; changed in place.
        schedulers: likewise; those of torch follow the new groups.
        scales: name -> Parameter, see :func:`qat_plugin.qat.grid_parameters`.
        rate: where the weights have the learning rate their group was given (its peak, under ``OneCycleLR``), the
            scales have this one; a schedule changes both by the same factor. ``None`` for the weights' own.

    Raises:
        ConfigError: for an optimizer that takes one group only.
    """
    wanted, found = {id(parameter) for parameter in scales.values()}, set[int]()
    schedulers = list(_flat(schedulers))
    for optimizer in optimizers:
        mine = [scheduler for scheduler in schedulers if getattr(scheduler, "optimizer", None) is optimizer]
        for index in range(len(optimizer.param_groups)):
            chosen = [p for p in optimizer.param_groups[index]["params"] if id(p) in wanted]
            if chosen:
                _split(optimizer, index, chosen, mine, rate)
                found |= {id(p) for p in chosen}
    missing = [name for name, parameter in scales.items() if parameter.requires_grad and id(parameter) not in found]
    if missing:
        rank_zero_warn(
            f"learned scales that no optimizer holds stay where they began: {', '.join(missing[:3])} "
            f"({len(missing)} in all). Pass them to the optimizer (self.parameters()), or learn_scales=False"
        )


def _split(
    optimizer: torch.optim.Optimizer,
    index: int,
    chosen: Sequence[nn.Parameter],
    schedulers: Sequence[Any],
    rate: float | None,
) -> None:
    group = optimizer.param_groups[index]
    if isinstance(optimizer, torch.optim.LBFGS):
        raise ConfigError("learned scales need a parameter group of their own, and LBFGS takes one only: use another")
    own = {id(p) for p in chosen}
    rest = [p for p in group["params"] if id(p) not in own]
    factor = 1.0 if rate is None else rate / _given_rate(group)
    apart = {**group, "params": list(chosen)} if rest else group
    for name in _RATES_OF_GROUP:
        if name in apart:
            apart[name] = apart[name] * factor
    if "weight_decay" in apart:
        apart["weight_decay"] = 0.0
    if rest:
        group["params"] = rest
        optimizer.add_param_group(apart)
    for scheduler in schedulers:
        _follow(scheduler, index, factor, new=bool(rest))


def _given_rate(group: dict[str, Any]) -> float:
    rate = float(group.get("max_lr", group.get("initial_lr", group["lr"])))
    if rate <= 0:
        raise ConfigError(
            f"scale_learning_rate is relative to the weights', and their group begins at {rate}: give the optimizer a "
            "learning rate above 0 (a scheduler may warm it up)"
        )
    return rate


def _follow(scheduler: Any, index: int, factor: float, *, new: bool) -> None:
    """Let a scheduler's lists of one entry a group have one for the new group, or a new one for a changed group."""
    for name in (*_RATES_OF_SCHEDULER, *_PER_GROUP):
        values = getattr(scheduler, name, None)
        if not isinstance(values, list) or len(values) <= index:
            continue
        value = values[index] * factor if name in _RATES_OF_SCHEDULER else values[index]
        if new:
            values.append(value)
        else:
            values[index] = value


def _flat(schedulers: Iterable[Any]) -> Iterable[Any]:
    """Schedulers, and those inside SequentialLR and ChainedScheduler."""
    for scheduler in schedulers:
        yield scheduler
        yield from _flat(getattr(scheduler, "_schedulers", ()))
