"""One layer's turn: its integers found, put into it, and judged."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from qat_plugin.numerics import Quantized, round_to_nearest
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
        layers: plan name -> layer, all of the model's.
    """

    def __init__(self, method: Method, options: GptqOptions, layers: Mapping[str, nn.Module]) -> None:
        self._method, self._options = method, options
        self._held: dict[int, tuple[str, Quantized]] = {}
        self._parted = _parted_by_conversion(layers)

    @torch.no_grad()
    def layer(self, name: str, layer: nn.Module, statistics: InputStatistics | None, note: str = "") -> LayerResult:
        """Give a layer its integers.

        Args:
            name: its plan name.
            layer: prepared.
            statistics: of its input, where it multiplies and saw any.
            note: what to add to the result.
        """
        quantizer: LayerQuantizer = getattr(layer, ATTRIBUTE)
        scheme, weight = quantizer.scheme, current_weight(layer)
        if not scheme.is_integer:
            quantizer.enter(Phase.FROZEN, weight)
            return LayerResult(name, str(scheme), "cast", note=note)
        if id(weight) in self._parted:
            quantizer.enter(Phase.FROZEN, weight)
            return LayerResult(name, str(scheme), "rtn", note="its weight is shared with a layer of another scheme")
        if (shared := self._held.get(id(weight))) is not None:
            hold(layer, shared[1], write=False)
            return LayerResult(name, str(scheme), self._method.rounding, note=f"the integers of {shared[0]}")
        rows = quantizer.scaled_rows(weight).clone()
        found = rounded(self._method.rounding, rows, statistics, scheme.weight_format, self._options)
        hold(layer, found)
        self.note([layer])
        blind = statistics is None or not statistics.rows
        used = "mse" if self._method.rounding == "gptq" and blind else self._method.rounding
        errors = self._errors(rows, found, statistics)
        return LayerResult(name, str(scheme), used, 0 if statistics is None else statistics.rows, *errors, note=note)

    def note(self, layers: Iterable[nn.Module]) -> None:
        """Remember the integers that layers hold, for others that share their weights."""
        for layer in layers:
            quantizer: LayerQuantizer = getattr(layer, ATTRIBUTE)
            weight = current_weight(layer)
            if quantizer.scheme.is_integer and id(weight) not in self._parted:
                self._held.setdefault(id(weight), (quantizer.layer.name, quantizer.integers(weight)))

    def _errors(
        self, rows: Tensor, found: Quantized, statistics: InputStatistics | None
    ) -> tuple[float | None, float | None]:
        if statistics is None or not statistics.rows:
            return None, None
        moment, wanted = statistics.second_moment / statistics.rows, rows.to(torch.float32)
        if self._method.rounding == "gptq":
            wanted = aim(rows, statistics, self._options.correct)
        energy = output_error(wanted, moment) or 1.0
        nearest = round_to_nearest(rows, found.scheme)
        before, after = (output_error(q.dequantize() - wanted, moment) / energy for q in (nearest, found))
        return before, after


def multiplies(layer: nn.Module) -> bool:
    """Whether the rows of a layer's input are multiplied by its weight as they are."""
    return not isinstance(layer, nn.Embedding) and current_weight(layer).dim() == 2


def _parted_by_conversion(layers: Mapping[str, nn.Module]) -> set[int]:
    """Ids of weights that layers of different weight formats share."""
    formats: dict[int, set[object]] = {}
    for layer in layers.values():
        quantizer: LayerQuantizer = getattr(layer, ATTRIBUTE)
        formats.setdefault(id(current_weight(layer)), set()).add(quantizer.scheme.weight_format)
    return {key for key, found in formats.items() if len(found) > 1}
