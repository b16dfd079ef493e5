"""Which layers of a part of a model share an input, in the order they run, and what their inputs look like."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from qat_plugin.errors import DataError
from qat_plugin.measure.host_memory import return_freed_memory
from qat_plugin.numerics import divided_input, fake_quantize_activation
from qat_plugin.observers.distributed import synchronize
from qat_plugin.ptq.chains import Enough
from qat_plugin.ptq.factor import all_finite
from qat_plugin.ptq.ranks import failing_together, from_every
from qat_plugin.ptq.statistics import InputStatistics
from qat_plugin.qat import LayerQuantizer, Phase
from qat_plugin.qat.layers import ATTRIBUTE, current_weight, first_tensor

Run = Callable[[int], Any]
"""Runs a part of a model on the inputs of one batch, given its index."""


@dataclass(frozen=True)
class Group:
    """Layers that take the same tensors.

    Attributes:
        layers: plan name -> layer, in the order of their first calls.
        calls: how often each is called in one pass (layers may be shared).
    """

    layers: Mapping[str, nn.Module]
    calls: int

    @property
    def leader(self) -> nn.Module:
        """The layer whose input is looked at: the first that multiplies by integers, if there is one."""
        members = list(self.layers.values())
        return next((layer for layer in members if looks_at_inputs(layer)), members[0])


def looks_at_inputs(layer: nn.Module) -> bool:
    """Whether a layer's integers depend on its inputs: it multiplies their rows, as they are, by an integer weight."""
    quantizer: LayerQuantizer = getattr(layer, ATTRIBUTE)
    return quantizer.scheme.is_integer and not isinstance(layer, nn.Embedding) and current_weight(layer).dim() == 2


def input_groups(layers: Mapping[str, nn.Module], run: Run, batches: int) -> list[Group]:
    """Groups of layers by the tensors they take in one pass, in the order of first use; the same on all ranks.

    Batch 0 tells; layers that it does not reach (experts) are looked for in the others. Those that none reaches are in
    no group.
    """
    with failing_together():
        mine = _groups_here(layers, run, batches)
    seen: set[str] = set()
    groups: list[Group] = []
    for found in from_every([(list(group.layers), group.calls) for group in mine]):  # another may reach more layers
        for names, calls in found:
            if new := [name for name in names if name not in seen]:
                groups.append(Group({name: layers[name] for name in new}, calls))
                seen.update(new)
    return groups


def _groups_here(layers: Mapping[str, nn.Module], run: Run, batches: int) -> list[Group]:
    names = {id(layer): name for name, layer in layers.items()}
    groups: list[Group] = []
    missing = dict(layers)
    for batch in range(batches):
        taken: dict[str, list[Tensor]] = {}

        def look(
            layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], taken: dict[str, list[Tensor]] = taken
        ) -> None:
            x = first_tensor(args, kwargs)
            if x is not None:
                taken.setdefault(names[id(layer)], []).append(x)

        with _hooked(missing.values(), look):
            run(batch)
        groups += _same_inputs(taken, layers)
        missing = {name: layer for name, layer in missing.items() if name not in taken}
        if not missing:
            break
    return groups


def _same_inputs(taken: Mapping[str, list[Tensor]], layers: Mapping[str, nn.Module]) -> list[Group]:
    found: list[tuple[list[Tensor], dict[str, nn.Module]]] = []
    for name, tensors in taken.items():
        for others, members in found:
            if len(others) == len(tensors) and all(a is b for a, b in zip(tensors, others, strict=True)):
                members[name] = layers[name]
                break
        else:
            found.append((tensors, {name: layers[name]}))
    return [Group(members, len(tensors)) for tensors, members in found]


