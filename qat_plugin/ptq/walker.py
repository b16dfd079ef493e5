"""The walker: takes the layers of a model in the order they run, each on what the quantized ones before it give.

::

    batches -> loose layers before -> chain of blocks, one at a time -> loose layers after
                                       |  block i: hidden states in
                                       |    scales of inputs (AWQ, SmoothQuant), folded where that is exact
                                       |    layers that share an input: statistics -> integers -> the next ones
                                       |  hidden states out, through the quantized block

Of a chain only one block's inputs are held (for GPTQ twice: the quantized model's and the float one's), and they
replace each other batch by batch. Parts that are no chain are run from the model's beginning each time.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from qat_plugin.measure.host_memory import return_freed_memory
from qat_plugin.ptq.chains import Chain, ChainInputs, find_chains, first_output, record
from qat_plugin.ptq.feeding import arguments
from qat_plugin.ptq.gptq import GptqOptions
from qat_plugin.ptq.inputs import Group, Run, gather, input_groups, layer_named, looks_at_inputs, names_of
from qat_plugin.ptq.layerwise import Rounder
from qat_plugin.ptq.methods import Method
from qat_plugin.ptq.ranks import from_every
from qat_plugin.ptq.results import LayerResult
from qat_plugin.ptq.scaling import scale_block
from qat_plugin.ptq.statistics import InputStatistics
from qat_plugin.ptq.tracing import Sample
from qat_plugin.ptq.twin import Twin
from qat_plugin.qat import LayerQuantizer, prepared_layers
from qat_plugin.qat.layers import ATTRIBUTE


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


class Listener:
    """What is told of a walk; this one is deaf."""

    def layer(self, result: LayerResult, done: int, count: int) -> None:
        """After each layer that was worked on: number ``done`` of ``count`` in the model."""

    def part(self, part: Part) -> None:
        """After each part, resumed ones too."""


class Store:
    """Where finished parts are kept; this one keeps nothing."""

    def has(self, part: str) -> bool:
        """Whether an earlier session finished a part."""
        return False

    def load(self, part: str, layers: Mapping[str, nn.Module], changed: nn.Module | None) -> list[LayerResult] | None:
        """Put an earlier session's results into the layers; ``None`` when there are none."""
        return None

    def save(
        self, part: str, layers: Mapping[str, nn.Module], changed: nn.Module | None, results: Sequence[LayerResult]
    ) -> None:
        """Keep the results of a part.

        Args:
            part: its name, a file's.
            layers: plan name -> layer.
            changed: the module whose other parameters folding may have changed.
            results: what was done.
        """


