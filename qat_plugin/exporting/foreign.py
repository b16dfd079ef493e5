"""Quantized tensors of files made elsewhere: on this project's grid as they are, or else the numbers they stand for."""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from qat_plugin.errors import CheckpointError
from qat_plugin.exporting.assemble import Stored
from qat_plugin.numerics import Quantized, dequantize
from qat_plugin.qlora.source import some
from qat_plugin.scheme import Scheme


@dataclass
class Gathered:
    """What was read of a file, tensor by tensor.

    Attributes:
        quantized: name -> integers on a grid of this project.
        floats: name -> every other tensor; numbers of layers that are not on such a grid among them.
        off_grid: name of such a layer -> why.
    """

    quantized: dict[str, Stored] = field(default_factory=dict)
    floats: dict[str, Tensor] = field(default_factory=dict)
    off_grid: dict[str, str] = field(default_factory=dict)

    def add(
        self,
        name: str,
        q: Tensor,
        scale: Tensor,
        zero_point: Tensor | None,
        scheme: Scheme,
        activation_scale: Tensor | None = None,
    ) -> None:
        """One quantized weight.

        Args:
            name: of the parameter.
            q: integers [out_features, in_features] as :class:`~qat_plugin.numerics.Quantized` has them, or in int16
                where some may be off the grid.
            scale: [out_features, groups], of the file's own type.
            zero_point: integers like it, of asymmetric schemes.
            scheme: what it would be here.
            activation_scale: float32 scalar, of static schemes.

        Raises:
            CheckpointError: when shapes do not belong together.
        """
        groups = (1, 1) if scheme.per_tensor else (q.shape[0], q.shape[1] // (scheme.group_size or q.shape[1]))
        if scale.shape != groups or (zero_point is not None and zero_point.shape != groups):
            raise CheckpointError(
                f"{name}: {tuple(q.shape)} integers of {scheme} have scales {groups}, the file {tuple(scale.shape)}"
            )
        exact = scale.to(torch.float32)
        reason = _off_grid(q, exact, zero_point, scheme)
        if not reason:
            stored = torch.int8 if scheme.symmetric else torch.uint8
            zero = None if zero_point is None else zero_point.to(torch.uint8)
            self.quantized[name] = Stored(Quantized(q.to(stored), exact, zero, scheme), activation_scale)
            return
        self.floats[name] = dequantize(q, exact, zero_point)
        self.off_grid[name] = reason

    def tell(self, origin: Path) -> None:
        """Say on stderr which layers are float numbers now, and why; nothing where there are none."""
        for reason in dict.fromkeys(self.off_grid.values()):
            names = [name.removesuffix(".weight") for name, why in self.off_grid.items() if why == reason]
            print(f"{origin}: {len(names)} quantized layers become float numbers ({some(names)}): {reason}",
                  file=sys.stderr)  # fmt: skip


def _off_grid(q: Tensor, scale: Tensor, zero_point: Tensor | None, scheme: Scheme) -> str:
    if not bool(torch.isfinite(scale).all()):
        return "their scales are not finite"
    low, high = (int(bound) for bound in torch.aminmax(q)) if q.numel() else (0, 0)
    if low < scheme.qmin or high > scheme.qmax:
        return f"they hold integers from {low} to {high}, and the grid here is {scheme.qmin} to {scheme.qmax}"
    if zero_point is not None and zero_point.numel():
        low, high = (int(bound) for bound in torch.aminmax(zero_point))
        if low < scheme.qmin or high > scheme.qmax:
            return f"they hold zero points from {low} to {high}, and the grid here is {scheme.qmin} to {scheme.qmax}"
    return ""
