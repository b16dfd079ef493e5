"""Dividing a group's input by a scale inside the module that produces it, where that changes nothing else.

The float block is run on real inputs with the scale folded in; unless every module with parameters, the producer aside,
and the block itself give what they gave before, it is undone.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Final

import torch
from torch import Tensor, nn

from qat_plugin.ptq.producers import Producer
from qat_plugin.ptq.tracing import Sample, Trace, largest_change, trace
from qat_plugin.qat.layers import ATTRIBUTE, current_weight
from qat_plugin.qat.quantizer import LayerQuantizer

# ||folded - original|| / ||original|| that float32 rounding explains.
TOLERANCE: Final = 1e-5


@torch.no_grad()
def fold(
    block: nn.Module,
    group: Sequence[nn.Module],
    producer: Producer,
    scale: Tensor,
    sample: Sample,
    before: Trace,
    objection: Callable[[], str] = str,
) -> tuple[str, Trace]:
    """Multiply the group's columns by a scale and divide their producer by it, in place; undone unless equal.

    Parameters stay the same objects. Prepared layers of the block must be in the float phase.

    Args:
        block: what all of it lies in, in eval mode.
        group: prepared layers that share one input.
        producer: of that input, perhaps.
        scale: float32 [in_features], as the producer takes it.
        sample: a real call of the block.
        before: a pass on the sample, of the block as it is.
        objection: asked while the block is folded, when the sample has none: why not after all, or "".

    Returns:
        ``("", a pass on the folded block)``, or why not and ``before``.
    """
    originals = move_scale(group, producer, scale)
    after = trace(block, sample)
    reason = changed(block, producer, before, after) or objection()
    if not reason:
        return "", after
    for parameter, original in originals:
        parameter.copy_(original)
    return reason, before


def changed(block: nn.Module, producer: Producer, before: Trace, after: Trace) -> str:
    """What folding into a producer changed beyond rounding, between two passes on one sample; "" for nothing."""
    change, where = largest_change(before, after, producer.module)
    if change <= TOLERANCE:
        return ""
    place = "the block's output" if where is None else f"the output of {name_in(block, where)}"
    return f"folding into {name_in(block, producer.module)} would change {place} by {change:.2g}"


@torch.no_grad()
def move_scale(group: Sequence[nn.Module], producer: Producer, scale: Tensor) -> list[tuple[Tensor, Tensor]]:
    """Multiply the group's columns by a scale and divide their producer by it, in place.

    Computed in float32 and rounded once to the parameters' types.

    Returns:
        (parameter, what it was) of each parameter written to.
    """
    weights = [current_weight(layer) for layer in group]
    originals = [(parameter, parameter.detach().clone()) for parameter in (*weights, *producer.parameters)]
    for layer, weight in zip(group, weights, strict=True):
        quantizer: LayerQuantizer = getattr(layer, ATTRIBUTE)
        rows = quantizer.rows(weight)
        rows.copy_(rows * scale)
    producer.divide(scale)
    return originals


def name_in(block: nn.Module, module: nn.Module) -> str:
    """A module's name within a block."""
    return next((name for name, part in block.named_modules() if part is module), type(module).__name__)
