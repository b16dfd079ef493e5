"""The tensor subclasses of converted weights: what they hold, and how they are copied and pickled.

What operators do with them is in :mod:`qat_plugin.kernels.weight`, which is where to import them from.
"""

from __future__ import annotations

import math
from typing import Any, cast

import torch
from torch import Tensor

from qat_plugin.errors import ConversionError
from qat_plugin.kernels.scales import scale_dtype
from qat_plugin.kernels.table import ConvShape, LayerSpec, Usage, choose, kernel_named, scales_refused
from qat_plugin.kernels.torchao_import import import_torchao
from qat_plugin.numerics import Quantized
from qat_plugin.scheme import Scheme

import_torchao()
from torchao.utils import TorchAOBaseTensor  # noqa: E402

_SCHEMES: dict[str, Scheme] = {}


class QuantizedWeight(TorchAOBaseTensor):  # type: ignore[misc]
    """A weight as integers in one kernel's layout.

    Attributes:
        data_, scale, zero_point: the kernel's tensors.
        activation_scale: float32 scalar of a static scheme, else ``None``.
        input_scale: float32 [in_features] that inputs are divided by, or ``None``; the integers are of the weight times
            it.
        kernel_name, spelling: the kernel and the scheme.
        logical_shape: [out, in] ([in, out] when ``transposed``; a convolution's [out, in / groups, *kernel]), what
            ``.shape`` says.
        logical_dtype: the float type it stands for, what ``.dtype`` says.
        usage: ``"linear"``, ``"embedding"``, ``"both"`` (tied) or ``"conv"``.
        groups: of a convolution; else 1.
    """

    tensor_data_names = ["data_", "scale"]  # noqa: RUF012  (torchao reads and copies these lists)
    optional_tensor_data_names = ["zero_point", "activation_scale", "input_scale"]  # noqa: RUF012
    tensor_attribute_names = [  # noqa: RUF012
        "kernel_name", "spelling", "logical_shape", "logical_dtype", "transposed", "usage", "groups",
    ]  # fmt: skip

    data_: Tensor
    scale: Tensor
    zero_point: Tensor | None
    activation_scale: Tensor | None
    input_scale: Tensor | None

    @staticmethod
    def __new__(
        cls: type[QuantizedWeight],
        data_: Tensor,
        scale: Tensor,
        kernel_name: str,
        spelling: str,
        logical_shape: tuple[int, ...],
        logical_dtype: torch.dtype,
        transposed: bool,
        usage: Usage,
        groups: int = 1,
        zero_point: Tensor | None = None,
        activation_scale: Tensor | None = None,
        input_scale: Tensor | None = None,
    ) -> QuantizedWeight:
        """An empty shell of the logical shape and type."""
        return torch.Tensor._make_wrapper_subclass(
            cls, tuple(logical_shape), dtype=logical_dtype, device=scale.device, requires_grad=False
        )

    def __init__(
        self,
        data_: Tensor,
        scale: Tensor,
        kernel_name: str,
        spelling: str,
        logical_shape: tuple[int, ...],
        logical_dtype: torch.dtype,
        transposed: bool,
        usage: Usage,
        groups: int = 1,
        zero_point: Tensor | None = None,
        activation_scale: Tensor | None = None,
        input_scale: Tensor | None = None,
    ) -> None:
        super().__init__()
        self.data_ = data_
        self.scale = scale
        self.kernel_name = kernel_name
        self.spelling = spelling
        self.logical_shape = tuple(logical_shape)
        self.logical_dtype = logical_dtype
        self.transposed = transposed
        self.usage = usage
        self.groups = groups
        self.zero_point = zero_point
        self.activation_scale = activation_scale
        self.input_scale = input_scale

    @classmethod
    def from_integers(
        cls,
        quantized: Quantized,
        dtype: torch.dtype,
        *,
        transposed: bool = False,
        usage: Usage = "linear",
        conv: ConvShape | None = None,
        activation_scale: Tensor | None = None,
        input_scale: Tensor | None = None,
        kernel: str | None = None,
    ) -> QuantizedWeight:
        """Pack integers for the best kernel of their device.

        Args:
            quantized: integers [out_features, in_features].
            dtype: the float type of the layer's input and output.
            transposed: the module's weight is [in_features, out_features].
            usage: how the weight is read.
            conv: shape and groups of a convolution's weight (``usage="conv"``).
            activation_scale: float32 scalar, for static schemes.
            input_scale: float32 [in_features], when the integers are of the weight times it.
            kernel: a kernel's name, instead of the table's choice.

        Raises:
            ConversionError: when no kernel runs it, each kernel's reason in the message; or when ``kernel`` would round
                its scales.
        """
        rows, columns = quantized.q.shape
        spec = LayerSpec(
            quantized.scheme, rows, columns, quantized.q.device, dtype, usage, conv, scale_dtype(quantized.scale)
        )
        choice = choose(spec)
        if kernel is None and choice.refusal is not None:
            raise ConversionError(f"no kernel runs {quantized.scheme} on {spec.device}: {choice.refusal}")
        name = kernel or choice.kernel
        if kernel is not None and (reason := scales_refused(kernel_named(kernel), spec)):
            raise ConversionError(f"{kernel} {reason}")
        packed = kernel_named(name).pack(quantized, spec)
        shape = conv.weight if conv is not None else (columns, rows) if transposed else (rows, columns)
        return cls(
            packed.data, packed.scale, name, str(quantized.scheme), shape, dtype, transposed, usage,
            1 if conv is None else conv.groups,
            zero_point=packed.zero_point, activation_scale=activation_scale, input_scale=input_scale,
        )  # fmt: skip

    @property
    def scheme(self) -> Scheme:
        """The scheme of the integers."""
        known = _SCHEMES.get(self.spelling)  # parsing takes longer than a small product
        if known is None:
            known = _SCHEMES[self.spelling] = Scheme.parse(self.spelling)
        return known

    @property
    def in_features(self) -> int:
        """Length of one row of integers."""
        return self.logical_shape[0] if self.transposed else math.prod(self.logical_shape[1:])

    @property
    def out_features(self) -> int:
        """Number of rows of integers."""
        return self.logical_shape[1 if self.transposed else 0]

    @property
    def conv(self) -> ConvShape | None:
        """Shape and groups, of a convolution's weight."""
        return ConvShape(self.logical_shape, self.groups) if self.usage == "conv" else None

    def rows_of(self, weight: Tensor) -> Tensor:
        """A float weight of the module's orientation as [out_features, in_features]."""
        return weight.t() if self.transposed else weight.flatten(1)

    def integers(self) -> Quantized:
        """The integers, scales and zero points, [out_features, in_features], unpacked exactly.

        With an input scale they stand for the weight times it.
        """
        return kernel_named(self.kernel_name).unpack(self)

    def dequantize(self, dtype: torch.dtype | None = None) -> Tensor:
        """The float weight it stands for, in the module's orientation."""
        dtype = dtype or self.logical_dtype
        if self.input_scale is None:
            weight = self.integers().dequantize(dtype)
        else:
            weight = (self.integers().dequantize() / self.input_scale).to(dtype)
        return weight.t() if self.transposed else weight.reshape(self.logical_shape)

    def repack(self, device: torch.device, dtype: torch.dtype) -> QuantizedWeight:
        """The same integers for another device or float type, in the layout of the kernel that is best there."""
        quantized = self.integers()
        moved = Quantized(
            quantized.q.to(device),
            quantized.scale.to(device),
            None if quantized.zero_point is None else quantized.zero_point.to(device),
            quantized.scheme,
        )
        return type(self).from_integers(
            moved,
            dtype,
            transposed=self.transposed,
            usage=self.usage,
            conv=self.conv,
            activation_scale=None if self.activation_scale is None else self.activation_scale.to(device),
            input_scale=None if self.input_scale is None else self.input_scale.to(device),
        )

    def __deepcopy__(self, memo: dict[int, Any]) -> QuantizedWeight:
        if id(self) not in memo:  # oneDNN's opaque tensors can be cloned, not deep-copied
            copied = self._apply_fn_to_data(torch.clone)
            memo[id(self)] = torch.nn.Parameter(copied, requires_grad=False) if _is_parameter(self) else copied
        return cast(QuantizedWeight, memo[id(self)])

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        """Pickle the integers, not the kernel's layout: oneDNN's opaque tensors have no bytes to write."""
        integers = self.integers()
        parts = (integers.q, integers.scale, integers.zero_point, self.activation_scale)
        return _from_parts, (
            *parts,
            self.spelling,
            self.logical_dtype,
            self.transposed,
            self.usage,
            _is_parameter(self),
            self.input_scale,
            self.conv,
        )

    def __repr__(self) -> str:
        return f"QuantizedWeight({self.spelling}, shape={tuple(self.logical_shape)}, kernel={self.kernel_name})"


