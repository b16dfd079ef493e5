"""Layers that fake-quantize: the user's own class, extended in place.

A layer keeps its identity, Parameters, hooks and mode; only its class becomes a subclass that is made here. nn.Linear,
nn.Embedding and transformers' Conv1D have a forward of a few words, which is written out; any other subclass keeps its
own forward, during which ``self.weight`` is the fake-quantized weight.
"""

from __future__ import annotations

import functools
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from qat_plugin.policy.roles import is_conv1d
from qat_plugin.qat.quantizer import LayerQuantizer

ATTRIBUTE = "fake_quantizer"


class FakeQuantized:
    """Mark of a prepared layer; ``fake_quantizer`` is its :class:`LayerQuantizer`."""

    fake_quantizer: LayerQuantizer

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        """Pickle by the user's own class: ours is made at run time."""
        return _rebuild, (base_class(self),), self.__dict__


class _Linear(FakeQuantized):
    weight: Tensor
    bias: Tensor | None

    def forward(self, input: Tensor) -> Tensor:
        quantizer = self.fake_quantizer
        x = quantizer.fake_input(input)
        weight = quantizer.fake_weight(self.weight) if quantizer.active else self.weight
        return F.linear(x, weight, self.bias)


class _Conv1D(FakeQuantized):
    weight: Tensor
    bias: Tensor

    def forward(self, x: Tensor) -> Tensor:
        quantizer = self.fake_quantizer
        x = quantizer.fake_input(x)
        if not quantizer.active:
            return super().forward(x)  # type: ignore[misc, no-any-return]
        return F.linear(x, quantizer.fake_weight(self.weight.t()), self.bias)


class _Embedding(FakeQuantized):
    weight: Tensor
    padding_idx: int | None
    scale_grad_by_freq: bool
    sparse: bool

    def forward(self, input: Tensor) -> Tensor:
        quantizer = self.fake_quantizer
        options = (self.padding_idx, None, 2.0, self.scale_grad_by_freq, self.sparse)
        if not quantizer.active:
            return F.embedding(input, self.weight, *options)
        if quantizer.rows_stand_alone:
            rows = F.embedding(input, self.weight, *options)
            return quantizer.fake_weight(rows.flatten(0, -2)).reshape(rows.shape)
        return F.embedding(input, quantizer.fake_weight(self.weight), *options)


class _OwnForward(FakeQuantized):
    """A subclass with a forward of its own."""

    _parameters: dict[str, Tensor]

    @property
    def weight(self) -> Tensor:
        fake = self.__dict__.get("_fake_weight")
        return self._parameters["weight"] if fake is None else fake

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        quantizer, weight = self.fake_quantizer, self._parameters["weight"]
        args, kwargs = _with_first_tensor(quantizer, args, kwargs)
        if not quantizer.active:
            return super().forward(*args, **kwargs)  # type: ignore[misc]
        fake = quantizer.fake_weight(quantizer.rows(weight))
        self.__dict__["_fake_weight"] = quantizer.rows(fake)
        try:
            return super().forward(*args, **kwargs)  # type: ignore[misc]
        finally:
            del self.__dict__["_fake_weight"]


def _with_first_tensor(
    quantizer: LayerQuantizer, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments with the first floating-point tensor, the layer's input, fake-quantized."""
    for i, value in enumerate(args):
        if isinstance(value, Tensor):
            return (*args[:i], quantizer.fake_input(value), *args[i + 1 :]), kwargs
    for name, value in kwargs.items():
        if isinstance(value, Tensor):
            return args, {**kwargs, name: quantizer.fake_input(value)}
    return args, kwargs


def first_tensor(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor | None:
    """The input among a layer's arguments, by the same rule."""
    return next((value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)), None)


def _behaviour(base: type[nn.Module]) -> type[FakeQuantized]:
    if base.forward is nn.Linear.forward:
        return _Linear
    if base.forward is nn.Embedding.forward:
        return _Embedding
    if base.__name__ == "Conv1D" and base.__module__ == "transformers.pytorch_utils":
        return _Conv1D
    return _OwnForward


@functools.cache
def fake_quantized_class(base: type[nn.Module]) -> type[nn.Module]:
    """The fake-quantizing subclass of a layer class; one per class."""
    return type(f"FakeQuantized{base.__name__}", (_behaviour(base), base), {"__module__": __name__})


def base_class(layer: object) -> type[nn.Module]:
    """The user's class of a prepared layer."""
    return next(c for c in type(layer).__mro__ if issubclass(c, nn.Module) and not issubclass(c, FakeQuantized))


def extend(layer: nn.Module, quantizer: LayerQuantizer) -> None:
    """Make a layer fake-quantize, in place."""
    layer.add_module(ATTRIBUTE, quantizer)
    quantizer.train(layer.training)
    layer.__class__ = fake_quantized_class(type(layer))  # type: ignore[arg-type]


def restore(layer: nn.Module) -> None:
    """Give a prepared layer its own class back."""
    layer.__class__ = base_class(layer)
    del layer._modules[ATTRIBUTE]


def transposed(layer: nn.Module) -> bool:
    """Whether the layer's weight is [in_features, out_features]."""
    return is_conv1d(layer)


def _rebuild(base: type[nn.Module]) -> nn.Module:
    return base.__new__(fake_quantized_class(base))  # type: ignore[arg-type]
