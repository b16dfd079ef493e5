"""INT8 convolutions of x86 CPUs: oneDNN's u8 x s8 convolution on activations quantized per tensor.

The activation is rounded to bytes with zero point 128 in one pass, which pads with that byte; the products are summed
in integers, and one multiplication by the two scales and the bias make the output, channels last. oneDNN keeps one
layout of the weight whatever the batch, stride, padding or dilation.

The operators are called as they are, rather than through PT2E's export and x86 lowering: the module stays the user's,
with its names and its ``train()`` and ``eval()``, batches may vary, and it is faster. The net of
``benchmarks/int8_cnn.py`` (32 channels, batch 32 of 28 x 28, CPU time of one thread of a Zen 4) takes 13.8 ms so,
11.7 ms in bf16, and 18.3 ms lowered by PT2E with freezing; eager fp32 takes 36.6 ms, bf16 18.8 ms.
"""

from __future__ import annotations

import functools
import math
import platform
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from qat_plugin.kernels.scales import ANY_SCALES
from qat_plugin.kernels.table import ConvCall, ConvShape, Kernel, LayerSpec, Packed
from qat_plugin.native import available
from qat_plugin.numerics import Quantized, quantize_activation
from qat_plugin.scheme import Scheme

if TYPE_CHECKING:
    from qat_plugin.kernels.weight import QuantizedWeight

_ZERO_POINT = 128
# Products of one output number below which rounding the input costs what bytes save. One thread of a Zen 4, batch 32 of
# 28 x 28, rounding included, against bf16 as it comes and channels last: depthwise 3 x 3 0.9 ms to 1.6 and 0.5; 64 to
# 64 channels by 1 x 1 1.0 to 2.0 and 1.0; 32 to 32 by 3 x 3 1.5 to 2.5 and 2.2; 64 to 64 by 3 x 3 5.1 to 9.1 and 8.0.
_WORTH_ROUNDING = 64


def to_bytes(x: Tensor, scale: Tensor) -> Tensor:
    """An activation as uint8 integers with zero point 128, in the memory layout of ``x``."""
    if available():
        u: Tensor = torch.ops.qat_plugin_native.to_bytes(x, scale)
        return u
    return (quantize_activation(x, scale)[0] + _ZERO_POINT).to(torch.uint8)


def int8_convolution(
    x: Tensor, packed: Tensor, weight_scale: Tensor, activation_scale: Tensor, bias: Tensor | None,
    stride: list[int], padding: list[int], dilation: list[int], groups: int,
) -> Tensor:  # fmt: skip
    """The convolution of INT8 by INT8.

    Args:
        x: [batch, channels, *size], any float type.
        packed: oneDNN's layout of the int8 weight.
        weight_scale: float32 [out_channels].
        activation_scale: float32 scalar.
        bias: [out_channels] or ``None``.
        stride, padding, dilation, groups: as in F.conv2d.
    """
    narrow = x.dtype is torch.bfloat16
    y: Tensor = torch.ops.onednn.qconv_pointwise(
        to_bytes(x, activation_scale), float(activation_scale), _ZERO_POINT, packed, weight_scale,
        torch.zeros(weight_scale.numel(), dtype=torch.int32), None if bias is None else bias.float(),
        stride, padding, dilation, groups, 1.0, 0, torch.bfloat16 if narrow else torch.float32, "none", [], "",
    )  # fmt: skip
    return y if y.dtype == x.dtype else y.to(x.dtype)


# Inductor cannot lower the raw oneDNN operator; eager calls skip the custom operator's dispatch.
_compiled = torch.library.custom_op("qat_plugin::int8_convolution", int8_convolution, mutates_args=())


