"""Layers that fake-quantize: the user's own class, extended in place.

A layer keeps its identity, Parameters, hooks and mode; only its class becomes a subclass that is made here. nn.Linear,
nn.Conv1d, nn.Conv2d, nn.Embedding and transformers' Conv1D have a forward of a few words, which is written out; any
other subclass keeps its own forward, during which ``self.weight`` is the fake-quantized weight.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from qat_plugin.errors import PrepareError
from qat_plugin.policy.roles import is_conv1d
from qat_plugin.qat.quantizer import LayerQuantizer

ATTRIBUTE = "fake_quantizer"


class FakeQuantized:
    """Mark of a prepared layer; ``fake_quantizer`` is its :class:`LayerQuantizer`."""

    fake_quantizer: LayerQuantizer

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        """Pickle by the user's own class: ours is made at run time."""
        state = (
            self.__getstate__() if hasattr(self, "__getstate__") else self.__dict__
        )  # compiled layers drop their code
        return _rebuild, (base_class(self),), state


class _Linear(FakeQuantized):
    weight: Tensor
    bias: Tensor | None

    def forward(self, input: Tensor) -> Tensor:
        quantizer = self.fake_quantizer
        x = quantizer.fake_input(input)
        weight = quantizer.fake_parameter(self.weight) if quantizer.active else self.weight
        return F.linear(x, weight, self.bias)


class _Conv1D(FakeQuantized):
    weight: Tensor
    bias: Tensor

    def forward(self, x: Tensor) -> Tensor:
        quantizer = self.fake_quantizer
        x = quantizer.fake_input(x)
        if not quantizer.active:
            return super().forward(x)  # type: ignore[misc, no-any-return]
        return F.linear(x, quantizer.fake_parameter(self.weight), self.bias)


class _Convolution(FakeQuantized):
    weight: Tensor
    bias: Tensor | None

    def forward(self, input: Tensor) -> Tensor:
        quantizer = self.fake_quantizer
        x, weight = quantizer.fake_input(input), self.weight
        if quantizer.active:
            weight = quantizer.as_weight(quantizer.fake_parameter(weight), weight)
        y: Tensor = self._conv_forward(x, weight, self.bias)  # type: ignore[attr-defined]
        return y


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
            return quantizer.fake_weight(rows.reshape(-1, rows.shape[-1])).reshape(rows.shape)
        return F.embedding(input, quantizer.fake_parameter(self.weight), *options)