def gather(
    group: Group,
    run: Run,
    batches: int,
    *,
    hessian: bool,
    twin: tuple[nn.Module, Run] | None = None,
    static: bool = True,
) -> InputStatistics:
    """Statistics of what a group's leader multiplies, over all batches of all ranks.

    Divided by its input scale, and rounded where the scheme rounds activations by themselves.

    Args:
        group: whose input.
        run: runs the part of the model that holds the group.
        batches: how many.
        hessian: gather sums of the inputs, the second moment among them; without it static schemes only watch.
        static: let static schemes watch.
        twin: the same leader in the float model, and what runs that; to know how far inputs drifted.

    Raises:
        DataError: for NaN or infinite inputs, naming layer and batch.
    """
    leader, mine = group.leader, [getattr(layer, ATTRIBUTE) for layer in group.layers.values()]
    quantizer: LayerQuantizer = getattr(leader, ATTRIBUTE)
    drifts = twin is not None and hessian
    through = _narrow(group) if drifts else None
    statistics = InputStatistics(quantizer.layer.shape[1], hessian, drifts, through)
    with failing_together(), _observing(mine, static):
        for batch in range(batches):
            for x, float_x in _beside(group, run, batch, twin if hessian else None):
                if not all_finite(x):
                    raise DataError(_not_finite(quantizer.layer.name, batch, x))
                for watching in mine if static else ():
                    watching.observe(_divided(watching, x))
                if hessian:
                    statistics.add(_multiplied(quantizer, x, rounded=True), float_x)
    statistics.to(current_weight(leader).device).synchronize()
    if static:
        synchronize([each.observer for each in mine if each.observer is not None])
    return statistics


def _beside(
    group: Group, run: Run, batch: int, twin: tuple[nn.Module, Run] | None
) -> Iterator[tuple[Tensor, Tensor | None]]:
    """What a group's leader takes in one pass, and beside it, divided alike, what it takes in the float model."""
    inputs = _inputs(group.leader, run, batch, group.calls)
    return_freed_memory()  # holes that a pass leaves are not where the next one fits
    beside: list[Tensor | None] = [None] * len(inputs)
    if twin is not None:
        theirs = _inputs(*twin, batch, group.calls)
        return_freed_memory()
        if [x.shape for x in theirs] == [x.shape for x in inputs]:  # experts may be chosen otherwise
            beside = [_multiplied(getattr(group.leader, ATTRIBUTE), x, rounded=False) for x in theirs]
    yield from zip(inputs, beside, strict=True)


def _narrow(group: Group) -> Tensor | None:
    """The weight of a layer alone with fewer outputs than inputs: what its output drifts by is less to hold."""
    quantizer: LayerQuantizer = getattr(group.leader, ATTRIBUTE)
    weight = current_weight(group.leader)
    if len(group.layers) > 1 or quantizer.layer.shape[0] >= quantizer.layer.shape[1] or weight.dim() != 2:
        return None
    return quantizer.scaled_rows(weight.detach()).to(torch.float32)


def _divided(quantizer: LayerQuantizer, x: Tensor) -> Tensor:
    return x if quantizer.input_scale is None else divided_input(x, quantizer.input_scale, quantizer.scheme)


def _multiplied(quantizer: LayerQuantizer, x: Tensor, *, rounded: bool) -> Tensor:
    """What meets the integers: the input divided by its scale, and rounded by a dynamic scheme."""
    x = _divided(quantizer, x)
    dynamic = quantizer.scheme.quantizes_activations and quantizer.observer is None
    return fake_quantize_activation(x) if rounded and dynamic else x


@contextmanager
def _observing(quantizers: Sequence[LayerQuantizer], static: bool) -> Iterator[None]:
    """Let static schemes watch what they are shown."""
    before = {quantizer: quantizer.phase for quantizer in quantizers}
    for quantizer in quantizers:
        quantizer.observe_always = static
        quantizer.phase = Phase.OBSERVING if static else Phase.FLOAT
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
        if x is not None:
            taken.append((torch.cat(x.unbind()) if x.is_nested else x).detach())
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
