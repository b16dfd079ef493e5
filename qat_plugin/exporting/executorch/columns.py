"""A weight as XNNPACK takes it: columns in groups of a multiple of 32, positive scales, and constants beside the input.

XNNPACK rounds each row of an activation on a grid of its own: asymmetric, from the row's least and greatest number. Its
integers become ours by two columns of constants: a row that is divided by our scale first lies within -127..127, and
with -128 and 127 beside it XNNPACK finds scale 1 and zero point 0. The weight is 0 there. ::

    x [.., 64] -> x / scale -> [x0 .. x63 | 127 .. 127, -128]      scale = absmax / 127 (ours)
    q [N, 64]               -> [q0 .. q63 |   0 ..   0,    0]      XNNPACK: (127 - -128) / 255 = 1

A group whose scale d is negative (half of the INT4 groups, whose greatest weight is stored as -8) is stored with the
scale -d and the integers ~q = -q - 1, which INT4 holds where it has no 8: ``d q x = -d (~q) x + -d x``. The second
term is the group's sum of activations times -d: one float product of a 32nd of the size.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from qat_plugin.numerics import Quantized
from qat_plugin.scheme import Scheme

GROUP = 32
"""XNNPACK's INT4 groups are a multiple of this."""
LOW, HIGH = -128.0, 127.0


@dataclass(frozen=True)
class Columns:
    """Of one linear weight.

    Attributes:
        features: of the layer's input.
        group: weights that share a scale; all of them, with a scale per channel.
        padded: columns that a group takes.
        constant: columns behind all groups that hold the constants; 0 without them.
        grouped: there is a scale per group.
    """

    features: int
    group: int
    padded: int
    constant: int
    grouped: bool

    @classmethod
    def of(cls, scheme: Scheme, features: int, *, constant: bool = True) -> Columns:
        """The layout of a scheme's integers."""
        if scheme.group_size is None:
            even = features % 2 if scheme.weight_bits < 8 else 0  # two weights of a byte
            return cls(features, features, features + even, 2 if constant else 0, False)
        padded = math.ceil(scheme.group_size / GROUP) * GROUP
        return cls(features, scheme.group_size, padded, padded if constant else 0, True)

    @property
    def total(self) -> int:
        """Columns of the weight in the file."""
        return self.features // self.group * self.padded + self.constant

    def of_weight(self, held: Quantized) -> tuple[Tensor, Tensor]:
        """Integers [out_features, total] and positive scales [out_features, groups] in float32, new tensors both."""
        rows = held.q.shape[0]
        q, scale = held.q.reshape(rows, -1, self.group), held.scale.float().expand(rows, -1)
        if self.grouped:
            q = torch.where((scale < 0).unsqueeze(-1), ~q, q)
        q = F.pad(q, (0, self.padded - self.group)).reshape(rows, -1)
        scale = F.pad(scale.abs(), (0, 1 if self.constant and self.grouped else 0), value=1.0)
        return F.pad(q, (0, self.constant)).clone(), scale.clone(memory_format=torch.contiguous_format)

    def signs(self, held: Quantized) -> Tensor | None:
        """What puts the signs of the scales back, float32; ``None`` where all are positive.

        Per group: [out_features, groups], the factors of each group's sum of activations. Per channel:
        [out_features] of 1 and -1, the factors of the output.
        """
        scale = held.scale.float().expand(held.q.shape[0], -1)
        if not bool((scale < 0).any()):
            return None
        return (-scale).clamp(min=0).contiguous() if self.grouped else scale.sign().reshape(-1)

    def weight_of(self, q: Tensor, scale: Tensor, negative: Tensor) -> tuple[Tensor, Tensor, int]:
        """The inverse of :meth:`of_weight`, and the greatest absolute integer where there must be zeros.

        Args:
            q: int8 [out_features, total].
            scale: [out_features, groups], as the file has it.
            negative: bool [out_features, groups] without the constants' group, which of the scales are negative.
        """
        rows, kept = q.shape[0], self.total - self.constant
        groups = q[:, :kept].reshape(rows, -1, self.padded)
        extra = [groups[..., self.group :], q[:, kept:]]
        stray = max((int(part.abs().max()) for part in extra if part.numel()), default=0)
        groups, scale = groups[..., : self.group], scale[:, :-1] if self.constant and self.grouped else scale
        if self.grouped:
            groups = torch.where(negative.unsqueeze(-1), ~groups, groups)
        return groups.reshape(rows, -1), torch.where(negative, -scale, scale), stray

    def of_input(self, x: Tensor) -> Tensor:
        """An activation [..., features] on the integer grid, with the columns of the weight."""
        if self.padded != self.group:
            shape = x.shape[:-1]
            x = F.pad(x.reshape(*shape, self.features // self.group, self.group), (0, self.padded - self.group))
            x = x.reshape(*shape, self.total - self.constant)
        if self.constant:
            x = F.pad(F.pad(x, (0, self.constant - 1), value=HIGH), (0, 1), value=LOW)
        return x

    def sums(self, q: Tensor) -> Tensor:
        """Sums of integers [..., features] by group, [..., groups]."""
        return q.reshape(*q.shape[:-1], self.features // self.group, self.group).sum(-1)
