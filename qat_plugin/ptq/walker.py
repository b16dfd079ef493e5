"""The walker: takes the layers of a model in the order they run, each on what the quantized ones before it give.

::

    batches -> loose layers before -> chain of blocks, one at a time -> loose layers after
                                       |  block i: hidden states in
                                       |    layers that share an input: statistics -> integers -> next ones
                                       |  hidden states out, through the quantized block

Of a chain only one block's inputs are held (two copies: the quantized model's and the float one's), and they replace
each other batch by batch. Parts that are no chain are run from the model's beginning each time.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from qat_plugin.errors import PrepareError
from qat_plugin.numerics import Quantized, round_to_nearest
from qat_plugin.ptq.chains import Chain, ChainInputs, find_chains, first_output, record
from qat_plugin.ptq.feeding import feed
from qat_plugin.ptq.gptq import GptqOptions, aim, output_error
from qat_plugin.ptq.inputs import Group, Run, energy, gather, input_groups, names_of
from qat_plugin.ptq.methods import Method, rounded
from qat_plugin.ptq.results import LayerResult
from qat_plugin.ptq.statistics import InputStatistics
from qat_plugin.qat import LayerQuantizer, Phase, hold, prepared_layers
from qat_plugin.qat.layers import ATTRIBUTE, current_weight
from qat_plugin.scheme import Scheme


@dataclass(frozen=True)
class Part:
    """A stretch of the work that ends at a point from which it can be taken up again.

    Attributes:
        index, count: part i of n.
        name: of the block, or ``model`` for loose layers.
        layers: what was done.
        seconds: how long it took.
        resumed: whether it was read from an earlier session's files.
    """

    index: int
    count: int
    name: str
    layers: tuple[LayerResult, ...]
    seconds: float
    resumed: bool = False


class Store:
    """Where finished parts are kept; this one keeps nothing."""

    def load(self, part: str, layers: dict[str, nn.Module], scope: nn.Module) -> tuple[LayerResult, ...] | None:
        """Put an earlier session's results into the layers; ``None`` when there are none."""
        return None

    def save(self, part: str, layers: dict[str, nn.Module], scope: nn.Module, results: Sequence[LayerResult]) -> None:
        """Keep the results of a part."""


