"""LoRA layers with a forward of our own: peft's objects, names and files, fewer copies; LoRA under fake quantization.

peft's layer is extended in place, as :mod:`qat_plugin.qat.layers` extends a Linear; two behaviours::

    lean     y = base(x) + s * (dropout(x) A^T) B^T      the product and the sum are one operation, in the type of x
    folded   y = x' FQ(W + s * B A)^T                    the adapter lies under the fake quantizer (QAT + LoRA)

Lean computes adapters in the type of the activations, as autocast does, while they are stored in float32; peft converts
the activations to float32 instead, once for each layer, and keeps the copies for the backward pass.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Final

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qat_plugin.policy import clean_name
from qat_plugin.qat.layers import FakeQuantized
from qat_plugin.qlora.fold import folded_weight

ADAPTER: Final = "default"
"""The name that adapters have inside peft's layers."""


class Extended:
    """Mark of a LoRA layer with one of the forwards below."""

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        """Pickle by peft's class: ours is made at run time."""
        return _rebuild, (peft_class(self), is_folded(self)), self.__dict__


class _Lean(Extended):
    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        layer: Any = self
        if layer.disable_adapters or layer.merged or args or kwargs or layer.lora_variant:
            return super().forward(x, *args, **kwargs)  # type: ignore[misc, no-any-return]
        out: Tensor = layer.base_layer(x)
        a, b = layer.lora_A[ADAPTER].weight, layer.lora_B[ADAPTER].weight
        x = layer.lora_dropout[ADAPTER](x)
        if not torch.is_autocast_enabled(x.device.type):
            a, b = a.to(x.dtype), b.to(x.dtype)
        low = F.linear(x, a)
        flat = out.reshape(-1, out.shape[-1])
        if low.dtype == out.dtype:
            low = low.reshape(-1, low.shape[-1])
            return torch.addmm(flat, low, b.to(low.dtype).t(), alpha=layer.scaling[ADAPTER]).view_as(out)
        update: Tensor = layer.scaling[ADAPTER] * F.linear(low, b)
        return out + update.to(out.dtype)


class _Folded(Extended):
    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        layer: Any = self
        base = layer.base_layer
        if layer.disable_adapters or layer.merged:
            return base(x, *args, **kwargs)  # type: ignore[no-any-return]
        base.__dict__["weight"] = folded_weight(layer)  # what base's own forward finds, before its Parameter
        try:
            return base(x, *args, **kwargs)  # type: ignore[no-any-return]
        finally:
            del base.__dict__["weight"]


@functools.cache
def _extended_class(base: type[nn.Module], folded: bool) -> type[nn.Module]:
    behaviour = _Folded if folded else _Lean
    return type(f"{behaviour.__name__[1:]}{base.__name__}", (behaviour, base), {"__module__": __name__})


def _rebuild(base: type[nn.Module], folded: bool) -> nn.Module:
    return base.__new__(_extended_class(base, folded))  # type: ignore[arg-type]


def peft_class(layer: object) -> type[nn.Module]:
    """peft's own class of a LoRA layer."""
    return next(c for c in type(layer).__mro__ if issubclass(c, nn.Module) and not issubclass(c, Extended))


def is_folded(layer: object) -> bool:
    """Whether the adapter lies under a fake quantizer."""
    return isinstance(layer, _Folded)


def extend(layer: Any) -> None:
    """Give peft's LoRA layer the forward that its base needs, in place."""
    base: type[nn.Module] = type(layer)
    layer.__class__ = _extended_class(base, isinstance(layer.get_base_layer(), FakeQuantized))  # type: ignore[arg-type]


def lora_layers(model: nn.Module) -> dict[str, Any]:
    """Clean name -> peft LoRA layer, in module order; empty without adapters.

    ``layer.get_base_layer()`` is the base linear, ``layer.get_delta_weight("default")`` its update [out, in].
    """
    return {
        clean_name(path): module
        for path, module in model.named_modules()
        if isinstance(getattr(module, "lora_A", None), nn.ModuleDict) and ADAPTER in module.lora_A
    }


def keep_full_precision(layer: Any) -> None:
    """Let a layer's adapter keep its type when the model is cast (``precision="bf16-true"``, ``model.to(dtype)``)."""
    for name in ("lora_A", "lora_B", "lora_magnitude_vector"):
        for part in getattr(layer, name, nn.ModuleDict()).modules():
            if part._parameters:
                part.__dict__["_apply"] = functools.partial(_apply_but_keep_type, part)


def _apply_but_keep_type(part: nn.Module, fn: Any, recurse: bool = True) -> nn.Module:
    before = {name: parameter for name, parameter in part._parameters.items() if parameter is not None}
    kept = {name: parameter.data for name, parameter in before.items()}
    type(part)._apply(part, fn, recurse)
    for name, data in kept.items():
        parameter = part._parameters[name]
        assert parameter is not None
        if parameter.dtype != data.dtype and not parameter.is_meta:
            parameter.data = data.to(parameter.device)
    return part


@contextmanager
def without_adapters(model: nn.Module) -> Iterator[None]:
    """Inside, the model computes with its base alone; a fake-quantized base computes in float."""
    layers = list(lora_layers(model).values())
    quantizers = [module.fake_quantizer for module in model.modules() if isinstance(module, FakeQuantized)]
    disabled, phases = [layer._disable_adapters for layer in layers], [quantizer.phase for quantizer in quantizers]
    try:
        for layer in layers:
            layer._disable_adapters = True
        for quantizer in quantizers:
            quantizer.phase = type(quantizer.phase).FLOAT
        yield
    finally:
        for layer, was in zip(layers, disabled, strict=True):
            layer._disable_adapters = was
        for quantizer, phase in zip(quantizers, phases, strict=True):
            quantizer.phase = phase