class _OwnForward(FakeQuantized):
    """A subclass with a forward of its own, which finds the fake-quantized weight in ``self.weight``."""

    weight: Tensor

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        quantizer, own = self.fake_quantizer, self.__dict__.get("weight")  # a pruned layer's weight is an attribute
        weight = self.weight
        if quantizer.active:
            self.__dict__["weight"] = weight = quantizer.as_weight(quantizer.fake_parameter(weight), weight)
        try:
            if self.weight is not weight:
                raise PrepareError(f"{quantizer.layer.name}: a parametrization was put on its weight after prepare()")
            return self._with_input(weight, args, kwargs)
        finally:
            if quantizer.active:
                del self.__dict__["weight"]
                if own is not None:
                    self.__dict__["weight"] = own

    def _with_input(self, weight: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run the forward; INT8 activations are rounded where they meet the weight, as the kernel will."""
        quantizer = self.fake_quantizer
        if not quantizer.scheme.quantizes_activations and quantizer.input_scale is None:
            return super().forward(*args, **kwargs)  # type: ignore[misc]
        with _AtTheProduct(self.fake_quantizer, weight) as product:
            result = super().forward(*args, **kwargs)  # type: ignore[misc]
        if product.seen:
            return result
        layer = self.fake_quantizer.layer
        raise PrepareError(
            f"{layer.name} ({base_class(self).__name__}): its forward does not call F.linear(x, self.weight) (or "
            f"F.conv1d, F.conv2d), so that {layer.scheme} cannot "
            f"{'round' if quantizer.scheme.quantizes_activations else 'divide'} its activations. "
            "Keep this layer or give it a weight-only scheme (without an input scale)"
        )


_PRODUCTS: dict[Any, tuple[str, ...]] = {
    **dict.fromkeys((F.linear, F.conv1d, F.conv2d), ("input", "weight")),
    torch.addmm: ("input", "mat1", "mat2"),
}


class _AtTheProduct(TorchFunctionMode):
    """Fake-quantizes what meets one weight in F.linear, F.conv1d, F.conv2d or (transformers' Conv1D) torch.addmm."""

    def __init__(self, quantizer: LayerQuantizer, weight: Tensor) -> None:
        super().__init__()
        self.quantizer, self.weight, self.seen = quantizer, weight, False

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Find the product among all calls inside."""
        kwargs = dict(kwargs or {})
        if func in _PRODUCTS:
            names = _PRODUCTS[func]
            call = {**dict(zip(names, args, strict=False)), **kwargs}
            if call.get(names[-1]) is self.weight:
                self.seen = True
                call[names[-2]] = self.quantizer.fake_input(call[names[-2]])
                return func(*[call.pop(name) for name in names], *args[len(names) :], **call)
        return func(*args, **kwargs)


def first_tensor(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor | None:
    """The input among a layer's arguments: the first tensor."""
    return next((value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)), None)


def _behaviour(base: type[nn.Module]) -> type[FakeQuantized]:
    if base.forward is nn.Linear.forward:
        return _Linear
    if base.forward in (nn.Conv1d.forward, nn.Conv2d.forward):
        return _Convolution
    if base.forward is nn.Embedding.forward:
        return _Embedding
    if base.__name__ == "Conv1D" and base.__module__ == "transformers.pytorch_utils":
        return _Conv1D
    return _OwnForward


@functools.cache
def fake_quantized_class(base: type[nn.Module]) -> type[nn.Module]:
    """The fake-quantizing subclass of a layer class; one per class."""
    return type(f"FakeQuantized{base.__name__}", (_behaviour(base), base), {"__module__": __name__})


def keeps_own_forward(layer: nn.Module) -> bool:
    """Whether a prepared layer's class brings a forward that is not written out here."""
    return isinstance(layer, _OwnForward)


def has_stock_forward(layer: nn.Module) -> bool:
    """Whether a layer, prepared or not, computes what nn.Linear, nn.Conv1d or nn.Conv2d does, and nothing more."""
    base: Any = base_class(layer)
    if not layer.__dict__.keys().isdisjoint(("forward", "_conv_forward")):
        return False
    if base.forward is nn.Linear.forward:
        return True
    return base.forward in (nn.Conv1d.forward, nn.Conv2d.forward) and base._conv_forward in (
        nn.Conv1d._conv_forward,
        nn.Conv2d._conv_forward,
    )


def base_class(layer: object) -> type[nn.Module]:
    """The user's class of a prepared layer."""
    return next(c for c in type(layer).__mro__ if issubclass(c, nn.Module) and not issubclass(c, FakeQuantized))


def extend(layer: nn.Module, quantizer: LayerQuantizer) -> None:
    """Make a layer fake-quantize, in place."""
    layer.add_module(ATTRIBUTE, quantizer)
    quantizer.train(layer.training)
    layer.__class__ = fake_quantized_class(type(layer))  # type: ignore[arg-type]


def current_weight(layer: nn.Module) -> Tensor:
    """The layer's float weight: its Parameter, or what pruning computes in its place."""
    weight = layer._parameters.get("weight")
    return layer.weight if weight is None else weight  # type: ignore[return-value]


def check_restorable(layer: nn.Module) -> None:
    """Raise when something else has changed a prepared layer's class.

    Raises:
        PrepareError: naming the layer.
    """
    if type(layer) is not fake_quantized_class(base_class(layer)):  # type: ignore[arg-type]
        raise PrepareError(
            f"{getattr(layer, ATTRIBUTE).layer.name} was parametrized after prepare(): take that off first "
            "(torch.nn.utils.parametrize.remove_parametrizations)"
        )


def restore(layer: nn.Module) -> None:
    """Give a prepared layer its own class back."""
    layer.__class__ = base_class(layer)
    del layer._modules[ATTRIBUTE]


def transposed(layer: nn.Module) -> bool:
    """Whether the layer's weight is [in_features, out_features]."""
    return is_conv1d(layer)


def _rebuild(base: type[nn.Module]) -> nn.Module:
    return base.__new__(fake_quantized_class(base))  # type: ignore[arg-type]