class CastWeight(TorchAOBaseTensor):  # type: ignore[misc]
    """A float weight stored in a narrower float type; every operator sees it in its logical type.

    Attributes:
        data_: the stored tensor.
        logical_dtype: the float type it stands for.
    """

    tensor_data_names = ["data_"]  # noqa: RUF012
    tensor_attribute_names = ["logical_dtype"]  # noqa: RUF012

    @staticmethod
    def __new__(cls: type[CastWeight], data_: Tensor, logical_dtype: torch.dtype) -> CastWeight:
        """An empty shell of the logical type."""
        return torch.Tensor._make_wrapper_subclass(
            cls, data_.shape, dtype=logical_dtype, device=data_.device, requires_grad=False
        )

    def __init__(self, data_: Tensor, logical_dtype: torch.dtype) -> None:
        super().__init__()
        self.data_ = data_
        self.logical_dtype = logical_dtype

    def dequantize(self, dtype: torch.dtype | None = None) -> Tensor:
        """The weight in its logical type."""
        return self.data_.to(dtype or self.logical_dtype)

    def __deepcopy__(self, memo: dict[int, Any]) -> CastWeight:
        if id(self) not in memo:
            copied = self._apply_fn_to_data(torch.clone)
            memo[id(self)] = torch.nn.Parameter(copied, requires_grad=False) if _is_parameter(self) else copied
        return cast(CastWeight, memo[id(self)])

    def __repr__(self) -> str:
        return f"CastWeight({self.data_.dtype} as {self.logical_dtype}, shape={tuple(self.shape)})"


def _from_parts(
    q: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    activation_scale: Tensor | None,
    spelling: str,
    dtype: torch.dtype,
    transposed: bool,
    usage: Usage,
    parameter: bool,
    input_scale: Tensor | None = None,  # pickles of older versions have neither
    conv: ConvShape | None = None,
) -> Tensor:
    quantized = Quantized(q, scale, zero_point, Scheme.parse(spelling))
    weight = QuantizedWeight.from_integers(
        quantized,
        dtype,
        transposed=transposed,
        usage=usage,
        conv=conv,
        activation_scale=activation_scale,
        input_scale=input_scale,
    )
    return torch.nn.Parameter(weight, requires_grad=False) if parameter else weight


def _is_parameter(tensor: Tensor) -> bool:
    return bool(getattr(tensor, "_is_param", False))


def is_converted_weight(tensor: object) -> bool:
    """Whether a tensor is one of this module's."""
    return isinstance(tensor, (QuantizedWeight, CastWeight))
