"""One table from (scheme, device, dtype) to the kernel that runs a layer there.

A kernel is one subclass of :class:`Kernel`, registered with :func:`register`; :func:`choose` asks them in order of
preference. It says how integers are packed for it and unpacked again, computes the product, and states its rounding
contract: how far its output may lie from the fake-quantized layer's.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

import torch
from torch import Tensor

from qat_plugin.errors import ConversionError
from qat_plugin.kernels.scales import SCALE_DTYPE
from qat_plugin.numerics import Quantized
from qat_plugin.scheme import Scheme

if TYPE_CHECKING:
    from qat_plugin.kernels.weight import QuantizedWeight

Usage = Literal["linear", "embedding", "both", "conv"]

# ||kernel - fake-quantized|| / ||fake-quantized|| that rounding alone explains: sums in another order for float32; one
# rounding of the output, and one of the weight in the fake-quantized layer, for the 16-bit types.
ROUNDING: dict[torch.dtype, float] = {
    torch.float32: 1e-5,
    torch.float64: 1e-5,
    torch.bfloat16: 1e-2,
    torch.float16: 2e-3,
}


@dataclass(frozen=True)
class ConvShape:
    """A convolution's weight: its shape [out_channels, in_channels / groups, *kernel], and its groups."""

    weight: tuple[int, ...]
    groups: int = 1


@dataclass(frozen=True)
class ConvCall:
    """How a convolution is applied: each a number per spatial dimension; padding is with zeros."""

    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]


