"""How the integers of a prepared layer move while it is trained."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from qat_plugin.errors import CheckpointError
from qat_plugin.numerics import choose_qparams, on_grid, quantize, to_groups
from qat_plugin.qat.layers import ATTRIBUTE, current_weight
from qat_plugin.qat.quantizer import LayerQuantizer


@dataclass(frozen=True)
class Drift:
    """What one look at a layer found, as shares from 0 to 1.

    Attributes:
        flipped: weights whose integer is another one than at the look before.
        oscillating: weights whose integer moved the other way than it moved last (arXiv:2203.11086, section 3).
        clipped: weights beyond the end of their grid.
        saturated: groups whose scale is zero or at the end of what it can be, or whose learned zero point is.
    """

    flipped: float
    oscillating: float
    clipped: float
    saturated: float


class DriftWatch:
    """Remembers a sample of one layer's integers from look to look, whole rows evenly spread over the weight.

    Args:
        layer: prepared, with an integer scheme.
        limit: weights looked at; the memory is two bytes for each.
    """

    def __init__(self, layer: nn.Module, limit: int) -> None:
        self.layer = layer
        rows, columns = self.quantizer.layer.shape
        self.every = max(1, -(-rows * columns // max(1, limit)))
        self.integers: Tensor | None = None
        self.direction: Tensor | None = None

    @property
    def quantizer(self) -> LayerQuantizer:
        """The layer's."""
        quantizer: LayerQuantizer = getattr(self.layer, ATTRIBUTE)
        return quantizer

    @torch.no_grad()
    def look(self) -> Drift:
        """Compare the integers with those of the look before; the first finds no flips."""
        weight, scale, zero_point = self._sample()
        scheme = self.quantizer.scheme
        integers = quantize(weight, scale, zero_point, scheme).q
        _, inside = on_grid(weight, scale, zero_point, scheme)
        flipped = oscillating = 0.0
        if self.integers is None or self.direction is None:
            self.direction = torch.zeros_like(integers, dtype=torch.int8)
        else:
            before = self.integers.to(integers.device)
            last = self.direction.to(integers.device)
            moved = (integers.to(torch.int16) - before.to(torch.int16)).sign().to(torch.int8)
            flipped = _share(moved != 0)
            oscillating = _share(moved * last < 0)
            self.direction = torch.where(moved == 0, last, moved)
        self.integers = integers
        return Drift(flipped, oscillating, 1 - _share(inside), _share(self._saturated(weight, scale)))

    def export_state(self) -> dict[str, Tensor]:
        """What was seen at the last look, on the CPU; empty before the first."""
        if self.integers is None or self.direction is None:
            return {}
        return {"integers": self.integers.cpu().clone(), "direction": self.direction.cpu().clone()}

    def import_state(self, state: dict[str, Any]) -> None:
        """The inverse.

        Raises:
            CheckpointError: when the sample is another one.
        """
        shape = tuple(self._sample()[0].shape)
        for name in ("integers", "direction"):
            value = state.get(name)
            if value is not None and tuple(value.shape) != shape:
                raise CheckpointError(
                    f"{self.quantizer.layer.name}: the monitor looked at {list(value.shape)} weights, now at "
                    f"{list(shape)}: resume with the same `weights`"
                )
            setattr(self, name, value)

    def _sample(self) -> tuple[Tensor, Tensor, Tensor | None]:
        """Some rows of what the integers are taken of, with the scales and zero points in force."""
        quantizer, weight = self.quantizer, current_weight(self.layer)
        rows = quantizer.rows(weight)[:: self.every]
        if quantizer.input_scale is not None:
            rows = rows * quantizer.input_scale
        if not quantizer.fixed and not quantizer.scheme.per_tensor:
            return rows, *choose_qparams(rows, quantizer.scheme)
        scale, zero_point = quantizer.qparams(weight)
        if quantizer.scheme.per_tensor:
            return rows, scale, zero_point
        return rows, scale[:: self.every], None if zero_point is None else zero_point[:: self.every]

    def _saturated(self, weight: Tensor, scale: Tensor) -> Tensor:
        """Groups whose scale cannot be what it should; a group of zeros has none."""
        scheme, grid = self.quantizer.scheme, self.quantizer.grid
        used = to_groups(weight, scheme).any(-1)
        ended = (scale == 0) | (scale.abs() >= (65280.0 if scheme.symmetric else 4064.0))
        if grid is not None:
            held = grid.saturated()
            ended = ended | (held if scheme.per_tensor else held[:: self.every])
        return ended & used


def _share(mask: Tensor) -> float:
    return float(mask.float().mean()) if mask.numel() else 0.0
