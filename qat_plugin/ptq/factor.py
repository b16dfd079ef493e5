"""The Cholesky factor of a damped second moment, in one buffer of its size: nothing else of K x K is made."""

from __future__ import annotations

from typing import Final

import torch
from torch import Tensor

from qat_plugin.errors import QatError

_RETRIES: Final = 12
_ROWS: Final = 128


def lower_factor(moment: Tensor, damping: float, order: Tensor | None = None) -> Tensor:
    """L with ``L L^T = H + damping mean(diag H) I``, its inputs in another order where one is given; ten times more
    damping after each failed decomposition.

    Inputs that were always zero count as having the mean second moment: their weights are rounded to nearest.

    Args:
        moment: H, float32 [K, K], symmetric; any multiple of it, as only the damping's share counts.
        damping: share of the mean diagonal.
        order: int64 [K]; input ``order[i]`` is row and column i of what is decomposed.

    Returns:
        float32 [K, K], the memory of ``L.mT`` contiguous: rows of the upper factor are.

    Raises:
        QatError: for NaN or infinity, or when no damping helps.
    """
    if not all_finite(moment):
        raise QatError(f"the second moment of the inputs ({len(moment)} features) holds NaN or infinity")
    diagonal = moment.diagonal()
    dead = diagonal <= 0
    mean = float(diagonal[~dead].mean()) if bool((~dead).any()) else 1.0
    upper, share = torch.empty_like(moment, memory_format=torch.contiguous_format), damping
    for _ in range(_RETRIES):
        added = torch.full_like(diagonal, share * mean).masked_fill_(dead, mean)
        _reordered(moment, order, upper)
        upper.diagonal().add_(added if order is None else added[order])
        if _decomposed(upper) and all_finite(upper):
            return upper.mT
        share *= 10
    raise QatError(
        f"the second moment of the inputs ({len(moment)} features) has no Cholesky decomposition, even with "
        f"{share / 10:g} of its mean diagonal added"
    )


def _decomposed(upper: Tensor) -> bool:
    """Turn H into its upper factor in place, a block of rows at a time: torch's own decomposition copies H."""
    for start in range(0, len(upper), _ROWS):
        above, rows = upper[:start, start:], upper[start : start + _ROWS, start:]
        rows.addmm_(above[:, : len(rows)].t(), above, alpha=-1)
        corner, failed = torch.linalg.cholesky_ex(rows[:, : len(rows)], upper=True)
        if failed:
            return False
        right = torch.linalg.solve_triangular(corner.mT, rows[:, len(rows) :], upper=False)
        rows[:, : len(rows)], rows[:, len(rows) :] = corner, right
        upper[start + _ROWS :, start : start + _ROWS] = 0
    return True


def all_finite(x: Tensor) -> bool:
    """Whether no number is NaN or infinite, without temporaries of the tensor's size."""
    return not x.numel() or bool(torch.isfinite(torch.stack(torch.aminmax(x))).all())


def _reordered(moment: Tensor, order: Tensor | None, out: Tensor) -> None:
    if order is None:
        out.copy_(moment)
        return
    for rows, part in zip(order.split(_ROWS), out.split(_ROWS), strict=True):
        torch.index_select(moment[rows], 1, order, out=part)
