"""What post-training quantization did to each layer; a model remembers it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from torch import nn

from qat_plugin.errors import PrepareError


@dataclass(frozen=True)
class LayerResult:
    """One layer.

    Attributes:
        name: its plan name.
        scheme: its scheme.
        method: what made its integers: ``rtn``, ``mse``, ``hqq``, ``gptq``.
        rows: inputs seen, in rows of in_features.
        error_before: squared error of the layer's output on its calibration inputs when rounded to nearest, as a share
            of the output's energy; ``None`` where no inputs were looked at.
        error: the same for the integers it got.
        note: what else to know (an input scale, a tied weight, a method that did not apply).
        written: whether the weight became the numbers that the integers stand for; not where other layers share it.
    """

    name: str
    scheme: str
    method: str
    rows: int = 0
    error_before: float | None = None
    error: float | None = None
    note: str = ""
    written: bool = True


@dataclass(frozen=True)
class Calibration:
    """What :func:`qat_plugin.ptq.calibrate` did: one entry per layer of the plan, in the order of the work."""

    method: str
    layers: tuple[LayerResult, ...]

    def to_list(self) -> list[dict[str, Any]]:
        """Plain values, one dict per layer."""
        return [asdict(layer) for layer in self.layers]

    @classmethod
    def from_list(cls, method: str, layers: list[Mapping[str, Any]]) -> Calibration:
        """The inverse of :meth:`to_list`."""
        return cls(method, tuple(LayerResult(**layer) for layer in layers))

    def __str__(self) -> str:
        header = ("layer", "scheme", "method", "inputs", "error, nearest", "error", "note")
        rows = [header, *(_cells(layer) for layer in self.layers)]
        widths = [max(len(row[i]) for row in rows) for i in range(len(header) - 1)]
        lines = [
            "  ".join([*(cell.ljust(w) for cell, w in zip(row, widths, strict=False)), row[-1]]).rstrip()
            for row in rows
        ]
        return "\n".join([*lines, self.summary()])

    def summary(self) -> str:
        """One line: layers, and by how much their outputs' errors fell."""
        seen = [layer for layer in self.layers if layer.error is not None and layer.error_before]
        text = f"{self.method}: {len(self.layers)} layers"
        if not seen:
            return text
        before = sum(layer.error_before or 0.0 for layer in seen) / len(seen)
        after = sum(layer.error or 0.0 for layer in seen) / len(seen)
        return f"{text}; output error {before:.2e} (nearest) -> {after:.2e} on average over {len(seen)} of them"


def _cells(layer: LayerResult) -> tuple[str, ...]:
    errors = ("-" if error is None else f"{error:.2e}" for error in (layer.error_before, layer.error))
    return (layer.name, layer.scheme, layer.method, str(layer.rows), *errors, layer.note)


def remember(model: nn.Module, calibration: Calibration) -> None:
    """Keep it with the model."""
    model._qat_calibration = calibration  # type: ignore[assignment]


def calibration_of(model: nn.Module) -> Calibration:
    """What :func:`calibrate` did to a model.

    Raises:
        PrepareError: when it was not calibrated.
    """
    calibration = getattr(model, "_qat_calibration", None)
    if not isinstance(calibration, Calibration):
        raise PrepareError(f"{type(model).__name__} was not calibrated: call calibrate(model, plan, batches)")
    return calibration
