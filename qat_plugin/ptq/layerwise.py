"""One layer's turn: its integers found, put into it, and judged."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from qat_plugin.measure.host_memory import return_freed_memory
from qat_plugin.numerics import Quantized, round_to_nearest, row_chunks
from qat_plugin.ptq.gptq import GptqOptions, aim
from qat_plugin.ptq.methods import Method, rounded
from qat_plugin.ptq.output_error import output_error
from qat_plugin.ptq.results import LayerResult
from qat_plugin.ptq.statistics import InputStatistics
from qat_plugin.qat import LayerQuantizer, Phase, hold
from qat_plugin.qat.layers import ATTRIBUTE, current_weight


class Rounder:
    """Makes the integers of layers, one set for each weight that several share.

    Args:
        method: how.
        options: GPTQ's.
        model: whose layers.
        layers: plan name -> layer, all of the model's.
    """

    def __init__(self, method: Method, options: GptqOptions, model: nn.Module, layers: Mapping[str, nn.Module]) -> None:
        self._method, self._options = method, options
        self._held: dict[int, tuple[LayerResult, Quantized]] = {}
        owners = Counter(id(current_weight(layer)) for layer in layers.values())
        self._shared = {key for key, count in owners.items() if count > 1}
        self._parted = _parted_by_conversion(model, layers)

    @torch.no_grad()
    def layer(
        self, name: str, layer: nn.Module, statistics: InputStatistics | None, note: str = "", *, spent: bool = False
    ) -> LayerResult:
        """Give a layer its integers.

        Args:
            name: its plan name.
            layer: prepared.
            statistics: of its input, where it multiplies and saw any.
            note: what to add to the result.
            spent: no other layer needs these statistics' drift; see :func:`~qat_plugin.ptq.gptq.aim`.
        """
        quantizer: LayerQuantizer = getattr(layer, ATTRIBUTE)
        scheme, weight = quantizer.scheme, current_weight(layer)
        if not scheme.is_integer:
            quantizer.enter(Phase.FROZEN, weight)
            return LayerResult(name, str(scheme), "cast", note=note)
        if id(weight) in self._parted:
            quantizer.enter(Phase.FROZEN, weight)
            note = "its weight is shared with a layer that takes another scheme or stays in float"
            return LayerResult(name, str(scheme), "rtn", note=note, written=False)
        if (shared := self._held.get(id(weight))) is not None:
            hold(layer, shared[1], write=False)
            return LayerResult(
                name, str(scheme), shared[0].method, note=f"the integers of {shared[0].name}", written=False
            )
        rows, wanted = quantizer.scaled_rows(weight), None
        if self._method.rounding == "gptq" and statistics is not None:
            wanted = aim(rows, statistics, self._options.correct, spent=spent)
        found = rounded(self._method.rounding, rows, statistics, scheme.weight_format, self._options, wanted)
        errors = self._errors(rows, found, statistics, wanted)
        del rows, wanted
        return_freed_memory()
        hold(layer, found)
        if quantizer.learns_scales:  # what follows sees this layer as it is trained
            quantizer.phase = Phase.FAKE_QUANTIZED
        blind = statistics is None or not statistics.rows
        used = "mse" if self._method.rounding == "gptq" and blind else self._method.rounding
        result = LayerResult(name, str(scheme), used, 0 if statistics is None else statistics.rows, *errors, note=note)
        self.note(result, layer)
        return result

    def note(self, result: LayerResult, layer: nn.Module) -> None:
        """Remember the integers that a layer holds, for others that share its weight."""
        quantizer: LayerQuantizer = getattr(layer, ATTRIBUTE)
        weight = current_weight(layer)
        if id(weight) in self._shared and quantizer.scheme.is_integer and id(weight) not in self._parted:
            self._held.setdefault(id(weight), (result, quantizer.integers(weight)))

    def _errors(
        self, rows: Tensor, found: Quantized, statistics: InputStatistics | None, wanted: Tensor | None
    ) -> tuple[float | None, float | None]:
        """Of rounding to nearest and of the integers found, as shares of the output's energy."""
        if statistics is None or not statistics.rows:
            return None, None
        wanted = rows if wanted is None else wanted
        nearest, totals = round_to_nearest(rows, found.scheme), [0.0, 0.0, 0.0]
        for part in row_chunks(rows):
            aimed = wanted[part].to(torch.float32)
            tries = [aimed, *(q.rows(part).dequantize().sub_(aimed) for q in (nearest, found))]
            for index, difference in enumerate(tries):
                totals[index] += output_error(difference, statistics.second_moment)
        energy, before, after = totals
        return before / (energy or statistics.rows), after / (energy or statistics.rows)


def _parted_by_conversion(model: nn.Module, layers: Mapping[str, nn.Module]) -> set[int]:
    """Ids of weights that layers of different weight formats share, or modules that stay as they are."""
    formats: dict[int, set[object]] = {}
    for layer in layers.values():
        quantizer: LayerQuantizer = getattr(layer, ATTRIBUTE)
        formats.setdefault(id(current_weight(layer)), set()).add(quantizer.scheme.weight_format)
    mine = set(map(id, layers.values()))
    for module in model.modules():
        for parameter in module._parameters.values() if id(module) not in mine else ():
            if id(parameter) in formats:
                formats[id(parameter)].add(None)
    return {key for key, found in formats.items() if len(found) > 1}
