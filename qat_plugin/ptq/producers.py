"""What may produce the input of a group of layers, and so take its division by a scale."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from qat_plugin.policy.roles import is_conv1d
from qat_plugin.ptq.tracing import Trace

Form = Literal["weight", "1 + weight", "rows"]
_TRIED = 4  # linear layers before the group, the nearest first


@dataclass(frozen=True)
class Producer:
    """A module whose output may be divided by a scale through its parameters.

    Attributes:
        module: a norm with an affine weight, or a linear layer.
        form: what is divided: a norm's weight, its weight plus one (Gemma's norms), or rows of a linear layer.
        rows: first and last (exclusive) output row of a linear layer; ``None`` for all.
        heads: (groups, heads of a group, width) where each group of heads reads one head of the producer.
    """

    module: nn.Module
    form: Form
    rows: tuple[int, int] | None = None
    heads: tuple[int, int, int] | None = None

    @property
    def parameters(self) -> list[nn.Parameter]:
        """The weight, and the bias where there is one."""
        both = (self.module._parameters.get(name) for name in ("weight", "bias"))
        return [parameter for parameter in both if parameter is not None]

    def constrain(self, scale: Tensor) -> Tensor:
        """The nearest scale [in_features] that this producer can take: heads of one group share theirs."""
        if self.heads is None:
            return scale
        by_head = scale.log().reshape(self.heads).mean(1, keepdim=True)
        return by_head.expand(self.heads).reshape(-1).exp()

    @torch.no_grad()
    def divide(self, scale: Tensor) -> None:
        """Divide the output by a constrained scale [in_features], in place."""
        if self.heads is not None:
            scale = scale.reshape(self.heads)[:, 0].reshape(-1)
        rows = slice(*(self.rows or (None, None)))
        for parameter in self.parameters:
            if self.form == "1 + weight":
                parameter.copy_((1 + parameter.to(torch.float32)) / scale - 1)
            elif parameter.dim() == 1:
                parameter[rows] = parameter[rows] / scale
            elif is_conv1d(self.module):
                parameter[:, rows] = parameter[:, rows] / scale
            else:
                parameter[rows] = parameter[rows] / scale.unsqueeze(1)


def producers(seen: Trace, group: Sequence[nn.Module], block: nn.Module) -> list[Producer]:
    """What may have produced the input of a group, the likeliest first. None of it is certain: try it.

    Args:
        seen: a pass in which the group was called.
        group: layers that share an input.
        block: what they lie in; a ``head_dim`` of one of its modules tells how heads are grouped.
    """
    given = seen.input_of(group[0])
    if given is None:
        return []
    found: list[Producer] = []
    giver = seen.giver_of(given)
    if giver is not None and _is_affine_norm(giver, given.shape[-1]):
        found.append(Producer(giver, "weight"))
        if giver._parameters.get("bias") is None:
            found.append(Producer(giver, "1 + weight"))
        return found  # what a norm gave, no linear layer did
    for module in seen.before(group[0]):
        if module not in group and (isinstance(module, nn.Linear) or is_conv1d(module)):
            found += _rows_of(module, given.shape[-1], block)
    return found[:_TRIED]


def _is_affine_norm(module: nn.Module, features: int) -> bool:
    weight = module._parameters.get("weight")
    return weight is not None and tuple(weight.shape) == (features,)


def _rows_of(module: nn.Module, features: int, block: nn.Module) -> list[Producer]:
    """The rows of a linear layer that may be the features: all, a part of a fused layer (the last first), or heads."""
    weight = module._parameters.get("weight")
    if weight is None or weight.dim() != 2:
        return []
    size = weight.shape[1] if is_conv1d(module) else weight.shape[0]
    if size % features == 0:
        starts = reversed(range(0, size, features))
        return [Producer(module, "rows", (start, start + features)) for start in starts]
    if features % size:
        return []
    widths = {getattr(part, "head_dim", None) for part in block.modules()}
    return [
        Producer(module, "rows", heads=(size // width, features // size, width))
        for width in widths
        if isinstance(width, int) and width > 0 and size % width == 0
    ]
