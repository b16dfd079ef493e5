"""One layer on its way from fake quantization to its kernel: converted, proven, or taken back."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qat_plugin.conversion.proof import LayerProof, relative_error
from qat_plugin.conversion.reload import requantize_on_load
from qat_plugin.errors import ConversionError, PrepareError
from qat_plugin.kernels import ConvShape, kernel_named
from qat_plugin.kernels.table import ROUNDING
from qat_plugin.kernels.weight import CastWeight, QuantizedWeight
from qat_plugin.numerics import row_chunks
from qat_plugin.qat import LayerQuantizer
from qat_plugin.qat.layers import ATTRIBUTE, FakeQuantized, extend, keeps_own_forward, restore

logger = logging.getLogger(__name__)
_RANDOM_ROWS = 16
_SPREAD = 42  # steps of the calibrated scale in a standard deviation: a few in a thousand are clipped, as in data


class LayerConversion:
    """Converts one prepared layer; remembers what it takes to undo that.

    Args:
        layer: prepared.
        dtype: the float type to run in.
    """

    def __init__(self, layer: nn.Module, dtype: torch.dtype) -> None:
        self.layer, self.dtype = layer, dtype
        self.quantizer: LayerQuantizer = getattr(layer, ATTRIBUTE)
        weight = layer._parameters["weight"]
        assert weight is not None
        self.weight: nn.Parameter = weight
        self._modes = {module: module.training for module in layer.modules()}
        self._parameters = {module: dict(module._parameters) for module in layer.modules()}
        self._hook: torch.utils.hooks.RemovableHandle | None = None
        self.gone = False

    def run(self, rows: Tensor | None, converted: nn.Parameter, casts: dict[int, nn.Parameter]) -> LayerProof:
        """Put the converted weight in place of the trained one, and prove it.

        Args:
            rows: real inputs, or ``None`` for random ones.
            converted: the weight to run on.
            casts: the float parameters cast so far.

        Raises:
            ConversionError: when the layer breaks the promise, or computes what has no integer form.
        """
        with torch.no_grad(), torch.autocast(self.weight.device.type, enabled=False):
            return self._run(rows, converted, casts)

    def _run(self, rows: Tensor | None, converted: nn.Parameter, casts: dict[int, nn.Parameter]) -> LayerProof:
        layer, quantizer = self.layer, self.quantizer
        x = self._input(rows)
        layer.eval()
        reference = self._whole_output(x)
        whole = reference is not None
        if reference is None:
            reference = self._product(x)
        expected = quantizer.as_weight(quantizer.fake_weight(quantizer.rows(self.weight)), self.weight)
        restore(layer)
        layer._parameters["weight"] = converted
        cast_parameters(layer, self.dtype, casts)
        x = x.to(self.dtype) if x.is_floating_point() else x
        try:
            output = layer.forward(x) if whole else self._product(x)
        except (ConversionError, PrepareError):
            raise
        except Exception as failure:
            raise ConversionError(
                f"{quantizer.layer.name} ({type(layer).__name__}): its forward does something with the weight that has "
                f"no integer form ({type(failure).__name__}: {failure}). Keep this layer in the policy"
            ) from failure
        proof = self._proof(expected, reference, output, real=rows is not None and self._takes_rows)
        for module, mode in self._modes.items():
            module.training = mode
        self._hook = layer.register_load_state_dict_pre_hook(requantize_on_load)
        return proof.check()

    def let_go(self) -> None:
        """Keep nothing of the float layer any more: it cannot be taken back."""
        self.gone = True
        del self.weight
        self._parameters.clear()

    def take_back(self) -> None:
        """Make the layer what it was: prepared, on its float weight."""
        if self._hook is not None:
            self._hook.remove()
        for module, parameters in self._parameters.items():
            module._parameters.update(parameters)
        if not isinstance(self.layer, FakeQuantized):
            extend(self.layer, self.quantizer)
        for module, mode in self._modes.items():
            module.training = mode

    def _input(self, rows: Tensor | None) -> Tensor:
        """What the layer is proven on, in its own type; rounded to the type it will run in."""
        weight, columns = self.weight, self.quantizer.rows(self.weight).shape[-1]
        if rows is not None and self.quantizer.layer.usage == "conv":
            x = rows.detach().to(weight.device)
            channels = weight.shape[1] * int(self.layer.groups)  # type: ignore[arg-type]
            if x.dim() != weight.dim() or x.shape[1] != channels:
                raise ConversionError(
                    f"{self.quantizer.layer.name}: the inputs given have shape {tuple(x.shape)}, the layer takes "
                    f"[batch, {channels}, *size]"
                )
        elif rows is None or not self._takes_rows:
            x = random_input(self.layer, self.quantizer, weight)
        else:
            x = rows.detach().to(weight.device)
            if x.is_floating_point() and x.shape[-1:] != (columns,):
                raise ConversionError(
                    f"{self.quantizer.layer.name}: the inputs given have shape {tuple(x.shape)}, the layer takes "
                    f"[rows, {columns}]"
                )
        return x.to(self.dtype).to(weight.dtype) if x.is_floating_point() else x

    @property
    def _takes_rows(self) -> bool:
        """Whether real inputs can be told: not where a weight is sharded or of an unknown form."""
        return self.quantizer.layer.usage == "conv" or self.weight.dim() == 2

    def _whole_output(self, x: Tensor) -> Tensor | None:
        """The prepared layer's output; ``None`` when its own forward wants more than an input or returns more than a
        tensor, or holds prepared layers itself: then its product alone is proven.
        """
        if not keeps_own_forward(self.layer):
            output: Tensor = self.layer.forward(x)
            return output
        if any(isinstance(module, FakeQuantized) for module in self.layer.modules() if module is not self.layer):
            return None
        try:
            result = self.layer.forward(x)
        except PrepareError:
            raise
        except Exception as reason:
            logger.debug("%s is proven by its product alone: %s", self.quantizer.layer.name, reason)
            return None
        return result if isinstance(result, Tensor) else None

    def _product(self, x: Tensor) -> Tensor:
        """What the layer's weight does to an input, whatever the layer makes of it."""
        weight = self.layer._parameters["weight"]
        assert weight is not None
        if isinstance(self.layer, FakeQuantized):
            x = self.quantizer.fake_input(x)
            numbers = self.quantizer.fake_weight(self.quantizer.rows(weight))
            weight = self.quantizer.as_weight(numbers, weight)  # type: ignore[assignment]
        if isinstance(self.layer, nn.Embedding):
            return F.embedding(x, weight)
        if isinstance(self.layer, nn.modules.conv._ConvNd):
            product: Tensor = self.layer._conv_forward(x, weight, None)
            return product
        if self.quantizer.transposed:
            return torch.addmm(x.new_zeros(weight.shape[1]), x, weight)
        return F.linear(x, weight)

    def _proof(self, expected: Tensor, reference: Tensor, output: Tensor, *, real: bool) -> LayerProof:
        converted = self.layer._parameters["weight"]
        assert isinstance(converted, (QuantizedWeight, CastWeight))
        kernel = getattr(converted, "kernel_name", "cast")
        tolerances = [
            ROUNDING.get(dtype, 1e-2) if kernel == "cast" else kernel_named(kernel).tolerance(dtype)
            for dtype in {self.dtype, self.weight.dtype}
        ]
        if self.dtype != self.weight.dtype:
            output = output.to(reference.dtype)
        return LayerProof(
            self.quantizer.layer.name,
            str(self.quantizer.scheme),
            kernel,
            largest_difference(converted, expected) if self._divides_alike(converted) else math.inf,
            relative_error(output, reference),
            max(tolerances),
            "real" if real else "random",
        )

    def _divides_alike(self, converted: QuantizedWeight | CastWeight) -> bool:
        """Whether the converted layer divides its input by what the prepared one does."""
        mine, theirs = self.quantizer.input_scale, getattr(converted, "input_scale", None)
        return mine is theirs or (mine is not None and theirs is not None and torch.equal(mine, theirs))


