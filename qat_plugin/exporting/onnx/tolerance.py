"""How far ONNX Runtime's outputs may be from the model's, and why they are not equal.

Sums in another order differ in the last digits of float32. Where activations are rounded to INT8, such a difference now
and then moves one of them to the next integer, and layers that follow amplify that: how much depends on the model, so
it is measured on the model itself.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Final

import torch
from torch import Tensor, nn

from qat_plugin.exporting.contents import Exportable, outputs_of
from qat_plugin.exporting.onnx.options import Options
from qat_plugin.exporting.verification import relative_difference
from qat_plugin.kernels.weight import QuantizedWeight

_SUMMATION: Final = 1e-4
_FLIPS: Final = 2e-2
_NARROW: Final = 5e-2
_NOISE: Final = 1e-6  # relative, of a float32 sum of some thousand numbers
_OFTEN: Final = 4  # such moves are few and uneven: one run more or less of them is no error


def tolerance(model: Exportable, options: Options) -> tuple[float, str]:
    """What ``|file - model| / |model|`` may be, and the reason in a few words."""
    narrow = {layer.weight.logical_dtype for layer in model.layers.values()} - {torch.float32}
    if narrow:
        return _NARROW, f"the file computes in float32, the model in {str(narrow.pop()).removeprefix('torch.')}"
    if options.accuracy_level == 4:
        return _NARROW, "accuracy_level=4 rounds inputs to INT8 per block, which training did not"
    if not any(layer.scheme.quantizes_activations for layer in model.layers.values()):
        return _SUMMATION, "another order of summation in float32"
    reason = "another order of summation moves a few activations to the next integer"
    moved = relative_difference(_disturbed(model), model.outputs())
    if _OFTEN * moved <= _FLIPS:
        return _FLIPS, reason
    return _OFTEN * moved, f"{reason}, which here amounts to {moved:.1e}"


def _disturbed(model: Exportable) -> Tensor:
    """The model's outputs when the inputs of its integer layers carry float32's own noise."""
    with _noisy(model.network):
        sample: Mapping[str, Tensor] | tuple[Tensor, ...] = model.sample
        return outputs_of(model.network, sample)


@contextmanager
def _noisy(network: nn.Module) -> Iterator[None]:
    generator = torch.Generator().manual_seed(0)

    def disturb(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        x = args[0]
        noise = torch.randn(x.shape, generator=generator).to(x)
        return x * (1 + _NOISE * noise), *args[1:]

    hooks = [
        module.register_forward_pre_hook(disturb)
        for module in network.modules()
        if _rounds_inputs(getattr(module, "weight", None)) and not isinstance(module, nn.Embedding)
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _rounds_inputs(weight: Any) -> bool:
    return isinstance(weight, QuantizedWeight) and weight.scheme.quantizes_activations
