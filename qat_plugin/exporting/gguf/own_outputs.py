"""The converted model itself against the float copy that runtimes are held against.

The copy is built from the configuration, as runtimes build theirs from the file. What a network computes beside that (a
forward of its own, hooks, a module in another's place) is in neither, and would be lost without a word.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from qat_plugin.errors import ExportError
from qat_plugin.exporting.contents import Exportable, outputs_of
from qat_plugin.exporting.gguf.layout import DTYPES, Entry, state
from qat_plugin.exporting.verification import relative_difference
from qat_plugin.kernels.weight import QuantizedWeight
from qat_plugin.numerics import fake_quantize_activation

EXACT = 1e-2
"""Allowed relative difference in float32: kernels sum in another order, and layers that follow amplify it."""
ROUNDED = 0.2
"""The same where inputs are rounded to INT8, the model computes in 16 bits, or the file rounds its floats."""


def check(model: Exportable, copy: nn.Module, entries: Sequence[Entry]) -> str:
    """What was found, in one phrase.

    Args:
        model: converted.
        copy: :func:`~qat_plugin.exporting.gguf.copies.float_copy`'s.
        entries: of the file.

    Raises:
        ExportError: when the model's outputs are no finite numbers, or further from the copy's than rounding explains.
    """
    own = model.outputs()
    if not bool(own.isfinite().all()):
        wrong = [name for name, tensor in state(model).items() if not _finite(tensor)]
        where = f"; {', '.join(wrong[:8])} hold some" if wrong else ""
        raise ExportError(f"the model's own outputs have numbers that are not finite{where}: nothing can be compared")
    with rounding_as_trained(copy, model):
        error = relative_difference(outputs_of(copy, model.sample), own)
    allowed = _allowed(model, entries)
    if not error <= allowed:
        raise ExportError(
            f"the model computes something else than {type(copy).__name__} with its weights: outputs differ by "
            f"{error:.1e} relative (allowed {allowed:g}). What hooks, a forward of its own or replaced modules compute "
            "has no place in the file"
        )
    return f"the converted model's own outputs within {error:.1e} of the float copy that rounds its inputs likewise"


@contextmanager
def rounding_as_trained(copy: nn.Module, model: Exportable) -> Iterator[None]:
    """Round inputs of the copy's linear layers where the model's are rounded to INT8."""
    rounding: dict[int, QuantizedWeight] = {}
    for name, parameter in copy.named_parameters():
        layer = model.layers.get(name)
        if layer is not None and layer.scheme.quantizes_activations:
            rounding[id(parameter)] = layer.weight

    def rounded(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        weight: Any = module.weight
        return (_rounded(args[0], rounding[id(weight)]), *args[1:])

    hooks = [
        module.register_forward_pre_hook(rounded)
        for module in copy.modules()
        if isinstance(module, nn.Linear) and id(module.weight) in rounding
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _rounded(x: Tensor, weight: QuantizedWeight) -> Tensor:
    static, divisor = (None if s is None else s.cpu() for s in (weight.activation_scale, weight.input_scale))
    if divisor is None:
        return fake_quantize_activation(x, static)
    return fake_quantize_activation(x / divisor, static) * divisor


def _allowed(model: Exportable, entries: Sequence[Entry]) -> float:
    held = state(model)
    narrowed = any(
        DTYPES[entry.kind].itemsize < held[entry.source].element_size()
        for entry in entries
        if entry.source in held and entry.source not in model.layers and not entry.blocks
    )
    narrow = any(layer.weight.logical_dtype != torch.float32 for layer in model.layers.values())
    rounds = any(layer.scheme.quantizes_activations for layer in model.layers.values())
    return ROUNDED if narrowed or narrow or rounds else EXACT


def _finite(tensor: Tensor) -> bool:
    return isinstance(tensor, QuantizedWeight) or bool(tensor.isfinite().all())
