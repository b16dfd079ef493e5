"""Looking at a prepared model's activations: to calibrate static schemes, and to keep a few for the proof."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from qat_plugin.errors import PrepareError
from qat_plugin.observers.distributed import synchronize
from qat_plugin.observers.spelling import ObserverSpec
from qat_plugin.qat.layers import ATTRIBUTE, first_tensor
from qat_plugin.qat.prepare import quantizers, required_layers
from qat_plugin.qat.quantizer import LayerQuantizer, Phase

_ROWS_KEPT = 64
_IMAGES_KEPT = 4


@contextmanager
def calibrating(model: nn.Module) -> Iterator[None]:
    """Let static schemes observe every forward pass inside, in eval mode too; layers compute in float meanwhile.

    The phase and, when frozen, the weights' scales are afterwards what they were. With several ranks, call
    :func:`synchronize_observers` afterwards.

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


def observing(model: nn.Module) -> dict[str, LayerQuantizer]:
    """Plan name -> quantizer of each layer whose scheme is static."""
    return {name: quantizer for name, quantizer in quantizers(model).items() if quantizer.observer is not None}


def observer_of(model: nn.Module) -> ObserverSpec | None:
    """What the static schemes of a prepared model calibrate with; ``None`` when it has none."""
    return next((q.observer.spec for q in observing(model).values() if q.observer is not None), None)


def observe_with(model: nn.Module, observer: str | ObserverSpec) -> None:
    """Begin calibration anew, with another observer.

    Raises:
        ConfigError: for an unknown observer.
    """
    observer = ObserverSpec.parse(observer)
    for quantizer in observing(model).values():
        quantizer.observe_with(observer)


def synchronize_observers(model: nn.Module) -> None:
    """Give all ranks the same statistics, and see that they are numbers.

    Every rank calls it, at the same moments: after each training batch, at the end of a calibration, before freezing.
    Lightning's callbacks and :func:`qat_plugin.calibrate` do. In one process it only checks.

    Raises:
        DataError: on every rank, when a layer's input was NaN or infinite on one; it names the layer.
    """
    static = observing(model)
    observers = [quantizer.observer for quantizer in static.values() if quantizer.observer is not None]
    if not observers:
        return
    synchronize(observers)
    greatest = torch.stack([observer.absmax.amax().to(observers[0].absmax.device) for observer in observers])
    if not bool(torch.isfinite(greatest).all()):  # one question to an accelerator, not one a layer
        for quantizer in static.values():
            quantizer.check_observed()


def check_observed(model: nn.Module) -> None:
    """Raise unless every static scheme has data to calibrate from.

    Raises:
        PrepareError: naming all layers that saw none.
        DataError: naming a layer whose input was NaN or infinite.
    """
    blind = []
    for name, quantizer in observing(model).items():
        quantizer.check_observed()
        if quantizer.observer is not None and not quantizer.observer.has_data:
            blind.append(f"{name} ({quantizer.scheme})")
    if blind:
        raise PrepareError(
            f"{', '.join(blind)} saw no activation: calibrate first, by training batches or by a forward pass inside "
            "`with calibrating(model):`; keep in the policy what the model's forward does not run"
        )


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
