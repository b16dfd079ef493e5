"""The float form of a block beside it while its layers are rounded, sharing what has not changed yet."""

from __future__ import annotations

import copy
from collections.abc import Iterable

from torch import nn

from qat_plugin.qat.layers import current_weight


class Twin:
    """A copy of a module that stays as it is while the module's layers are rounded one after the other.

    It has the module's own parameters; those that are about to change are copied by :meth:`part_from`. So of a block it
    costs the layers that were rounded, and not those whose turn is yet to come.

    Args:
        module: as it is now; other changes than to layers that :meth:`part_from` was told of are the copy's too.
        earlier: a copy from before input scales were folded in; by default there were none.

    Attributes:
        module: the copy.
        earlier: see above, or the copy.
    """

    def __init__(self, module: nn.Module, earlier: nn.Module | None = None) -> None:
        self.module = copy.deepcopy(module, {id(parameter): parameter for parameter in module.parameters()})
        self.earlier = earlier or self.module

    def part_from(self, layers: Iterable[nn.Module]) -> None:
        """Take copies of the weights of prepared layers that are about to change, wherever the copy has them."""
        changing = {id(current_weight(layer)) for layer in layers}
        copies: dict[int, nn.Parameter] = {}
        for module in self.module.modules():
            for name, parameter in module._parameters.items():
                if parameter is not None and id(parameter) in changing:
                    if id(parameter) not in copies:
                        copies[id(parameter)] = nn.Parameter(parameter.detach().clone(), parameter.requires_grad)
                    module._parameters[name] = copies[id(parameter)]
