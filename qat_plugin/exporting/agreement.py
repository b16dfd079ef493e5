"""How far a runtime's outputs are from the model's, and how far they may be: measured on the model itself.

Sums in another order differ in the last digits. Where activations are rounded to INT8, such a difference now and then
moves one of them to the next integer, and the layers that follow amplify that: how much depends on the model. So the
model runs again with noise of such a size on the input of each quantized layer, and a file may differ from it by
:data:`OFTEN` times what the noise changes. What is wired wrongly differs by far more.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import Tensor, nn

from qat_plugin.errors import ExportError
from qat_plugin.exporting.verification import relative_difference
from qat_plugin.kernels.weight import QuantizedWeight

SUMMATION: Final = 1e-4
"""Allowed to every runtime."""
OFTEN: Final = 4
"""Moves to the next integer are few and uneven: one run more or less of them is no error."""
MOST: Final = 0.25
"""Allowed to no runtime."""
_NOISE: Final = {torch.float32: 1e-6, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}
_SEEDS: Final = range(3)


@dataclass(frozen=True)
class Agreement:
    """Of one call.

    Attributes:
        error: ``|found - wanted| / |wanted|``.
        tolerance: what it may be.
        reason: why that is not 0, a few words.
    """

    error: float
    tolerance: float
    reason: str


def agreement(network: nn.Module, found: Tensor, call: Callable[[], Tensor]) -> Agreement:
    """Of one call.

    Args:
        network: that is called.
        found: what the runtime gave.
        call: gives the network's outputs for the same inputs.

    Raises:
        ExportError: when the shapes differ.
    """
    wanted = call()
    if found.shape != wanted.shape:
        raise ExportError(f"the file gives {tuple(found.shape)}, the model {tuple(wanted.shape)}")
    error, moved = relative_difference(found, wanted), 0.0
    for seed in _SEEDS:
        with _noisy(network, seed):
            moved = max(moved, relative_difference(call(), wanted))
    tolerance = min(MOST, max(SUMMATION, OFTEN * moved))
    if tolerance == SUMMATION:
        return Agreement(error, tolerance, "sums in another order")
    return Agreement(error, tolerance, f"noise as small as a sum in another order moves the model's own by {moved:.1e}")


def worst(found: Sequence[Agreement]) -> Agreement:
    """The one nearest to its tolerance, or furthest beyond."""
    return max(found, key=lambda one: one.error / one.tolerance)


@contextmanager
def _noisy(network: nn.Module, seed: int) -> Iterator[None]:
    generator = torch.Generator().manual_seed(seed)

    def disturbed(x: Any) -> Any:
        if not isinstance(x, Tensor) or x.dtype not in _NOISE:
            return x
        size = x.float().square().mean(-1, keepdim=True).sqrt()
        noise = torch.randn(x.shape, generator=generator).to(x.device)
        return (x.float() + _NOISE[x.dtype] * size * noise).to(x.dtype)

    def disturb(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any]:
        return tuple(disturbed(x) for x in args), {name: disturbed(x) for name, x in kwargs.items()}

    hooks = [
        module.register_forward_pre_hook(disturb, with_kwargs=True)
        for module in network.modules()
        if isinstance(module._parameters.get("weight"), QuantizedWeight)
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
