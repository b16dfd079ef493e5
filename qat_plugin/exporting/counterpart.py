"""The network as a runtime would compute it: what a file's outputs are compared with.

Where a runtime rounds on another grid than training did, or computes in another float type, a comparison with the
model itself would need a tolerance that a mistake fits into. Compared is what the model's own integers and scales give
in the runtime's arithmetic; how far that is from the model itself is told beside it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from qat_plugin.exporting.verification import relative_difference
from qat_plugin.kernels.weight import QuantizedWeight

Change = Callable[[Tensor, QuantizedWeight, Tensor | None], tuple[Tensor, Tensor, Tensor | None]]
"""Input, weight and bias of a product -> those that it is to be computed with."""

_PRODUCTS: Final = (F.linear, F.conv1d, F.conv2d)
_NAMES: Final = ("input", "weight", "bias")


class Arithmetic(TorchFunctionMode):
    """While it is active, products of quantized weights with quantized inputs are computed as given.

    Args:
        change: of each of them.
    """

    def __init__(self, change: Change) -> None:
        super().__init__()
        self._change = change

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Of one operator."""
        kwargs = kwargs or {}
        if func in _PRODUCTS:
            given = dict(zip(_NAMES, args, strict=False)) | kwargs
            weight = given["weight"]
            if isinstance(weight, QuantizedWeight) and weight.scheme.quantizes_activations:
                changed = self._change(given["input"], weight, given.get("bias"))
                rest = {name: value for name, value in kwargs.items() if name not in _NAMES}
                return func(*changed, *args[len(_NAMES) :], **rest)
        return func(*args, **kwargs)


def distance_note(what: str, computed: Tensor, model: Tensor) -> tuple[str, ...]:
    """A note on how far the counterpart is from the model itself; none where it is no other.

    Args:
        what: it differs by.
        computed: outputs of the counterpart.
        model: outputs of the model.
    """
    distance = relative_difference(computed, model)
    return (f"{what}, which moves the model's own outputs by {distance:.1e}",) if distance else ()