@dataclass(frozen=True)
class LayerSpec:
    """What a kernel must know of a layer: [out_features, in_features] of its weight and where and how it runs.

    The rows of a convolution's weight are its output channels; ``conv`` says the rest. ``scale_dtype`` is the type that
    holds its scales exactly (:func:`~qat_plugin.kernels.scales.scale_dtype`).
    """

    scheme: Scheme
    out_features: int
    in_features: int
    device: torch.device
    dtype: torch.dtype
    usage: Usage = "linear"
    conv: ConvShape | None = None
    scale_dtype: torch.dtype = SCALE_DTYPE

    @property
    def scales(self) -> int:
        """Number of scales of the weight."""
        if self.scheme.per_tensor:
            return 1
        return self.out_features * (self.in_features // (self.scheme.group_size or self.in_features))


@dataclass(frozen=True)
class Packed:
    """A kernel's own tensors for one weight."""

    data: Tensor
    scale: Tensor
    zero_point: Tensor | None = None


class Kernel(ABC):
    """One way to run quantized layers.

    ``scale_dtypes`` are the types of scales that it computes with exactly.
    """

    name: ClassVar[str]
    scale_dtypes: ClassVar[tuple[torch.dtype, ...]] = (SCALE_DTYPE,)
    convolves: ClassVar[bool] = False
    multiplies: ClassVar[bool] = True

    def takes(self, usage: Usage) -> bool:
        """Whether it is for weights that are read so."""
        return self.convolves if usage == "conv" else self.multiplies

    @abstractmethod
    def serves(self, scheme: Scheme, device: torch.device) -> bool:
        """Whether this kernel is for such schemes on such devices at all."""

    def refusal(self, spec: LayerSpec) -> str | None:
        """Why this kernel, which serves the scheme, cannot run this layer; ``None`` when it can."""
        return None

    @abstractmethod
    def pack(self, quantized: Quantized, spec: LayerSpec) -> Packed:
        """This kernel's layout of the integers."""

    @abstractmethod
    def unpack(self, weight: QuantizedWeight) -> Quantized:
        """The integers back from this kernel's layout, exactly."""

    @abstractmethod
    def linear(self, x: Tensor, weight: QuantizedWeight) -> Tensor:
        """``x W^T`` of [tokens, in_features], tokens >= 1, in the type of ``x``; no bias."""

    def biased(self, x: Tensor, weight: QuantizedWeight, bias: Tensor | None) -> Tensor:
        """:meth:`linear` plus ``bias`` [out_features]; kernels that round once for both override it."""
        y = self.linear(x, weight)
        return y if bias is None else y + bias

    def convolution(self, x: Tensor, weight: QuantizedWeight, bias: Tensor | None, call: ConvCall) -> Tensor:
        """The convolution of [batch, in_channels, *size], batch >= 1, in the type of ``x``.

        Raises:
            ConversionError: unless the kernel overrides it.
        """
        raise ConversionError(f"kernel {self.name} cannot run a convolution")

    def embedding(self, ids: Tensor, weight: QuantizedWeight) -> Tensor:
        """Rows ``ids`` of the weight, [..., in_features].

        Raises:
            ConversionError: unless the kernel overrides it.
        """
        raise ConversionError(f"kernel {self.name} cannot look up rows of an embedding")

    @abstractmethod
    def nbytes(self, spec: LayerSpec) -> int:
        """Bytes that :meth:`pack`'s tensors take."""

    def note(self, spec: LayerSpec) -> str:
        """What a user should know before relying on this kernel's speed; empty when it beats bf16 at every size."""
        return ""

    def tolerance(self, dtype: torch.dtype) -> float:
        """The rounding contract, as a relative norm of the difference to the fake-quantized layer's output."""
        return ROUNDING.get(dtype, ROUNDING[torch.bfloat16])


@dataclass(frozen=True)
class Choice:
    """The kernel chosen for a layer, or why there is none."""

    kernel: str
    note: str
    refusal: str | None = None


_KERNELS: dict[str, Kernel] = {}


def register(kernel: Kernel, *, before: str = "dequantize") -> None:
    """Add a kernel to the table.

    Args:
        kernel: asked for each layer it serves.
        before: the kernel that it is preferred to; by default the portable one, which serves everything. A name that
            is not in the table means last.
    """
    order = [name for name in _KERNELS if name != kernel.name]
    place = order.index(before) if before in order else len(order)
    known = {**_KERNELS, kernel.name: kernel}
    order.insert(place, kernel.name)
    _KERNELS.clear()
    _KERNELS.update({name: known[name] for name in order})


def kernel_named(name: str) -> Kernel:
    """The kernel of that name.

    Raises:
        ConversionError: when no file registered it.
    """
    if name not in _KERNELS:
        raise ConversionError(f"no kernel is called {name!r}; there are {', '.join(_KERNELS)}")
    return _KERNELS[name]


def kernels() -> tuple[Kernel, ...]:
    """All kernels, in order of preference."""
    return tuple(_KERNELS.values())


def scales_refused(kernel: Kernel, spec: LayerSpec) -> str | None:
    """Why a kernel cannot take a weight's scales as they are; ``None`` when it can."""
    if spec.scale_dtype in kernel.scale_dtypes:
        return None
    held = " and ".join(str(dtype).removeprefix("torch.") for dtype in kernel.scale_dtypes)
    return f"takes scales in {held}, which does not hold this weight's exactly"


def choose(spec: LayerSpec) -> Choice:
    """The first kernel that runs the layer on its device; with the reasons of those that nearly would."""
    if spec.scheme.kind == "nf4":
        return Choice("none", "", f"{spec.scheme} is the frozen base of QLoRA fine-tuning, not a conversion target")
    missed: list[str] = []
    for kernel in _KERNELS.values():
        if not kernel.takes(spec.usage) or not kernel.serves(spec.scheme, spec.device):
            continue
        reason = scales_refused(kernel, spec) or kernel.refusal(spec)
        if reason is None:
            note = kernel.note(spec)
            return Choice(kernel.name, f"{note} ({'; '.join(missed)})" if note and missed else note)
        missed.append(f"{kernel.name} {reason}")
    return Choice("none", "", "; ".join(missed) or f"no kernel serves {spec.scheme} on {spec.device.type}")
