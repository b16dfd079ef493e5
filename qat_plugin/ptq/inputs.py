"""Which layers of a part of a model share an input, in the order they run, and what their inputs look like."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from qat_plugin.errors import DataError
from qat_plugin.observers.distributed import synchronize
from qat_plugin.ptq.chains import Enough
from qat_plugin.ptq.statistics import InputStatistics
from qat_plugin.qat import LayerQuantizer, Phase
from qat_plugin.qat.layers import ATTRIBUTE, first_tensor

Run = Callable[[int], Any]
"""Runs a part of a model on the inputs of one batch, given its index."""


@dataclass(frozen=True)
class Group:
    """Layers that take the same tensor.

    Attributes:
        layers: plan name -> layer, in the order of their calls.
        calls: how often the first of them is called in one pass (layers may be shared).
    """

    layers: Mapping[str, nn.Module]
    calls: int

    @property
    def first(self) -> nn.Module:
        """The layer whose input is looked at."""
        return next(iter(self.layers.values()))


def input_groups(layers: Mapping[str, nn.Module], run: Run) -> list[Group]:
    """Groups of layers by the tensor they take, in the order of first use, from one pass on batch 0.

    Layers that are not called in it are in no group.
    """
    names = {id(layer): name for name, layer in layers.items()}
    seen: list[tuple[Tensor, dict[str, nn.Module]]] = []
    calls: dict[int, int] = {}

    def look(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        x = first_tensor(args, kwargs)
        calls[id(layer)] = calls.get(id(layer), 0) + 1
        if x is None or calls[id(layer)] > 1:
            return
        for taken, members in seen:
            if taken is x:
                members[names[id(layer)]] = layer
                return
        seen.append((x, {names[id(layer)]: layer}))

    with _hooked(layers.values(), look):
        run(0)
    return [Group(members, calls[id(next(iter(members.values())))]) for _, members in seen]


def gather(
    group: Group,
    run: Run,
    batches: int,
    *,
    hessian: bool,
    twin: tuple[nn.Module, Run] | None = None,
    static: bool = True,
) -> InputStatistics:
    """Statistics of a group's input over all batches.

    Args:
        group: whose input.
        run: runs the part of the model that holds the group.
        batches: how many.
        hessian: gather sums of the inputs, the second moment among them; without it static schemes only watch.
        static: let static schemes watch.
        twin: the same first layer in the float model, and what runs that; to know how far inputs drifted.

    Raises:
        DataError: for NaN or infinite inputs, naming layer and batch.
    """
    mine: list[LayerQuantizer] = [getattr(layer, ATTRIBUTE) for layer in group.layers.values()]
    first = mine[0]
    statistics = InputStatistics(first.layer.shape[1], hessian)
    with _observing(mine, static):
        for batch in range(batches):
            beside = None if twin is None else _inputs(twin[0], twin[1], batch, group.calls)
            for call, x in enumerate(_inputs(group.first, run, batch, group.calls)):
                if not bool(torch.isfinite(x).all()):
                    raise DataError(_not_finite(first.layer.name, batch, x))
                taken, *_ = [quantizer.fake_input(x) for quantizer in mine]  # each watches
                if hessian:
                    statistics.add(taken, None if beside is None else beside[call])
    statistics.synchronize()
    if static:
        synchronize([quantizer.observer for quantizer in mine if quantizer.observer is not None])
    return statistics


@contextmanager
def _observing(quantizers: Sequence[LayerQuantizer], static: bool) -> Iterator[None]:
    """Let static schemes watch; dynamic ones round what they take, as the kernel will."""
    before = {quantizer: quantizer.phase for quantizer in quantizers}
    for quantizer in quantizers:
        quantizer.observe_always = static
        watching = quantizer.observer is not None
        quantizer.phase = Phase.FAKE_QUANTIZED if not watching else Phase.OBSERVING if static else Phase.FLOAT
    try:
        yield
    finally:
        for quantizer, phase in before.items():
            quantizer.phase, quantizer.observe_always = phase, False


def _inputs(layer: nn.Module, run: Run, batch: int, calls: int) -> list[Tensor]:
    """What a layer takes in one pass, which ends there."""
    taken: list[Tensor] = []

    def look(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        x = first_tensor(args, kwargs)
        if x is not None and x.numel():
            taken.append(x.detach())
        if len(taken) == calls:
            raise Enough

    with _hooked([layer], look):
        try:
            run(batch)
        except Enough:
            return taken
    return taken


@contextmanager
def _hooked(layers: Any, look: Any) -> Iterator[None]:
    handles = [layer.register_forward_pre_hook(look, with_kwargs=True) for layer in layers]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _not_finite(name: str, batch: int, x: Tensor) -> str:
    bad = int((~torch.isfinite(x)).sum())
    return (
        f"{name}: {bad} of {x.numel()} numbers of its input are NaN or infinite in calibration batch {batch}; look at "
        "that batch, or run the model in a wider float type"
    )


def layer_named(module: nn.Module, name: str) -> nn.Module:
    """The prepared layer of a plan name in a copy of the module that holds it."""
    return next(m for m in module.modules() if hasattr(m, ATTRIBUTE) and getattr(m, ATTRIBUTE).layer.name == name)


def names_of(groups: Sequence[Group]) -> set[str]:
    """Plan names of all layers of the groups."""
    return {name for group in groups for name in group.layers}
