"""Looking at a prepared model's activations: to calibrate static schemes, and to keep a few for the proof."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from qat_plugin.qat.layers import ATTRIBUTE, first_tensor
from qat_plugin.qat.prepare import required_layers
from qat_plugin.qat.quantizer import Phase

_ROWS_KEPT = 64
_IMAGES_KEPT = 4


@contextmanager
def calibrating(model: nn.Module) -> Iterator[None]:
    """Let static schemes observe every forward pass inside, in eval mode too; layers compute in float meanwhile.

    The phase and, when frozen, the weights' scales are afterwards what they were.

    Raises:
        PrepareError: when the model is not prepared.
    """
    mine = [getattr(layer, ATTRIBUTE) for layer in required_layers(model).values()]
    before = {quantizer: quantizer.phase for quantizer in mine}
    for quantizer in before:
        quantizer.phase, quantizer.observe_always = Phase.OBSERVING, True
    try:
        yield
    finally:
        for quantizer, phase in before.items():
            quantizer.phase, quantizer.observe_always = phase, False


@contextmanager
def capture_inputs(model: nn.Module) -> Iterator[dict[str, Tensor]]:
    """Collect a few rows of real input of each prepared layer from the forward passes inside.

    Yields:
        A dict that fills up: plan name -> [at most 64, in_features] (token ids [at most 64] for an embedding, [at most
        4, channels, *size] for a convolution), from the last pass, detached.

    Raises:
        PrepareError: when the model is not prepared.
    """
    captured: dict[str, Tensor] = {}
    handles = [
        layer.register_forward_pre_hook(_keep_rows(name, captured), with_kwargs=True)
        for name, layer in required_layers(model).items()
    ]
    try:
        yield captured
    finally:
        for handle in handles:
            handle.remove()


def _keep_rows(name: str, captured: dict[str, Tensor]) -> Any:
    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        x = first_tensor(args, kwargs)
        if x is None or x.numel() == 0:
            return
        if getattr(module, ATTRIBUTE).layer.usage == "conv":
            images = x.detach() if x.dim() == module.weight.dim() else x.detach().unsqueeze(0)  # type: ignore[operator]
            captured[name] = images[:_IMAGES_KEPT].clone()
            return
        if x.is_nested:
            x = torch.cat(x.unbind())
        rows = x.detach().reshape(-1, x.shape[-1]) if x.is_floating_point() else x.detach().reshape(-1)
        captured[name] = rows[:: max(1, rows.shape[0] // _ROWS_KEPT)][:_ROWS_KEPT].clone()

    return hook
