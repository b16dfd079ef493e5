"""Our integers as torchao's tensor subclasses, nothing is rounded on the way.

==============================  =========================================================================
scheme                          torchao
==============================  =========================================================================
w8a16, w8a16-gN, -tensor        Int8Tensor
w8a8, w8a8-tensor               Int8Tensor with activations quantized per token
w{8,4,3,2}a16, any groups       IntxUnpackedToInt8Tensor: a byte a weight, whatever its bits
w{8,4,3,2}a8, any groups        IntxUnpackedToInt8Tensor with activations quantized per token
==============================  =========================================================================

Asymmetric integers are stored in two's complement: both they and their zero points are lower by 2^(bits - 1).
``Int4Tensor`` (half a byte a weight) computes only with CUDA and its extra package; torchao's other INT4 layouts lie on
CUDA and XPU alone.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Final

import torch
from torch import Tensor

from qat_plugin.kernels.torchao_import import known_noise_dropped
from qat_plugin.kernels.weight import QuantizedWeight
from qat_plugin.numerics import Quantized
from qat_plugin.scheme import Scheme

# The member of torchao's enum as the string that it is equal to: its safetensors reader knows no such enum (0.18).
_DYNAMIC: Final = "int8_asym_per_token"


def refusal_of(scheme: Scheme) -> tuple[str, str]:
    """Why torchao has no tensor for a scheme, and the nearest spelling that it has; empty strings where it has one."""
    if scheme.static:  # Int8Tensor itself has act_quant_scale
        reason = "transformers (5.23) reads no calibrated activation scale back from torchao's files"
        return reason, str(replace(scheme, static=False))
    if scheme.per_tensor and not uses_int8_tensor(scheme):
        return "torchao's configurations know no one scale for such a weight", str(replace(scheme, per_tensor=False))
    return "", ""


def uses_int8_tensor(scheme: Scheme) -> bool:
    """Whether a scheme is held by ``Int8Tensor``."""
    if scheme.weight_bits != 8 or not scheme.symmetric:
        return False  # its products ignore zero points
    return scheme.group_size is None or not scheme.quantizes_activations


def tensor_of(held: Quantized, dtype: torch.dtype) -> Any:
    """The torchao tensor that holds these integers.

    Args:
        held: [out_features, in_features]; on the meta device its layout alone.
        dtype: the float type of the layer.
    """
    with known_noise_dropped():
        from torchao.quantization import Int8Tensor, IntxUnpackedToInt8Tensor

    block = [held.q.shape[axis] // held.scale.shape[axis] for axis in (0, 1)]
    if uses_int8_tensor(held.scheme):
        return Int8Tensor(held.q, held.scale, block, dtype, act_quant_kwargs=_activations(held.scheme))
    bits, q, zero_point = held.scheme.weight_bits, held.q, held.zero_point
    if zero_point is None:
        zero_point = torch.zeros_like(held.scale, dtype=torch.int8)
    else:
        q, zero_point = _lowered(q, bits), _lowered(zero_point, bits)
    activation = _DYNAMIC if held.scheme.quantizes_activations else None
    return IntxUnpackedToInt8Tensor(
        q, held.scale.to(dtype), zero_point, getattr(torch, f"int{bits}"), tuple(block), dtype, activation
    )


def _lowered(unsigned: Tensor, bits: int) -> Tensor:
    return (unsigned.to(torch.int16) - (1 << (bits - 1))).to(torch.int8)


def raised(signed: Tensor, bits: int) -> Tensor:
    """Two's complement integers of ``bits`` bits as the unsigned ones that asymmetric schemes here use, in int16.

    A file can hold integers beyond its bits: these stay beyond, and are negative or too large.
    """
    return signed.to(torch.int16) + (1 << (bits - 1))


def rounded_input(x: Tensor, weight: QuantizedWeight) -> Tensor:
    """The numbers that torchao makes of an activation, per token, -128 to 127.

    Args:
        x: [..., features].
        weight: of the layer: ``Int8Tensor`` has symmetric activations (absmax / 127.5), the other zero points.
    """
    from torchao.quantization import MappingType
    from torchao.quantization.quant_primitives import choose_qparams_affine, dequantize_affine, quantize_affine

    block = [1] * (x.dim() - 1) + [x.shape[-1]]
    if uses_int8_tensor(weight.scheme):
        eps = torch.finfo(torch.float32).eps
        scale, zero_point = choose_qparams_affine(
            x, MappingType.SYMMETRIC, block, torch.int8, -128, 127, eps, torch.float32, torch.int8, keepdim=True
        )
    else:
        scale, zero_point = choose_qparams_affine(
            x, MappingType.ASYMMETRIC, block, torch.int8, -128, 127, zero_point_dtype=torch.int8
        )
    q = quantize_affine(x, block, scale, zero_point, torch.int8, -128, 127)
    numbers: Tensor = dequantize_affine(q, block, scale, zero_point, torch.int8, -128, 127, output_dtype=x.dtype)
    return numbers


def _activations(scheme: Scheme) -> Any:
    from torchao.quantization import PerRow
    from torchao.quantization.quantize_.workflows import QuantizeTensorToInt8Kwargs

    return QuantizeTensorToInt8Kwargs(granularity=PerRow()) if scheme.quantizes_activations else None


def config_of(scheme: Scheme) -> Any:
    """torchao's configuration of a scheme, as ``quantize_`` takes it."""
    from torchao.quantization import (
        Int8DynamicActivationInt8WeightConfig,
        Int8DynamicActivationIntxWeightConfig,
        Int8WeightOnlyConfig,
        IntxWeightOnlyConfig,
        MappingType,
        PerAxis,
        PerGroup,
        PerRow,
        PerTensor,
    )

    mapping = MappingType.SYMMETRIC if scheme.symmetric else MappingType.ASYMMETRIC
    rows = PerTensor() if scheme.per_tensor else PerRow()
    if uses_int8_tensor(scheme):
        if scheme.quantizes_activations:
            return Int8DynamicActivationInt8WeightConfig(granularity=[PerRow(), rows])
        return Int8WeightOnlyConfig(granularity=rows if scheme.group_size is None else PerGroup(scheme.group_size))
    bits = getattr(torch, f"int{scheme.weight_bits}")
    axis = PerAxis(0) if scheme.group_size is None else PerGroup(scheme.group_size)
    if scheme.quantizes_activations:
        return Int8DynamicActivationIntxWeightConfig(
            weight_dtype=bits, weight_granularity=axis, weight_mapping_type=mapping
        )
    return IntxWeightOnlyConfig(weight_dtype=bits, granularity=axis, mapping_type=mapping)