@dataclass
class Walker:
    """Quantizes the layers of a prepared model, in place.

    Args:
        model: prepared; its layers are in the float phase.
        batches: the calibration data.
        method: what to do with each layer.
        options: GPTQ's.
        keep_on: the device on which hidden states wait; by default the model's own.
        store: where finished parts are kept.
        told: called after each part.
    """

    model: nn.Module
    batches: Sequence[Any]
    method: Method
    options: GptqOptions
    keep_on: torch.device | None = None
    store: Store = field(default_factory=Store)
    told: Callable[[Part], None] = lambda part: None
    results: list[LayerResult] = field(default_factory=list)

    def walk(self) -> tuple[LayerResult, ...]:
        """Do all of it."""
        layers = prepared_layers(self.model)
        if not self.method.looks:  # nothing depends on the data, and the float weights stay what they are
            return tuple(
                LayerResult(name, str(getattr(layer, ATTRIBUTE).scheme), "rtn") for name, layer in layers.items()
            )
        self._held: dict[int, tuple[str, Quantized]] = {}
        self._parted = _parted_by_conversion(layers)
        waiting = dict(layers)
        chains = [(chain, self._inside(chain, layers)) for chain in find_chains(self.model)]
        self._count = 1 + sum(len(chain.blocks) for chain, _ in chains)
        self._done = 0
        for chain, inside in chains:
            self._loose(self._before(chain, waiting, {name for _, names in chains for name in names}))
            self._chain(chain, {name: layers[name] for name in inside})
            waiting = {name: layer for name, layer in layers.items() if name not in self._finished()}
        self._loose(waiting, last=True)
        return tuple(self.results)

    def _finished(self) -> set[str]:
        return {result.name for result in self.results}

    def _inside(self, chain: Chain, layers: dict[str, nn.Module]) -> list[str]:
        members = {id(module) for block in chain.blocks for module in block.modules()}
        return [name for name, layer in layers.items() if id(layer) in members]

    def _before(self, chain: Chain, waiting: dict[str, nn.Module], chained: set[str]) -> dict[str, nn.Module]:
        """The loose layers that run before a chain does."""
        loose = {name: layer for name, layer in waiting.items() if name not in chained}
        early: dict[str, nn.Module] = {}
        handles = [
            layer.register_forward_pre_hook(lambda _, __, name=name: early.setdefault(name, loose[name]) and None)
            for name, layer in loose.items()
        ]
        try:
            record(self.model, Chain(chain.name, chain.blocks[:1]), self.batches[:1])
        finally:
            for handle in handles:
                handle.remove()
        return early

    # ------------------------------------------------------------------------------------------------------ the parts

    def _loose(self, layers: dict[str, nn.Module], *, last: bool = False) -> None:
        """Layers outside of chains; the whole model runs for each group of them."""
        if layers:
            self._part("model", layers, self.model, lambda batch: feed(self.model, self.batches[batch]), None)
        if last:
            self._done += 1

    def _chain(self, chain: Chain, layers: dict[str, nn.Module]) -> None:
        inputs = record(self.model, chain, self.batches)
        if isinstance(inputs, str):  # no chain after all: as loose layers
            self._loose(layers)
            self._done += len(chain.blocks)
            return
        float_hidden = [hidden.clone() for hidden in inputs.hidden] if self._corrects else None
        for index, block in enumerate(chain.blocks):
            inside = {id(module) for module in block.modules()}
            mine = {name: layer for name, layer in layers.items() if id(layer) in inside}
            twin = copy.deepcopy(block) if float_hidden is not None else None
            hidden = inputs.hidden

            def run(batch: int, block: nn.Module = block, index: int = index, hidden: list[Tensor] = hidden) -> Any:
                return inputs.call(block, index, batch, self._here(hidden[batch]))

            def run_twin(batch: int, twin: nn.Module | None = twin, index: int = index) -> Any:
                assert twin is not None
                assert float_hidden is not None
                return inputs.call(twin, index, batch, self._here(float_hidden[batch]))

            self._part(chain.block_name(index), mine, block, run, None if twin is None else (twin, run_twin))
            self._done += 1
            if index + 1 < len(chain.blocks):
                self._advance(inputs, run, hidden)
                if float_hidden is not None:
                    self._advance(inputs, run_twin, float_hidden)

    @property
    def _corrects(self) -> bool:
        return self.method.rounding == "gptq" and self.options.correct > 0

    def _here(self, hidden: Tensor) -> Tensor:
        return hidden if self.keep_on is None else hidden.to(next(self.model.parameters()).device)

    def _advance(self, inputs: ChainInputs, run: Run, hidden: list[Tensor]) -> None:
        for batch in range(len(hidden)):
            output: Tensor = first_output(run(batch)).detach()
            hidden[batch] = output if self.keep_on is None else output.to(self.keep_on)

    def _part(
        self,
        name: str,
        layers: dict[str, nn.Module],
        scope: nn.Module,
        run: Run,
        twin: tuple[nn.Module, Run] | None,
    ) -> None:
        """One part: from the store, or group by group."""
        started = time.monotonic()
        key = name if scope is not self.model else f"{name}-{len(self.results)}"
        stored = self.store.load(key, layers, scope)
        if stored is None:
            results = self._groups(layers, run, twin)
            self.store.save(key, layers, scope, results)
        else:
            results = list(stored)
            for layer in layers.values():
                self._note_held(layer)
        self.results += results
        seconds = time.monotonic() - started
        self.told(Part(self._done, self._count, name, tuple(results), seconds, stored is not None))

    def _groups(self, layers: dict[str, nn.Module], run: Run, twin: tuple[nn.Module, Run] | None) -> list[LayerResult]:
        groups = input_groups(layers, run)
        results = [result for group in groups for result in self._group(group, run, twin)]
        for name, layer in layers.items():
            if name not in names_of(groups):
                results.append(self._layer(name, layer, None, "it saw no calibration data"))
        return results

    def _group(self, group: Group, run: Run, twin: tuple[nn.Module, Run] | None) -> list[LayerResult]:
        quantizer: LayerQuantizer = getattr(group.first, ATTRIBUTE)
        looks = quantizer.scheme.is_integer and _multiplies(group.first)
        statistics = None
        if looks or quantizer.observer is not None:
            beside = None if twin is None or not looks else (_same_layer(twin[0], quantizer.layer.name), twin[1])
            statistics = gather(group, run, len(self.batches), hessian=looks, twin=beside)
        return [self._layer(name, layer, statistics if looks else None) for name, layer in group.layers.items()]

    # ------------------------------------------------------------------------------------------------------ one layer

    @torch.no_grad()
    def _layer(self, name: str, layer: nn.Module, statistics: InputStatistics | None, note: str = "") -> LayerResult:
        quantizer: LayerQuantizer = getattr(layer, ATTRIBUTE)
        scheme, weight = quantizer.scheme, current_weight(layer)
        if not scheme.is_integer:
            quantizer.enter(Phase.FROZEN, weight)
            return LayerResult(name, str(scheme), "cast")
        shared = self._held.get(id(weight))
        if id(weight) in self._parted:
            quantizer.enter(Phase.FROZEN, weight)
            return LayerResult(name, str(scheme), "rtn", note="its weight is shared with a layer of another scheme")
        if shared is not None:
            hold(layer, shared[1], write=False)
            return LayerResult(name, str(scheme), self.method.rounding, note=f"the integers of {shared[0]}")
        rows = quantizer.rows(weight)
        found = rounded(self.method.rounding, rows, statistics, scheme.weight_format, self.options)
        errors = self._errors(rows, found, statistics)
        hold(layer, found)
        self._note_held(layer)
        used = "mse" if self.method.rounding == "gptq" and statistics is None else self.method.rounding
        seen = 0 if statistics is None else statistics.rows
        return LayerResult(name, str(scheme), used, seen, *errors, note=note)

    def _errors(
        self, rows: Tensor, found: Quantized, statistics: InputStatistics | None
    ) -> tuple[float | None, float | None]:
        if statistics is None or not statistics.rows:
            return None, None
        moment, wanted = statistics.second_moment / statistics.rows, rows
        if self.method.rounding == "gptq":
            wanted = aim(rows, statistics, self.options.correct)
        whole = energy(wanted, moment) or 1.0
        nearest = round_to_nearest(rows, found.scheme)
        before, after = (float(output_error(wanted, q, moment).sum()) / whole for q in (nearest, found))
        return before, after

    def _note_held(self, layer: nn.Module) -> None:
        quantizer: LayerQuantizer = getattr(layer, ATTRIBUTE)
        weight = current_weight(layer)
        if quantizer.scheme.is_integer and id(weight) not in self._parted:
            self._held.setdefault(id(weight), (quantizer.layer.name, quantizer.integers(weight)))


def _scheme(layer: nn.Module) -> Scheme:
    quantizer: LayerQuantizer = getattr(layer, ATTRIBUTE)
    return quantizer.scheme


def _multiplies(layer: nn.Module) -> bool:
    weight = current_weight(layer)
    return not isinstance(layer, nn.Embedding) and weight.dim() == 2


def _same_layer(twin: nn.Module, name: str) -> nn.Module:
    """The layer of that plan name in a copy of its block."""
    for module in twin.modules():
        if hasattr(module, ATTRIBUTE) and getattr(module, ATTRIBUTE).layer.name == name:
            return module
    raise PrepareError(f"{name} is not in the copy of its block")


def _parted_by_conversion(layers: dict[str, nn.Module]) -> set[int]:
    """Ids of weights that layers of different weight formats share."""
    formats: dict[int, set[object]] = {}
    for layer in layers.values():
        quantizer: LayerQuantizer = getattr(layer, ATTRIBUTE)
        formats.setdefault(id(current_weight(layer)), set()).add(quantizer.scheme.weight_format)
    return {key for key, found in formats.items() if len(found) > 1}