def largest_difference(converted: QuantizedWeight | CastWeight, expected: Tensor) -> float:
    """max |converted - expected| over the numbers of a weight in its module's orientation; a part at a time.

    Where there is an input scale, both are the weight times it: what the integers stand for.
    """
    if isinstance(converted, CastWeight):
        parts = ((converted.data_[rows].to(expected.dtype), expected[rows]) for rows in row_chunks(expected))
    else:
        held, rowwise = converted.integers(), converted.rows_of(expected)
        parts = ((held.rows(rows).dequantize(expected.dtype), rowwise[rows]) for rows in row_chunks(rowwise))
    largest = [(number - wanted).abs().max() for number, wanted in parts if wanted.numel()]
    return float(torch.stack(largest).max()) if largest else 0.0


def conv_shape(layer: nn.Module, weight: Tensor) -> ConvShape | None:
    """Shape and groups of a convolution; ``None`` for other layers."""
    if not isinstance(layer, nn.modules.conv._ConvNd):
        return None
    return ConvShape(tuple(weight.shape), layer.groups)


def converted_weight(layer: nn.Module, quantizer: LayerQuantizer, weight: Tensor, dtype: torch.dtype) -> nn.Parameter:
    """The weight that a layer will run on, from the integers (or the cast) in force."""
    if quantizer.scheme.is_float:
        return nn.Parameter(CastWeight(weight.detach().to(quantizer.scheme.float_dtype), dtype), requires_grad=False)
    quantized = QuantizedWeight.from_integers(
        quantizer.integers(weight.detach()),
        dtype,
        transposed=quantizer.transposed,
        usage=quantizer.layer.usage,  # type: ignore[arg-type]
        conv=conv_shape(layer, weight),
        activation_scale=quantizer.activation_scale(),
        input_scale=quantizer.input_scale,
    )
    return nn.Parameter(quantized, requires_grad=False)


