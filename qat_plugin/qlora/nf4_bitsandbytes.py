"""bitsandbytes' Params4bit as the backend of NF4 layers; the layer that multiplies is in nf4_product."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Final

import torch
from torch import Tensor, nn

from qat_plugin.errors import CheckpointError
from qat_plugin.qlora import nf4_product
from qat_plugin.qlora.extra import import_extra
from qat_plugin.qlora.pieces import flat_pieces
from qat_plugin.scheme import Scheme

BLOCK: Final = 64
NESTED_BLOCK: Final = 256
FLOATS: Final = (torch.float32, torch.bfloat16, torch.float16)
"""The types that bitsandbytes quantizes from, and dequantizes to."""
REPACKED: Final = (
    "bitsandbytes has repacked this weight for inference (an eval forward on a CPU with AVX512-BF16), and it cannot be "
    "read back: load the model again, and prepare it before any forward pass"
)
_CHUNK: Final = 1 << 20  # numbers quantized at a time: about 30 MB of temporaries


def quantized(weight: Tensor, scheme: Scheme, device: torch.device, compute_dtype: torch.dtype | None) -> nn.Parameter:
    """A frozen Params4bit, equal in all its parts to that of ``bitsandbytes.functional.quantize_4bit``."""
    functional = import_extra("bitsandbytes.functional")
    given = weight.dtype if weight.dtype in FLOATS else torch.float32
    packed = torch.empty((math.ceil(weight.numel() / 2), 1), dtype=torch.uint8, device=device)
    absmax = torch.empty(math.ceil(weight.numel() / BLOCK), dtype=torch.float32, device=device)
    for start, piece in flat_pieces(weight, _CHUNK, device, given):
        codes, scales = torch.ops.bitsandbytes.quantize_4bit.default(piece, BLOCK, "nf4", torch.uint8)
        packed[start // 2 : start // 2 + len(codes)] = codes
        absmax[start // BLOCK : start // BLOCK + len(scales)] = scales
    offset = state2 = None
    if scheme.double_quant:  # over all scales at once: their mean is part of it
        offset = absmax.mean()
        absmax, state2 = functional.quantize_blockwise(absmax - offset, blocksize=NESTED_BLOCK)
    state = functional.QuantState(
        absmax=absmax, shape=weight.shape, dtype=compute_dtype or given, blocksize=BLOCK, offset=offset, state2=state2,
        code=functional.get_4bit_type("nf4", device=device), quant_type="nf4",
    )  # fmt: skip
    # without ``module``: the reference back to the layer serves quantization alone, and a deep copy would keep the
    # original model alive through it
    parameter: nn.Parameter = import_extra("bitsandbytes.nn").Params4bit(
        packed, requires_grad=False, quant_state=state, blocksize=BLOCK, compress_statistics=scheme.double_quant,
        quant_type="nf4", bnb_quantized=True,
    )  # fmt: skip
    return parameter


def values(weight: Any) -> Tensor:
    """What the weight stands for, float32 [out_features, in_features].

    Raises:
        CheckpointError: see :func:`sound_state`.
    """
    return nf4_product.values(weight.data, sound_state(weight), torch.float32)


def state_tensors(weight: Any) -> dict[str, Tensor]:
    """The packed weight and the tensors of its state, by the names that bitsandbytes saves them with.

    Raises:
        CheckpointError: see :func:`sound_state`.
    """
    return {"weight": weight.data, **sound_state(weight).as_dict(packed=True)}


def from_state_tensors(tensors: Mapping[str, Tensor], scheme: Scheme) -> nn.Parameter:
    """The inverse of :func:`state_tensors`.

    Raises:
        CheckpointError: when they are not those of a weight in ``scheme``, or are cut short.
    """
    rest, kind = dict(tensors), import_extra("bitsandbytes.nn").Params4bit
    try:
        packed = rest.pop("weight")
        weight: Any = kind.from_prequantized(packed, rest, requires_grad=False, device=packed.device)
        state = weight.quant_state
        numbers = math.prod(state.shape)
    except (KeyError, ValueError, TypeError, AssertionError, AttributeError) as error:
        raise CheckpointError(
            f"these are not the tensors of an NF4 weight of bitsandbytes: {type(error).__name__}: {error}"
        ) from error
    found = (state.quant_type, state.blocksize, state.nested, packed.dtype, packed.numel(), state.absmax.numel())
    blocks = math.ceil(numbers / BLOCK)
    expected = ("nf4", BLOCK, scheme.double_quant, torch.uint8, math.ceil(numbers / 2), blocks)
    if found != expected or state.dtype not in FLOATS:
        raise CheckpointError(
            f"these are not the tensors of a weight {list(state.shape)} in {scheme}: type, block, double quantization, "
            f"dtype, packed bytes and scales are {found}, and should be {expected}"
        )
    parameter: nn.Parameter = weight
    return parameter


def sound_state(weight: Any) -> Any:
    """The QuantState of a weight whose bytes mean what they did when it was quantized.

    Raises:
        CheckpointError: when it has none, or the weight has been repacked for inference.
    """
    state = getattr(weight, "quant_state", None)
    if state is None:
        raise CheckpointError("the NF4 weight has no scales: it is not loaded yet, or was replaced by a plain tensor")
    if getattr(state, "packing_format_for_cpu", False):
        raise CheckpointError(REPACKED)
    return state
