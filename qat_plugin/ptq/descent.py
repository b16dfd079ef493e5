"""Integers of some rows of a weight that keep ``tr(E H E^T)`` small, ``E = W' - W``: GPTQ's rounding and sweeps.

Rows do not depend on each other given H, so that a weight is worked on in pieces. Within one, weights are held
transposed: the numbers of one input, which are rounded together, lie beside each other.
"""

from __future__ import annotations

from typing import Final

import torch
from torch import Tensor

from qat_plugin.learned import learned_scale
from qat_plugin.numerics import nonzero
from qat_plugin.scheme import Scheme

_BLOCK: Final = 128


class Descent:
    """Rows of a weight on their way to integers.

    Args:
        wanted: float32 [n, in_features], the rows' numbers.
        moment: H or any multiple of it, float32 [in_features, in_features].
        scale: float32 [n, groups], or [1, 1] per tensor.
        zero_point: like ``scale``, or ``None``.
        scheme: an integer scheme.

    Attributes:
        q: the integers as float32 [in_features, n].
        scale: float32, as ``scale`` but [groups, n].
    """

    def __init__(
        self, wanted: Tensor, moment: Tensor, scale: Tensor, zero_point: Tensor | None, scheme: Scheme
    ) -> None:
        self.moment, self.scheme = moment, scheme
        self.size = wanted.shape[1] if scheme.group_size is None else scheme.group_size
        self.scale = scale.t().clone(memory_format=torch.contiguous_format)
        self._divisor = nonzero(self.scale)
        zero_point = torch.zeros_like(scale) if zero_point is None else zero_point
        self._zero_point = zero_point.t().to(torch.float32).contiguous()
        self._wanted = wanted.t().clone(memory_format=torch.contiguous_format)
        self.q = torch.empty_like(self._wanted)
        self._gradient: Tensor | None = None

    def round(self, lower: Tensor, order: Tensor) -> None:
        """The paper's algorithm (arXiv:2210.17323) on fixed grids, by the factor of H instead of its inverse's.

        ``tr(E H E^T)`` is ``|E L|^2``, whose column j holds the errors of inputs j and up: rounding from the last input
        to the first, each makes up for those before it (the form of arXiv:2307.13304, which shows that both
        give the same integers).

        Args:
            lower: L of :func:`~qat_plugin.ptq.factor.lower_factor` with this order.
            order: int64 [in_features]; the last is rounded first.
        """
        left = self._wanted[order]  # what is wanted; once an input is rounded, its error
        upper, diagonal, inputs = lower.mT, lower.diagonal().unsqueeze(-1), order.tolist()
        for stop in range(len(left), 0, -_BLOCK):
            start = max(0, stop - _BLOCK)
            part, ahead = left[start:stop], upper[start:stop, start:] / diagonal[start:stop]
            target = torch.addmm(part, ahead[:, stop - start :], left[stop:], alpha=-1)
            for i in reversed(range(stop - start)):
                made_up = torch.addmv(target[i], part[i + 1 :].t(), ahead[i, i + 1 : stop - start], alpha=-1)
                levels = self._levels(made_up, inputs[start + i])
                self.q[inputs[start + i]] = levels
                part[i] = self._numbers(levels, inputs[start + i]).sub_(part[i])

    def sweep(self) -> None:
        """A round of coordinate descent over the integers, then the scales; each step lowers the error."""
        if self._gradient is None:
            self._gradient = self._begin()
        self._integers(self._gradient)
        if not self.scheme.per_tensor:
            self._scales(self._gradient)

    def _begin(self) -> Tensor:
        """H E^T, which the sweeps keep up to date; nothing else needs what was wanted from here on."""
        errors = self._wanted.neg_()
        for start in range(0, len(errors), self.size):
            part = slice(start, start + self.size)
            errors[part] += self._numbers(self.q[part], start)
        del self._wanted
        return self.moment @ errors

    def _levels(self, numbers: Tensor, column: int) -> Tensor:
        """Integers of one input's weights, as numerics rounds them; in place."""
        group = column // self.size
        levels = (numbers / self._divisor[group]).add_(0.5).floor_().add_(self._zero_point[group])
        return levels.clamp_(self.scheme.qmin, self.scheme.qmax)

    def _numbers(self, levels: Tensor, column: int) -> Tensor:
        group = column // self.size
        return (levels - self._zero_point[group]).mul_(self.scale[group])

    def _integers(self, gradient: Tensor) -> None:
        """Move each weight to the grid's best number, all others fixed (QuantEase, arXiv:2309.01885)."""
        diagonal = self.moment.diagonal().tolist()
        for start in range(0, len(gradient), _BLOCK):
            stop = min(start + _BLOCK, len(gradient))
            local, moved = self.moment[start:stop, start:stop], torch.zeros_like(gradient[start:stop])
            for i, column in enumerate(range(start, stop)):
                if not diagonal[column] > 0:
                    continue
                slope = torch.addmv(gradient[column], moved[:i].t(), local[i, :i])
                old = self.q[column]
                new = self._levels(self._numbers(old, column).sub_(slope.div_(diagonal[column])), column)
                torch.mul(new - old, self.scale[column // self.size], out=moved[i])
                self.q[column] = new
            gradient.addmm_(self.moment[:, start:stop], moved)

    def _scales(self, gradient: Tensor) -> None:
        """Move each group's scale to its best value that files can hold, integers fixed."""
        several = max(1, _BLOCK // self.size) * self.size
        for start in range(0, len(gradient), several):
            block = slice(start, min(start + several, len(gradient)))
            moved = torch.zeros_like(gradient[block])
            for first in range(start, block.stop, self.size):
                part, before = slice(first, first + self.size), slice(0, first - start)
                group = first // self.size
                levels, old = self.q[part] - self._zero_point[group], self.scale[group]
                slopes = torch.addmm(gradient[part], self.moment[part, start:first], moved[before])
                curvature = (self.moment[part, part] @ levels).mul_(levels).sum(0)
                best = old - slopes.mul_(levels).sum(0) / torch.where(curvature > 0, curvature, 1.0)
                new = learned_scale(best, self.scheme)
                nearer = (curvature > 0) & (new != 0) & ((new - best).abs() < (old - best).abs())
                new = torch.where(nearer, new, old)
                moved[first - start : part.stop - start] = levels.mul_(new - old)
                self.scale[group], self._divisor[group] = new, nonzero(new)
            gradient.addmm_(self.moment[:, block], moved)