@_compiled.register_fake
def _(
    x: Tensor, packed: Tensor, weight_scale: Tensor, activation_scale: Tensor, bias: Tensor | None,
    stride: list[int], padding: list[int], dilation: list[int], groups: int,
) -> Tensor:  # fmt: skip
    kernel = packed.shape[-len(stride) :]
    size = [
        (n + 2 * p - d * (k - 1) - 1) // s + 1
        for n, p, d, k, s in zip(x.shape[2:], padding, dilation, kernel, stride, strict=True)
    ]
    y = x.new_empty(x.shape[0], weight_scale.numel(), *size)
    return y.contiguous(memory_format=torch.channels_last) if y.dim() == 4 else y


class OneDnnConv(Kernel):
    """w8a8-static convolutions in one and two dimensions, with groups, strides and dilation."""

    name = "onednn-conv"
    scale_dtypes = ANY_SCALES
    convolves, multiplies = True, False

    def serves(self, scheme: Scheme, device: torch.device) -> bool:
        """INT8 weights by calibrated INT8 activations on CPUs."""
        return device.type == "cpu" and scheme.weight_bits == 8 and scheme.static

    def refusal(self, spec: LayerSpec) -> str | None:
        """Symmetric convolutions, a scale per channel or tensor, on x86."""
        if not torch.backends.mkldnn.is_available() or platform.machine().lower() not in ("x86_64", "amd64"):
            return "needs an x86 CPU with oneDNN"
        if not spec.scheme.symmetric or spec.scheme.granularity == "group":
            return "needs symmetric weights with a scale per channel or tensor"
        return None

    def note(self, spec: LayerSpec) -> str:
        """Where the product is small, rounding its input costs what bytes save."""
        return "no faster than bf16 at this small size" if spec.in_features < _WORTH_ROUNDING else ""

    def nbytes(self, spec: LayerSpec) -> int:
        """oneDNN's blocked layout, padding and compensations included, and the scales."""
        assert spec.conv is not None
        return _packed_bytes(spec.conv) + 4 * spec.out_features

    def pack(self, quantized: Quantized, spec: LayerSpec) -> Packed:
        """oneDNN's layout and a float32 scale per channel."""
        assert spec.conv is not None
        scale = quantized.scale.reshape(-1).expand(spec.out_features).contiguous()
        return Packed(_prepack(quantized.q.reshape(spec.conv.weight), scale, spec.conv.groups), scale)

    def unpack(self, weight: QuantizedWeight) -> Quantized:
        """Back from the blocked layout."""
        q = weight.data_.to_dense().reshape(weight.out_features, -1)
        scale = weight.scale[:1].reshape(1, 1) if weight.scheme.per_tensor else weight.scale.reshape(-1, 1)
        return Quantized(q, scale, None, weight.scheme)

    def linear(self, x: Tensor, weight: QuantizedWeight) -> Tensor:
        """A convolution's weight multiplies no rows."""
        raise NotImplementedError(f"{self.name} runs convolutions only")

    def convolution(self, x: Tensor, weight: QuantizedWeight, bias: Tensor | None, call: ConvCall) -> Tensor:
        """Integer products, exact; then one multiplication and one addition in float32."""
        assert weight.activation_scale is not None
        product = _compiled if torch.compiler.is_compiling() else int8_convolution
        y: Tensor = product(
            x, weight.data_, weight.scale, weight.activation_scale, bias,
            list(call.stride), list(call.padding), list(call.dilation), weight.groups,
        )  # fmt: skip
        return y


def _prepack(q: Tensor, scale: Tensor, groups: int) -> Tensor:
    ones = [1] * (q.dim() - 2)
    packed: Tensor = torch.ops.onednn.qconv_prepack(
        q.contiguous(), scale, 1.0, _ZERO_POINT, ones, [0] * len(ones), ones, groups, None
    )
    return packed


@functools.lru_cache(maxsize=256)
def _packed_bytes(conv: ConvShape) -> int:
    """Asked of oneDNN itself: how it pads depends on the instruction set."""
    if math.prod(conv.weight) == 0:
        return 0
    q = torch.zeros(conv.weight, dtype=torch.int8, device="cpu")
    packed = _prepack(q, torch.ones(conv.weight[0], device="cpu"), conv.groups)
    return int(torch.ops.mkldnn._nbytes(packed))
