"""``scale_block``: the best scales for a block's layers, folded where that is exact, kept at the layers elsewhere."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Final, Literal, get_args

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from qat_plugin.errors import ConfigError
from qat_plugin.measure.evaluating import evaluating
from qat_plugin.numerics import round_to_nearest
from qat_plugin.policy.roles import is_quantized
from qat_plugin.ptq.awq import search_awq
from qat_plugin.ptq.folding import TOLERANCE, changed, fold, move_scale, name_in
from qat_plugin.ptq.output_error import Rounding
from qat_plugin.ptq.producers import Producer, producers
from qat_plugin.ptq.ranks import from_every, of_first, several
from qat_plugin.ptq.scale_search import Candidate
from qat_plugin.ptq.smoothquant import search_smoothquant
from qat_plugin.ptq.statistics import InputStatistics
from qat_plugin.ptq.tracing import Sample, largest_change, trace
from qat_plugin.qat.held import set_input_scale
from qat_plugin.qat.input_scale import cannot_have_input_scale
from qat_plugin.qat.layers import ATTRIBUTE, FakeQuantized, current_weight
from qat_plugin.qat.quantizer import LayerQuantizer, Phase

ScalingMethod = Literal["awq", "smoothquant"]
METHODS: Final[tuple[str, ...]] = get_args(ScalingMethod)

Group = Sequence[tuple[str, nn.Module]]
Search = Callable[..., Candidate]


@dataclass(frozen=True)
class ScalingNote:
    """What was done for layers that share an input.

    Attributes:
        layers: their plan names.
        action: ``"folded"`` into another module, ``"kept"`` as an input scale of each layer, or ``"none"``.
        place: the full name of the module folded into, else "".
        reason: why it was not folded, or why nothing was done.
        alpha: the exponent chosen.
        error, unscaled_error: squared output error on the calibration statistics, with and without the scale.
    """

    layers: tuple[str, ...]
    action: Literal["folded", "kept", "none"]
    place: str = ""
    reason: str = ""
    alpha: float = 0.0
    error: float = 0.0
    unscaled_error: float = 0.0

    @property
    def in_short(self) -> str:
        """What was done, without names and figures."""
        because = f": {self.reason}" if self.reason else ""
        if self.action == "folded":
            return f"input scale folded into {self.place}"
        return ("input scale kept" if self.action == "kept" else "no input scale") + because

    def __str__(self) -> str:
        names = ", ".join(self.layers)
        if self.action == "none":
            return f"{names}: left alone: {self.reason}"
        share = self.error / self.unscaled_error if self.unscaled_error else 1.0
        done = f"folded into {self.place}" if self.action == "folded" else "kept as an input scale"
        because = f": {self.reason}" if self.reason else ""
        return f"{names}: {done} (alpha {self.alpha:g}, {share:.0%} of the squared output error){because}"


@torch.no_grad()
def scale_block(
    block: nn.Module,
    groups: Sequence[Group],
    statistics: Mapping[str, InputStatistics],
    sample: Sample,
    method: str = "awq",
    *,
    model: nn.Module | None = None,
    keep: bool = True,
    alpha: float | None = 0.5,
    grid: int = 20,
    rounding: Rounding = round_to_nearest,
    weight_magnitude: bool = True,
) -> list[ScalingNote]:
    """Scale the inputs of a block's prepared layers so that they quantize better, in place.

    A scale goes into the module that produces the input where the float block then computes the same on the sample, to
    a relative 1e-5 (a 16-bit block is tried in float32; its own parameters are then rounded once to their type).
    Elsewhere it becomes an input scale of each layer. Call it before weights become integers: layers that change take
    new scales, and static schemes must be calibrated afterwards. Under ``torch.distributed`` every rank calls it, with
    the same statistics: the sample of rank 0 tells what could be folded, and is, where no rank's own speaks against it.

    Args:
        block: a part of a prepared model that can be called by itself.
        groups: (plan name, layer) of layers that share one input, such as query, key and value.
        statistics: plan name -> of that layer's input, with second moments; those of scaled layers are divided by their
            scale, in place, so that rounding and GPTQ go on with them.
        sample: (args, kwargs) of a real call of the block, without a cache.
        method: ``"awq"`` or ``"smoothquant"``.
        model: what the block lies in, so that modules whose parameters are used elsewhere too are left alone.
        keep: without it, what cannot be folded is left alone instead of getting an input scale.
        alpha: SmoothQuant's; ``None`` searches.
        grid, rounding, weight_magnitude: as in :func:`~qat_plugin.ptq.awq.awq_scale`.

    Returns:
        One note per group.

    Raises:
        ConfigError: for an unknown method, layers that are not prepared or already scaled, statistics that are missing.
    """
    if method not in METHODS:
        raise ConfigError(f"scaling method {method!r} is not one of {', '.join(METHODS)}")
    _check(groups, statistics)
    search: Search = partial(search_smoothquant, alpha=alpha, grid=grid, rounding=rounding)
    if method == "awq":
        search = partial(search_awq, grid=grid, rounding=rounding, weight_magnitude=weight_magnitude)
    with evaluating(block), _in_float(block):
        scaler = _BlockScaler(block, sample, model, search, keep)
        return [scaler.scale(group, statistics) for group in groups]


def _check(groups: Sequence[Group], statistics: Mapping[str, InputStatistics]) -> None:
    for name, layer in (entry for group in groups for entry in group):
        if not isinstance(layer, FakeQuantized):
            raise ConfigError(f"{name} is not prepared: prepare(model, plan) before scaling")
        if layer.fake_quantizer.input_scale is not None:
            raise ConfigError(f"{name} has an input scale already; set_input_scale(layer, None) takes it off")
        if layer.fake_quantizer.scheme.is_integer and name not in statistics:
            raise ConfigError(f"there are no input statistics of {name}; there are those of {', '.join(statistics)}")


@contextmanager
def _in_float(block: nn.Module) -> Iterator[None]:
    """Prepared layers compute in float inside; afterwards they are in their phase, frozen scales those of now."""
    layers = [module for module in block.modules() if isinstance(module, FakeQuantized)]
    phases = [layer.fake_quantizer.phase for layer in layers]
    for layer in layers:
        layer.fake_quantizer.phase = Phase.FLOAT
    try:
        yield
    finally:
        for layer, phase in zip(layers, phases, strict=True):
            layer.fake_quantizer.enter(phase, current_weight(layer))


class _BlockScaler:
    """Scales the groups of one block in turn; tries folding on a float32 copy where parameters have 16 bits."""

    def __init__(self, block: nn.Module, sample: Sample, model: nn.Module | None, search: Search, keep: bool) -> None:
        self.block, self.own, self.search, self.keep = block, sample, search, keep
        self.sample = of_first(sample)
        self.twin, self.unfoldable = block, ""
        self.seen = trace(block, self.sample)
        if any(parameter.dtype.itemsize < 4 for parameter in block.parameters()):
            self._use_float32_copy()
        change, _ = largest_change(self.seen, trace(self.twin, self.sample), None)
        if not change <= TOLERANCE:
            self.unfoldable = "the block does not give the same output twice, so that folding cannot be checked"
        self.own_seen = trace(self.twin, self.own) if several() else self.seen
        self.twins = dict(zip(block.modules(), self.twin.modules(), strict=True))
        self.originals = {twin: original for original, twin in self.twins.items()}
        self.used_elsewhere = set() if model is None else _used_outside(model, block)

    def _use_float32_copy(self) -> None:
        twin, sample = copy.deepcopy(self.block).float(), tree_map(_in_float32, self.sample)
        try:
            seen = trace(twin, sample)
        except (RuntimeError, TypeError, ValueError) as error:
            self.unfoldable = f"a float32 copy of the block does not run, so that folding cannot be checked ({error})"
        else:
            self.twin, self.sample, self.seen = twin, sample, seen
            self.own = tree_map(_in_float32, self.own)

    def scale(self, group: Group, statistics: Mapping[str, InputStatistics]) -> ScalingNote:
        """Find a scale for one group and apply it."""
        names, layers = tuple(name for name, _ in group), [layer for _, layer in group]
        integer = [(name, layer) for name, layer in group if _quantizer(layer).scheme.is_integer]
        if reason := self._refusal(layers, [layer for _, layer in integer]):
            return ScalingNote(names, "none", reason=reason)
        search = self._search_of(integer, statistics)
        tried, found = self._fold(layers, search)
        if found is not None:
            return self._done(names, "folded", statistics, found, place=tried)
        found = search(constrain=None)
        if _does_nothing(found):
            return ScalingNote(names, "none", reason="no scale quantizes better than none")
        if not self.keep:
            return ScalingNote(names, "none", reason=tried)
        for _, layer in integer:
            set_input_scale(layer, found.scale)
        return self._done(tuple(name for name, _ in integer), "kept", statistics, found, reason=tried)

    def _refusal(self, layers: Sequence[nn.Module], integer: Sequence[nn.Module]) -> str:
        """Why nothing can be done for a group; "" when something can."""
        if not integer:
            return "none of these layers becomes integers"
        inputs = [self.seen.input_of(self.twins[layer]) for layer in layers]
        if any(given is None for given in inputs):
            return "not all of these layers took part in the sample"
        first = inputs[0]
        if any(given is not first and not _equal(given, first) for given in inputs):
            return "these layers do not share one input"
        return next(filter(None, (cannot_have_input_scale(_quantizer(layer)) for layer in integer)), "")

    def _search_of(self, integer: Group, statistics: Mapping[str, InputStatistics]) -> Search:
        quantizers = [_quantizer(layer) for _, layer in integer]
        weights = [
            quantizer.rows(current_weight(layer)) for quantizer, (_, layer) in zip(quantizers, integer, strict=True)
        ]
        schemes = [quantizer.scheme for quantizer in quantizers]
        return partial(self.search, weights, statistics[integer[0][0]], schemes)

    def _fold(self, layers: Sequence[nn.Module], search: Search) -> tuple[str, Candidate | None]:
        """(place folded into, the scale), or (why not, ``None``)."""
        if self.unfoldable:
            return self.unfoldable, None
        twins, reasons = [self.twins[layer] for layer in layers], []
        known: dict[object, Candidate] = {}
        for producer in producers(self.seen, twins, self.twin):
            mine = replace(producer, module=self.originals[producer.module])
            if reason := self._untouchable(mine, layers):
                reasons.append(reason)
                continue
            found = known.get(mine.heads) or search(constrain=mine.constrain)
            known[mine.heads] = found
            if _does_nothing(found):
                reasons.append(f"no scale that {name_in(self.block, mine.module)} could take quantizes better")
                continue
            objection = partial(self._objection, producer)
            reason, self.seen = fold(self.twin, twins, producer, found.scale, self.sample, self.seen, objection)
            reason = reason or self._folded_for_good(layers, mine, found.scale)
            if not reason:
                return self._full_name(mine.module, layers[0]), found
            reasons.append(reason)
        return reasons[0] if reasons else "nothing in the block that could be scaled produces this input", None

    def _objection(self, producer: Producer) -> str:
        """Why not to fold for the sample of any rank; "" when none objects."""
        if not several():
            return ""
        after = trace(self.twin, self.own)
        reason = next(filter(None, from_every(changed(self.twin, producer, self.own_seen, after))), "")
        self.own_seen = self.own_seen if reason else after
        return reason

    def _folded_for_good(self, layers: Sequence[nn.Module], producer: Producer, scale: Tensor) -> str:
        """Do in the block what was right in its copy; why not, or ""."""
        if self.twin is not self.block:
            written = move_scale(layers, producer, scale)
            if not all(bool(parameter.isfinite().all()) for parameter, _ in written):
                for parameter, original in written:
                    parameter.copy_(original)
                self.unfoldable = "a folded parameter left the range of its type"  # and the copy is another block now
                return self.unfoldable
        for layer in (*layers, producer.module):
            if isinstance(layer, FakeQuantized):
                layer.fake_quantizer.start_anew(current_weight(layer))
        return ""

    def _untouchable(self, producer: Producer, layers: Sequence[nn.Module]) -> str:
        """Why parameters must not be written to; "" when they may be."""
        name = name_in(self.block, producer.module)
        written = [*producer.parameters, *map(current_weight, layers)]
        if any(id(parameter) in self.used_elsewhere for parameter in written):
            return f"parameters of these layers or of {name} are used outside the block too"
        if any(not isinstance(p, nn.Parameter) or not p.is_floating_point() or is_quantized(p) for p in written):
            return f"weights of these layers or of {name} are not plain float parameters"
        quantizer = getattr(producer.module, ATTRIBUTE, None)
        tied = quantizer is not None and (
            quantizer.layer.tied_to or any(entry.tied_to == quantizer.layer.name for entry in quantizer.plan)
        )
        return f"the weight of {name} is shared with another layer" if tied else ""

    def _full_name(self, module: nn.Module, layer: nn.Module) -> str:
        """A module's name in the model, by how a layer of the block is called there."""
        inside, planned = name_in(self.block, layer), _quantizer(layer).layer.name
        prefix = planned.removesuffix(inside) if planned.endswith(inside) else ""
        return prefix + name_in(self.block, module)

    def _done(
        self,
        names: tuple[str, ...],
        action: Literal["folded", "kept"],
        statistics: Mapping[str, InputStatistics],
        found: Candidate,
        *,
        place: str = "",
        reason: str = "",
    ) -> ScalingNote:
        for mine in {id(statistics[name]): statistics[name] for name in names if name in statistics}.values():
            mine.divide(found.scale)
        return ScalingNote(names, action, place, reason, found.alpha, found.error, found.unscaled_error)


def _quantizer(layer: nn.Module) -> LayerQuantizer:
    quantizer: LayerQuantizer = getattr(layer, ATTRIBUTE)
    return quantizer


def _used_outside(model: nn.Module, block: nn.Module) -> set[int]:
    """Ids of the parameters that the model reaches by a way around the block, modules shared with it included."""
    paths = list(model.named_modules(remove_duplicate=False))
    inside = tuple(f"{name}." if name else "" for name, module in paths if module is block)
    around = [module for name, module in paths if not f"{name}.".startswith(inside)]
    return {id(parameter) for module in around for parameter in module._parameters.values()}


def _does_nothing(found: Candidate) -> bool:
    return bool((found.scale == 1).all())


def _equal(a: Tensor | None, b: Tensor | None) -> bool:
    return a is not None and b is not None and a.shape == b.shape and torch.equal(a, b)


def _in_float32(value: object) -> object:
    return value.to(torch.float32) if isinstance(value, Tensor) and value.is_floating_point() else value
