"""A folded BatchNorm's shift, added by the kernel of the layer before it.

The numbers stay where they are: the shift is the norm's bias in every state_dict, and the layer reads it from there at
each call. So a float checkpoint loads into a converted model as ever.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qat_plugin.kernels.convolution import convolve
from qat_plugin.kernels.weight import QuantizedWeight
from qat_plugin.qat.folded import FOLD, Fold, folds
from qat_plugin.qat.layers import has_stock_forward

_CALL = ("stride", "padding", "dilation", "groups")


class _Shifting:
    """Mark of a layer whose kernel adds its own bias and the shift of the norm behind it."""

    weight: Tensor
    bias: Tensor | None

    def forward(self, input: Tensor) -> Tensor:
        """As the layer's own class computes it, with another bias."""
        fold: Fold = self.__dict__[FOLD]
        bias = fold.shift if self.bias is None else self.bias + fold.shift
        watched = torch.compiler.is_compiling() or torch._C._len_torch_function_stack()
        if getattr(self, "padding_mode", "") == "zeros" and not watched:
            # what F.conv2d would come to, without its way there
            return convolve((input, self.weight, bias, *(getattr(self, name) for name in _CALL)), {})
        product = getattr(self, "_conv_forward", F.linear)
        y: Tensor = product(input, self.weight, bias)
        return y

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        """Pickle by the user's own class: ours is made at run time."""
        return _rebuild, (_own_class(self),), self.__dict__


def absorb_norms(model: nn.Module) -> None:
    """Let each integer layer that knows a folded norm add its shift; the norm then passes its input through.

    A layer with a forward or a product of its own keeps it, and the norm behind it adds the shift.
    """
    for fold in folds(model):
        layer = fold.layer
        if has_stock_forward(layer) and isinstance(layer._parameters.get("weight"), QuantizedWeight):
            layer.__class__ = _shifting_class(type(layer))  # type: ignore[arg-type]
            fold.absorbed = True


def release_norms(model: nn.Module) -> None:
    """The inverse of :func:`absorb_norms`."""
    for fold in folds(model):
        if fold.absorbed:
            fold.layer.__class__ = _own_class(fold.layer)
            fold.absorbed = False


def _own_class(layer: object) -> type[nn.Module]:
    return next(c for c in type(layer).__mro__ if issubclass(c, nn.Module) and not issubclass(c, _Shifting))


@functools.cache
def _shifting_class(base: type[nn.Module]) -> type[nn.Module]:
    return type(base.__name__, (_Shifting, base), {"__module__": __name__})


def _rebuild(base: type[nn.Module]) -> nn.Module:
    return base.__new__(_shifting_class(base))  # type: ignore[arg-type]
