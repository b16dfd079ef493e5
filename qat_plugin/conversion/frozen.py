"""A converted model is for inference: training it says so, instead of stopping on a missing gradient."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from qat_plugin.errors import ConversionError


def refuse_training(layer: nn.Module) -> None:
    """Make a backward pass that starts behind ``layer`` raise, when the layer is in training mode.

    Nothing in a converted model requires gradients, so that torch itself would only say that "element 0 of tensors does
    not require grad". Integer layers refuse gradients of their inputs by themselves.
    """
    layer.register_forward_hook(_watch)


def _watch(layer: nn.Module, args: Any, output: Any) -> Any:
    trained = layer.training and torch.is_grad_enabled() and not torch.compiler.is_compiling()
    if not trained or not isinstance(output, Tensor) or output.requires_grad or not output.is_floating_point():
        return output
    return _Refusal.apply(output, torch.zeros((), requires_grad=True))


class _Refusal(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, output: Tensor, anchor: Tensor) -> Tensor:
        return output.clone()  # a view could not be written in place, as nn.ReLU(inplace=True) does

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        raise ConversionError(
            "a converted model cannot be trained. Train before convert(), or load the float checkpoint into a fresh "
            "model"
        )
