"""The proof that a converted layer is the layer that was trained."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from qat_plugin.errors import ConversionError


@dataclass(frozen=True)
class LayerProof:
    """What was compared for one layer.

    Attributes:
        name, scheme, kernel: the layer and how it runs now.
        weight_difference: largest |dequantized - fake-quantized| weight; the promise is 0.
        output_error: ||converted - fake-quantized|| / ||fake-quantized|| of the outputs on ``inputs``.
        tolerance: the kernel's rounding contract for ``output_error``.
        inputs: whether the rows were captured from data or drawn at random.
    """

    name: str
    scheme: str
    kernel: str
    weight_difference: float
    output_error: float
    tolerance: float
    inputs: Literal["real", "random"]

    def check(self) -> LayerProof:
        """Return itself.

        Raises:
            ConversionError: when the layer broke the promise.
        """
        if self.weight_difference != 0:
            raise ConversionError(
                f"{self.name}: the converted weight ({self.scheme}, kernel {self.kernel}) differs from the "
                "trained one by "
                f"up to {self.weight_difference:g}; it must be equal"
            )
        if not self.output_error <= self.tolerance:
            raise ConversionError(
                f"{self.name}: the output of kernel {self.kernel} ({self.scheme}) differs from the "
                "fake-quantized layer's "
                f"by {self.output_error:.3g} (relative norm, {self.inputs} inputs); its rounding explains "
                f"{self.tolerance:g}"
            )
        return self


@dataclass(frozen=True)
class Proof:
    """One :class:`LayerProof` per converted layer; prints as one line."""

    layers: tuple[LayerProof, ...]

    def __str__(self) -> str:
        worst = max(self.layers, key=lambda layer: layer.output_error / layer.tolerance, default=None)
        if worst is None:
            return "no layer was converted"
        real = sum(layer.inputs == "real" for layer in self.layers)
        largest = max(layer.weight_difference for layer in self.layers)
        return (
            f"{len(self.layers)} layers converted and checked: largest weight difference {largest:g}; worst output "
            f"error {worst.output_error:.2g} of {worst.tolerance:g} allowed ({worst.name}, {worst.kernel}); "
            f"{real} on real inputs, {len(self.layers) - real} on random ones"
        )

    def to_list(self) -> list[dict[str, Any]]:
        """Plain values, one dict per layer."""
        return [asdict(layer) for layer in self.layers]

    @classmethod
    def from_list(cls, layers: Sequence[dict[str, Any]]) -> Proof:
        """The inverse of :meth:`to_list`."""
        return cls(tuple(LayerProof(**layer) for layer in layers))


def relative_error(output: Tensor, reference: Tensor) -> float:
    """||output - reference|| / ||reference|| in float64; infinite when shapes or types differ or a value is NaN."""
    if output.shape != reference.shape or output.dtype != reference.dtype:
        return math.inf
    reference64 = reference.detach().to(torch.float64)
    difference = (output.detach().to(torch.float64) - reference64).norm()
    scale = reference64.norm()
    if scale == 0:
        return 0.0 if difference == 0 else math.inf
    error = float(difference / scale)
    return math.inf if math.isnan(error) else error
