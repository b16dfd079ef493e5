"""Weights that did not change since the last forward pass are not quantized again."""

from __future__ import annotations

import operator
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

import qat_plugin.fused as fused
from qat_plugin.qat.layers import ATTRIBUTE
from qat_plugin.qat.prepare import required_layers
from qat_plugin.qat.quantizer import LayerQuantizer


@dataclass(frozen=True)
class _Held:
    """One weight's numbers and mask, and the state of the tensors that they came from."""

    sources: tuple[Tensor | None, ...]
    state: tuple[object, ...]
    numbers: Tensor
    inside: Tensor | None


@dataclass
class WeightReuse:
    """The fake-quantized weights of a model that are still good.

    Attributes:
        quantized: how many weights were quantized.
        reused: how many were not, because they had been.
    """

    quantized: int = 0
    reused: int = 0
    _held: dict[LayerQuantizer, _Held] = field(default_factory=dict, repr=False)

    def drop(self) -> None:
        """Forget all weights: for changes that torch does not count, such as those through ``weight.data``, or those of
        FSDP2, which gathers into the same tensor; call it after each optimizer step there.
        """
        self._held.clear()

    def fake_weight(self, quantizer: LayerQuantizer, weight: Tensor) -> Tensor:
        """The fake-quantized rows of a Parameter, made anew if it or the scales changed; differentiable."""
        sources = (weight, quantizer.frozen_scale, quantizer.frozen_zero_point, quantizer.input_scale)
        state = (quantizer.phase, torch.is_inference_mode_enabled(), *map(_state, sources))
        held = self._held.get(quantizer)
        rows = quantizer.scaled_rows(weight)
        if held is not None and held.state == state and all(map(operator.is_, held.sources, sources)):
            self.reused += 1
        else:
            numbers, inside = fused.quantized(rows, quantizer.scheme, *sources[1:3])
            held = self._held[quantizer] = _Held(sources, state, numbers, inside)
            self.quantized += 1
        return fused.straight_through(rows, held.numbers, held.inside).to(weight.dtype)


def _state(tensor: Tensor | None) -> object:
    """What changes when a tensor does; torch counts the writes to all but inference tensors."""
    if tensor is None:
        return None
    version = None if tensor.is_inference() else tensor._version
    return version, tensor.data_ptr(), tensor.dtype, tensor.device, tensor.shape


@contextmanager
def reusing_weights(model: nn.Module) -> Iterator[WeightReuse]:
    """Quantize each weight once for all forward passes inside, until it changes: for gradient accumulation, evaluation.

    Results and gradients are the same to the bit. A weight counts as changed when the Parameter or its storage is
    another one, when it was written to (optimizer steps, ``load_state_dict``), when its scales or the phase moved. It
    costs the fake-quantized weights' memory between passes. These are quantized at every pass as ever: learned scales
    that are not frozen, whose gradient needs the weight; weights that pruning or a parametrization computes; looked-up
    embedding rows; float schemes; everything inside ``torch.compile``.

    Yields:
        The :class:`WeightReuse`; call its ``drop()`` after writing to a weight through ``weight.data``, which torch
        does not count.

    Raises:
        PrepareError: when the model is not prepared.

    Example::

        with reusing_weights(model) as reuse:
            for batch in micro_batches:
                loss(model(batch)).backward()
        optimizer.step()
    """
    mine: list[LayerQuantizer] = [getattr(layer, ATTRIBUTE) for layer in required_layers(model).values()]
    before = [quantizer.reuse for quantizer in mine]
    reuse = WeightReuse()
    for quantizer in mine:
        quantizer.reuse = reuse
    try:
        yield reuse
    finally:
        for quantizer, outer in zip(mine, before, strict=True):
            quantizer.reuse = outer
        reuse.drop()