@dataclass(frozen=True)
class _Stretch:
    """A module that can be run on each batch, and the layers in it whose turn has come.

    Attributes:
        name, layers: the part's.
        module: a block, or the model.
        sample: the arguments of a real call of ``module``.
        running: a copy of ``module`` -> what runs it, on the quantized model's inputs or (``True``) the float one's.
        whole: nothing of the model lies outside, so that a copy of it and scales may be afforded.
        leave: takes the float model's inputs past ``module``, given it in float; ``None`` where nothing follows.
    """

    name: str
    layers: dict[str, nn.Module]
    module: nn.Module
    sample: Sample
    running: Callable[[nn.Module, bool], Run]
    whole: bool = True
    leave: Callable[[nn.Module], None] | None = None


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
        told: hears of each layer and part.

    Attributes:
        results: what was done so far.
        touched: whether any weight was changed.
    """

    model: nn.Module
    batches: Sequence[Any]
    method: Method
    options: GptqOptions
    keep_on: torch.device | None = None
    store: Store = field(default_factory=Store)
    told: Listener = field(default_factory=Listener)
    results: list[LayerResult] = field(default_factory=list)
    touched: bool = False

    def walk(self) -> tuple[LayerResult, ...]:
        """Do all of it."""
        layers = prepared_layers(self.model)
        self._total = len(layers)
        if not self.method.looks:  # nothing depends on the data, and the float weights stay what they are
            return tuple(LayerResult(name, _spelled(layer), "rtn") for name, layer in layers.items())
        self._rounder = Rounder(self.method, self.options, self.model, layers)
        chains = find_chains(self.model)
        self._done, self._count = 0, 1 + sum(len(chain.blocks) for chain in chains)
        chained = {name for chain in chains for name in _inside(chain.blocks, layers)}
        for chain in chains:
            early = self._before(chain, {name: layer for name, layer in layers.items() if name not in chained})
            self._loose({name: layer for name, layer in early.items() if not self._is_done(name)})
            self._chain(chain, _inside(chain.blocks, layers))
        self._loose({name: layer for name, layer in layers.items() if not self._is_done(name)}, whole=not chains)
        return tuple(self.results)

    def _is_done(self, name: str) -> bool:
        return any(result.name == name for result in self.results)

    def _before(self, chain: Chain, loose: dict[str, nn.Module]) -> dict[str, nn.Module]:
        """The loose layers that run before a chain does."""
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
        reached = dict.fromkeys(name for names in from_every(list(early)) for name in names)  # on any rank
        return {name: loose[name] for name in reached}

    # ------------------------------------------------------------------------------------------------------ the parts

    def _loose(self, layers: dict[str, nn.Module], *, whole: bool = False) -> None:
        """Layers outside of chains; the whole model runs for each group of them."""
        if not layers:
            return

        def running(model: nn.Module, _: bool) -> Run:
            def run(batch: int) -> Any:
                args, kwargs = arguments(model, self.batches[batch])
                return model(*args, **kwargs)

            return run

        sample = arguments(self.model, self.batches[0])
        self._part(_Stretch("model", layers, self.model, sample, running, whole), f"model-{len(self.results)}")

    def _chain(self, chain: Chain, layers: dict[str, nn.Module]) -> None:
        inputs = record(self.model, chain, self.batches, self.keep_on)
        if isinstance(inputs, str):  # no chain after all: as loose layers
            self._loose(layers)
            self._done += len(chain.blocks) - 1
            return
        float_hidden = list(inputs.hidden) if self._corrects else []  # the same tensors until blocks differ
        for index, block in enumerate(chain.blocks):
            mine = _inside([block], layers)
            running = self._block_runs(inputs, index, float_hidden)
            name = chain.block_name(index)
            sample = inputs.arguments(index, 0, self._here(inputs.hidden[0]))
            last = index + 1 == len(chain.blocks)
            leave = None if last or not self._corrects else self._leaving(running, float_hidden)
            self._part(_Stretch(name, mine, block, sample, running, leave=leave), name)
            if not last:
                self._advance(running(block, False), inputs.hidden)

    def _leaving(self, running: Callable[[nn.Module, bool], Run], hidden: list[Tensor]) -> Callable[[nn.Module], None]:
        return lambda block: self._advance(running(block, True), hidden)

    def _block_runs(
        self, inputs: ChainInputs, index: int, float_hidden: list[Tensor]
    ) -> Callable[[nn.Module, bool], Run]:
        def running(block: nn.Module, in_float: bool) -> Run:
            hidden = float_hidden if in_float else inputs.hidden

            def run(batch: int) -> Any:
                args, kwargs = inputs.arguments(index, batch, self._here(hidden[batch]))
                return block(*args, **kwargs)

            return run

        return running

    @property
    def _corrects(self) -> bool:
        return self.method.rounding == "gptq" and self.options.correct > 0

    def _here(self, hidden: Tensor) -> Tensor:
        """A copy to run on: blocks may add to it in place."""
        here = hidden.clone()
        return here if self.keep_on is None else here.to(next(self.model.parameters()).device)

    def _advance(self, run: Run, hidden: list[Tensor]) -> None:
        for batch in range(len(hidden)):
            output: Tensor = first_output(run(batch)).detach()
            hidden[batch] = output if self.keep_on is None else output.to(self.keep_on)
            del output
            return_freed_memory()

    def _part(self, stretch: _Stretch, key: str) -> None:
        """One part, from the store or layer by layer."""
        started = time.monotonic()
        scales = self.method.scaling is not None and stretch.whole
        changed = stretch.module if scales else None
        resumed = self.store.has(key)
        if resumed and stretch.leave is not None:
            stretch.leave(stretch.module)  # while it is float
        stored = self.store.load(key, stretch.layers, changed) if resumed else None
        if stored is None:
            results = self._fresh(stretch, scales)
            self.store.save(key, stretch.layers, changed, results)
        else:
            results, self.touched = stored, True
            for result in results:
                self._rounder.note(result, stretch.layers[result.name])
        self.results += results
        seconds = time.monotonic() - started
        self.told.part(Part(self._done, self._count, stretch.name, tuple(results), seconds, stored is not None))
        self._done += 1

    def _fresh(self, stretch: _Stretch, scales: bool) -> list[LayerResult]:
        run = stretch.running(stretch.module, False)
        groups = input_groups(stretch.layers, run, len(self.batches))
        # the block as it was feeds the next part, resumed or not; this part's own inputs are the scaled ones
        earlier = copy.deepcopy(stretch.module) if scales and stretch.leave is not None else None
        notes = self._scaled(stretch, groups, run) if scales else {}
        if not (self._corrects and stretch.whole):
            return self._rounded(stretch, groups, run, None, notes)
        return self._rounded(stretch, groups, run, [Twin(stretch.module, earlier)], notes)

    def _scaled(self, stretch: _Stretch, groups: Sequence[Group], run: Run) -> dict[str, str]:
        """Scale the inputs of a part's layers; layer -> what was done."""
        mine = [group for group in groups if looks_at_inputs(group.leader)]
        statistics: dict[str, InputStatistics] = {}
        for group in mine:
            found = gather(group, run, len(self.batches), hessian=True, static=False)
            statistics |= dict.fromkeys(group.layers, found)
        assert self.method.scaling is not None
        self.touched = True
        done = scale_block(
            stretch.module,
            [list(group.layers.items()) for group in mine],
            statistics,
            stretch.sample,
            self.method.scaling,
            model=self.model,
        )
        return {name: note.in_short for note in done for name in note.layers}

    def _rounded(
        self, stretch: _Stretch, groups: Sequence[Group], run: Run, twins: list[Twin] | None, notes: Mapping[str, str]
    ) -> list[LayerResult]:
        """The part's layers, group by group; ``twins`` is emptied as soon as no group needs the float form any more."""
        results = []
        looking = [group for group in groups if looks_at_inputs(group.leader)]
        for group in groups:
            looks, statistics = group in looking, None
            if looks or _static(group):
                statistics = self._seen(stretch, group, run, twins if looks else None)
            if twins and group is looking[-1]:
                self._dismiss(stretch, twins)
            elif twins:
                twins[0].part_from(group.layers.values())
            self.touched = True
            for index, (name, layer) in enumerate(group.layers.items()):
                return_freed_memory()
                seen, spent = statistics if looks_at_inputs(layer) else None, index + 1 == len(group.layers)
                results.append(self._rounder.layer(name, layer, seen, notes.get(name, ""), spent=spent))
                self.told.layer(results[-1], len(self.results) + len(results), self._total)
            del seen, statistics
            return_freed_memory()
        for name, layer in stretch.layers.items():
            if name not in names_of(groups):
                results.append(self._rounder.layer(name, layer, None, "it saw no calibration data"))
                self.told.layer(results[-1], len(self.results) + len(results), self._total)
        return results

    def _seen(self, stretch: _Stretch, group: Group, run: Run, twins: list[Twin] | None) -> InputStatistics:
        pair = None
        if twins:
            module = twins[0].module
            pair = (layer_named(module, _quantizer(group.leader).layer.name), stretch.running(module, True))
        return gather(group, run, len(self.batches), hessian=looks_at_inputs(group.leader), twin=pair)

    def _dismiss(self, stretch: _Stretch, twins: list[Twin]) -> None:
        if stretch.leave is not None:
            stretch.leave(twins[0].earlier)
        twins.clear()


def _inside(blocks: Sequence[nn.Module], layers: Mapping[str, nn.Module]) -> dict[str, nn.Module]:
    members = {id(module) for block in blocks for module in block.modules()}
    return {name: layer for name, layer in layers.items() if id(layer) in members}


def _quantizer(layer: nn.Module) -> LayerQuantizer:
    quantizer: LayerQuantizer = getattr(layer, ATTRIBUTE)
    return quantizer


def _spelled(layer: nn.Module) -> str:
    return str(_quantizer(layer).scheme)


def _static(group: Group) -> bool:
    return any(_quantizer(layer).observer is not None for layer in group.layers.values())