def random_input(layer: nn.Module, quantizer: LayerQuantizer, weight: Tensor) -> Tensor:
    """Rows from a generator of its own: conversion leaves the global random state alone."""
    generator, shape = torch.Generator().manual_seed(0), quantizer.rows(weight).shape
    if isinstance(layer, nn.Embedding):
        return torch.randint(shape[0], (_RANDOM_ROWS,), generator=generator).to(weight.device)
    if isinstance(layer, nn.modules.conv._ConvNd):
        return _random_images(layer, quantizer, weight, generator)
    return torch.randn(_RANDOM_ROWS, shape[-1], generator=generator).to(weight.device, weight.dtype)


def _random_images(
    layer: nn.modules.conv._ConvNd, quantizer: LayerQuantizer, weight: Tensor, generator: torch.Generator
) -> Tensor:
    """[2, channels, *size], of a size that each way of padding takes, in the range that was calibrated."""
    size = [
        3 * d * (k - 1) + 4 * s + 1 for d, k, s in zip(layer.dilation, layer.kernel_size, layer.stride, strict=True)
    ]
    x = torch.randn(2, layer.in_channels, *size, generator=generator).to(weight.device, weight.dtype)
    scale = quantizer.activation_scale()
    return x if scale is None else x * (scale.to(x.dtype) * _SPREAD)


def cast_parameters(module: nn.Module, dtype: torch.dtype, casts: dict[int, nn.Parameter]) -> None:
    """Cast the float parameters of a module, in place.

    Args:
        module: any.
        dtype: the float type.
        casts: id of an original -> its cast, added to; tied parameters stay tied. Whoever keeps it keeps the originals
            alive too, or ids could repeat.
    """
    for part in module.modules():
        if isinstance(part, (FakeQuantized, LayerQuantizer)):  # a prepared layer inside: its turn comes
            continue
        for name, parameter in part._parameters.items():
            if parameter is None or not parameter.is_floating_point() or parameter.dtype == dtype:
                continue
            if id(parameter) not in casts:
                casts[id(parameter)] = nn.Parameter(parameter.detach().to(dtype), requires_grad=False)
            part._parameters[name] = casts[id(parameter)]


def sharing_keys(layers: Mapping[str, nn.Module]) -> dict[str, tuple[object, ...]]:
    """Name -> key: layers tied in one format whose keys are equal share one converted Parameter.

    Layers that multiply share when they treat their activations alike; an embedding shares with the first of them.
    """
    mine: dict[str, LayerQuantizer] = {name: getattr(layer, ATTRIBUTE) for name, layer in layers.items()}
    groups: dict[tuple[object, ...], list[str]] = {}
    for name, quantizer in mine.items():
        groups.setdefault((id(layers[name]._parameters["weight"]), quantizer.scheme.weight_format), []).append(name)
    keys: dict[str, tuple[object, ...]] = {}
    for key, names in groups.items():
        treatment: dict[str, object] = {}
        for name in names:
            scheme = mine[name].scheme
            if not isinstance(layers[name], nn.Embedding):
                own = scheme.static or mine[name].input_scale is not None
                treatment[name] = name if own else scheme.activation_bits
        first = next(iter(treatment.values()), None)
        for name in names:
            keys[name] = (*key, treatment.get(name, first))
    return keys
