"""What calibration gathers of a layer's input, and what the weight algorithms take."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from qat_plugin.numerics import row_chunks


@dataclass
class InputStatistics:
    """Sums over the inputs x of one layer, [rows, in_features] in all.

    Attributes:
        in_features: length K of a row.
        second_moment: sum of x x^T, float32 [K, K]: the Hessian of the layer's squared error is twice its mean
            (arXiv:2210.17323, section 3.1). Empty when it was not asked for.
        sum_abs: sum of |x|, float64 [K] (AWQ's activation magnitude, arXiv:2306.00978).
        absmax: greatest |x|, float32 [K] (SmoothQuant's, arXiv:2211.10438).
        hessian: gather the second moment.
        drifts: gather the drift too.
        through: W, float32 [N, K]: gather the drift as one layer meets it.
        drift: sum of (x_f - x) x^T, float32 [K, K], where x_f is what the float model gives to the layer; or of
            W (x_f - x) x^T, [N, K]; ``None`` unless it was gathered.
        rows: number of rows seen.
    """

    in_features: int
    hessian: bool = True
    drifts: bool = False
    through: Tensor | None = None
    second_moment: Tensor = field(init=False)
    sum_abs: Tensor = field(init=False)
    absmax: Tensor = field(init=False)
    rows: int = 0
    drift: Tensor | None = None

    def __post_init__(self) -> None:
        size = self.in_features if self.hessian else 0
        self.second_moment = torch.zeros(size, size, dtype=torch.float32)
        if self.drifts:
            self.drift = self._no_drift()
        self.sum_abs = torch.zeros(self.in_features, dtype=torch.float64)
        self.absmax = torch.zeros(self.in_features, dtype=torch.float32)

    @torch.no_grad()
    def add(self, x: Tensor, float_x: Tensor | None = None) -> None:
        """Take inputs [..., in_features] into account, and beside them those of the float model."""
        rows = x.detach().reshape(-1, self.in_features).to(torch.float32)
        if not len(rows):
            return
        self.to(rows.device)
        beside = None
        if self.hessian and float_x is not None:
            self.drift = self._no_drift() if self.drift is None else self.drift
            beside = float_x.detach().reshape(-1, self.in_features)
        for part in row_chunks(rows):
            self._add(rows[part], None if beside is None else beside[part].to(rows.device, torch.float32))

    def _add(self, rows: Tensor, beside: Tensor | None) -> None:
        if self.hessian:
            self.second_moment.addmm_(rows.t(), rows)
        if beside is not None and self.drift is not None:
            drifted = beside - rows
            left = drifted.t() if self.through is None else self.through @ drifted.t()
            self.drift.addmm_(left, rows)
        magnitude = rows.abs()
        self.sum_abs += magnitude.sum(0, dtype=torch.float64)
        self.absmax = torch.maximum(self.absmax, magnitude.amax(0))
        self.rows += len(rows)

    def _no_drift(self) -> Tensor:
        size = self.in_features if self.hessian else 0
        rows = size if self.through is None else len(self.through)
        return torch.zeros(rows, size, dtype=torch.float32, device=self.second_moment.device)

    def to(self, device: torch.device) -> InputStatistics:
        """Move the sums to a device, in place."""
        if self.absmax.device != device:
            self.second_moment, self.sum_abs = self.second_moment.to(device), self.sum_abs.to(device)
            self.absmax = self.absmax.to(device)
            self.drift = None if self.drift is None else self.drift.to(device)
            self.through = None if self.through is None else self.through.to(device)
        return self

    def synchronize(self) -> None:
        """Sum up over all ranks, where there are several; every rank calls it."""
        if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
            return
        gathered = torch.tensor(float(self.rows), dtype=torch.float64, device=self.sum_abs.device)
        for part in (self.second_moment, self.sum_abs, gathered, *(() if self.drift is None else (self.drift,))):
            torch.distributed.all_reduce(part)
        torch.distributed.all_reduce(self.absmax, torch.distributed.ReduceOp.MAX)
        self.rows = int(gathered)

    @property
    def mean_square(self) -> Tensor:
        """Mean x^2 of each feature, float32 [K]."""
        return self.second_moment.diagonal() / max(self.rows, 1)

    @torch.no_grad()
    def divide(self, scale: Tensor) -> None:
        """Make these the sums over x / scale, in place.

        Args:
            scale: float32 [in_features], positive.
        """
        scale = scale.to(self.absmax)
        if self.hessian:
            self.second_moment.div_(scale).div_(scale.unsqueeze(1))
        self.sum_abs /= scale
        self.absmax = self.absmax / scale

    @property
    def mean_abs(self) -> Tensor:
        """Mean |x| of each feature, float32 [K]."""
        return (self.sum_abs / max(self.rows, 1)).to(torch.float32)
