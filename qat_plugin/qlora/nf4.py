"""NF4 linear layers (arXiv:2305.14314): quantizing in bounded memory, dequantizing, and taking apart for files.

The numbers are bitsandbytes' own, to the bit: blocks of 64 weights in the flattened [out, in] weight, each with its
absmax; ``nf4-dq`` quantizes the absmax again, 8 bits in blocks of 256. Blocks are independent, so a large weight is
quantized some rows at a time. torchao's NF4Tensor is the other backend (:mod:`qat_plugin.qlora.nf4_torchao`).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Final, Literal

import torch
from torch import Tensor, nn

from qat_plugin.errors import CheckpointError, ConfigError, PrepareError
from qat_plugin.policy.roles import is_conv1d, is_quantized
from qat_plugin.qlora import nf4_product, nf4_torchao
from qat_plugin.qlora.extra import import_extra
from qat_plugin.scheme import Scheme

Backend = Literal["bitsandbytes", "torchao"]

BLOCK: Final = 64
NESTED_BLOCK: Final = 256
_CHUNK: Final = 1 << 20  # weights quantized at a time: about 25 MB of temporaries
_TABLE, _NESTED_TABLE, _OFFSET = 16 * 4, 256 * 4, 4
_HOOKS: Final = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


@torch.no_grad()
def nf4_weight(
    weight: Tensor,
    scheme: Scheme,
    *,
    backend: Backend = "bitsandbytes",
    device: torch.device | str | None = None,
    compute_dtype: torch.dtype | None = None,
) -> nn.Parameter:
    """Quantize a weight to NF4.

    Args:
        weight: [out_features, in_features], float; it is not changed.
        scheme: ``nf4`` or ``nf4-dq``.
        backend: who holds it.
        device: where to quantize; by default where the weight is.
        compute_dtype: type that the layer will multiply in and dequantizes to; by default the weight's.

    Returns:
        A frozen Parameter: bitsandbytes' ``Params4bit`` (packed, uint8 [ceil(out * in / 2), 1]) or torchao's
        ``NF4Tensor`` ([out, in]).

    Raises:
        PrepareError: when the weight is no float matrix, holds NaN or infinity, or has a size that torchao refuses.
        ConfigError: for another scheme or backend, or a missing package.
    """
    _check_arguments(scheme, backend)
    if weight.dim() != 2 or not weight.is_floating_point() or is_quantized(weight):
        raise PrepareError(
            f"the weight is {str(weight.dtype).removeprefix('torch.')} {list(weight.shape)}; NF4 takes a float matrix "
            "[out_features, in_features] that is not quantized yet"
        )
    target = weight.device if device is None else torch.device(device)
    if backend == "torchao":
        return nf4_torchao.quantized(weight, scheme, target)
    functional = import_extra("bitsandbytes.functional")
    parameter_class = import_extra("bitsandbytes.nn").Params4bit
    given = weight.dtype if weight.dtype in (torch.float16, torch.bfloat16, torch.float32) else torch.float32
    packed, absmax = _blocks(weight, target, given)
    offset = state2 = None
    if scheme.double_quant:
        offset = absmax.mean()
        absmax, state2 = functional.quantize_blockwise(absmax - offset, blocksize=NESTED_BLOCK)
    state = functional.QuantState(
        absmax=absmax, shape=weight.shape, dtype=compute_dtype or given, blocksize=BLOCK,
        code=functional.get_4bit_type("nf4", device=target), quant_type="nf4", offset=offset, state2=state2,
    )  # fmt: skip
    parameter: nn.Parameter = parameter_class(
        packed, requires_grad=False, quant_state=state, blocksize=BLOCK, compress_statistics=scheme.double_quant,
        quant_type="nf4", bnb_quantized=True,
    )  # fmt: skip
    return parameter


def nf4_linear(
    layer: nn.Module,
    scheme: Scheme,
    *,
    backend: Backend = "bitsandbytes",
    compute_dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
) -> nn.Linear:
    """A layer that computes what ``layer`` does, its weight in NF4.

    Args:
        layer: nn.Linear, or transformers' Conv1D, whose weight is transposed; its bias Parameter is taken over.
        scheme, backend, device: as for :func:`nf4_weight`.
        compute_dtype: type to multiply in; by default that of the first input.

    Raises:
        PrepareError: for a layer whose forward is its own, that has hooks, or cannot be quantized.
    """
    conv1d = is_conv1d(layer)
    if is_nf4(layer):
        raise PrepareError("the layer is NF4 already")
    if not isinstance(layer, nn.Linear) and not conv1d:
        raise PrepareError(f"{type(layer).__name__} is no linear layer")
    if not conv1d and (type(layer).forward is not nn.Linear.forward or "forward" in layer.__dict__):
        raise PrepareError(
            f"{type(layer).__name__} has a forward of its own, which an NF4 layer would not call: keep it in the policy"
        )
    if any(getattr(layer, name) for name in _HOOKS):
        raise PrepareError("it has hooks, which would be lost with the layer: register them after preparing the model")
    if not isinstance(layer._parameters.get("weight"), Tensor):
        raise PrepareError("its weight is computed by a parametrization; make that permanent first")
    weight: Tensor = layer.weight.detach()  # type: ignore[operator, union-attr, assignment]
    weight = weight.t() if conv1d else weight
    bias: nn.Parameter | None = layer.bias  # type: ignore[assignment]
    linear = empty_nf4_linear(
        weight.shape[1], weight.shape[0], bias=False, scheme=scheme, backend=backend, compute_dtype=compute_dtype
    )
    linear.weight = nf4_weight(weight, scheme, backend=backend, device=device, compute_dtype=compute_dtype)
    if bias is not None:
        bias.requires_grad_(False)
        if device is not None:
            bias.data = bias.data.to(device)
        linear.bias = bias
    return linear.train(layer.training)


def empty_nf4_linear(
    in_features: int,
    out_features: int,
    *,
    bias: bool,
    scheme: Scheme,
    backend: Backend = "bitsandbytes",
    compute_dtype: torch.dtype | None = None,
) -> nn.Linear:
    """A layer on the meta device, to be filled: ``layer.weight = nf4_weight(...)``."""
    _check_arguments(scheme, backend)
    if backend == "torchao":
        return nf4_torchao.TorchaoNF4Linear(in_features, out_features, bias=bias, device="meta")
    layer: nn.Linear = nf4_product.layer_class()(
        in_features, out_features, bias=bias, compute_dtype=compute_dtype, compress_statistics=scheme.double_quant,
        quant_type="nf4", device="meta",
    )  # fmt: skip
    layer.support_avx512bf16_for_cpu = False  # type: ignore[assignment]
    return layer.requires_grad_(False)


def is_nf4(layer: nn.Module) -> bool:
    """Whether a layer's weight is NF4, bitsandbytes' or torchao's, empty ones on the meta device included."""
    weight = layer._parameters.get("weight")
    return getattr(weight, "quant_type", None) == "nf4" or isinstance(layer, nf4_torchao.TorchaoNF4Linear) or (
        weight is not None and nf4_torchao.is_nf4_tensor(weight)
    )  # fmt: skip


@torch.no_grad()
def dequantized(layer: nn.Module, dtype: torch.dtype = torch.float32) -> Tensor:
    """The numbers that an NF4 layer's weight stands for, [out_features, in_features]; products are made in float32.

    Raises:
        CheckpointError: when the weight has been repacked for inference or lost its scales, so that its bytes no longer
            mean what they did.
        PrepareError: for a layer that is not NF4.
    """
    if not is_nf4(layer):
        raise PrepareError(f"{type(layer).__name__} is not NF4")
    weight: Any = layer.weight
    if nf4_torchao.is_nf4_tensor(weight):
        return nf4_torchao.values(weight).to(dtype)
    return nf4_product.values(weight.data, _sound_state(layer), torch.float32).to(dtype)


def guard(model: nn.Module) -> int:
    """Keep bitsandbytes on CPUs with AVX512-BF16 from repacking weights in an eval forward, which ruins training, and
    let NF4 layers that others made (transformers) compute as ours do.

    Returns:
        How many layers were guarded.

    Raises:
        CheckpointError: when a layer has been repacked already; its weight is lost.
    """
    count = 0
    for name, module in model.named_modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            if getattr(getattr(module.weight, "quant_state", None), "packing_format_for_cpu", False):
                raise CheckpointError(f"{name}: {_REPACKED}")
            module.support_avx512bf16_for_cpu = False  # type: ignore[assignment]
            if is_nf4(module):
                module.__class__ = nf4_product.layer_class()
            count += 1
    return count


def nf4_bytes(shape: tuple[int, ...], scheme: Scheme, backend: Backend = "bitsandbytes") -> int:
    """Bytes of a weight in NF4: codes, scales, scales of scales, and the tables that go with them.

    Args:
        shape: [out_features, in_features].
        scheme: ``nf4`` or ``nf4-dq``.
        backend: torchao always quantizes its scales.
    """
    weights = math.prod(shape)
    blocks = math.ceil(weights / BLOCK)
    nested = math.ceil(blocks / NESTED_BLOCK)
    if backend == "torchao":
        return weights // 2 + blocks + 4 * nested + nf4_torchao.TABLE_BYTES
    scales = blocks + 4 * nested + _NESTED_TABLE + _OFFSET if scheme.double_quant else 4 * blocks
    return math.ceil(weights / 2) + scales + _TABLE


def state_tensors(layer: nn.Module) -> dict[str, Tensor]:
    """The tensors that make up an NF4 weight, by names of the backend; :func:`from_state_tensors` is the inverse.

    Raises:
        CheckpointError: as for :func:`dequantized`.
    """
    weight: Any = layer.weight
    if nf4_torchao.is_nf4_tensor(weight):
        return nf4_torchao.state_tensors(weight)
    return {"weight": weight.data, **_sound_state(layer).as_dict(packed=True)}


def from_state_tensors(
    tensors: Mapping[str, Tensor], scheme: Scheme, *, backend: Backend = "bitsandbytes"
) -> nn.Parameter:
    """A quantized weight from the tensors that :func:`state_tensors` gave, on their device.

    Raises:
        CheckpointError: when they are not those of an NF4 weight.
    """
    _check_arguments(scheme, backend)
    if backend == "torchao":
        return nf4_torchao.from_state_tensors(tensors)
    rest = dict(tensors)
    try:
        packed = rest.pop("weight")
        parameter: nn.Parameter = import_extra("bitsandbytes.nn").Params4bit.from_prequantized(
            packed, rest, requires_grad=False, device=packed.device
        )
    except (KeyError, ValueError, AssertionError, AttributeError) as error:
        raise CheckpointError(f"these are not the tensors of an NF4 weight: {error}") from error
    return parameter


_REPACKED: Final = (
    "bitsandbytes has repacked this weight for inference (an eval forward on a CPU with AVX512-BF16), and it cannot be "
    "read back: load the model again, and prepare it before any forward pass"
)


def _sound_state(layer: nn.Module) -> Any:
    state = getattr(layer.weight, "quant_state", None)
    if state is None:
        raise CheckpointError("the NF4 weight has lost its scales (it was replaced by a plain tensor, or is not loaded)")
    if getattr(state, "packing_format_for_cpu", False):
        raise CheckpointError(_REPACKED)
    return state


def _blocks(weight: Tensor, device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Packed codes uint8 [ceil(n / 2), 1] and absmax float32 [ceil(n / 64)], some rows at a time."""
    rows, columns = weight.shape
    step = BLOCK // math.gcd(columns, BLOCK)  # rows that fill whole blocks
    step *= max(1, _CHUNK // max(1, columns * step))
    packed = torch.empty((math.ceil(weight.numel() / 2), 1), dtype=torch.uint8, device=device)
    absmax = torch.empty(math.ceil(weight.numel() / BLOCK), dtype=torch.float32, device=device)
    for start in range(0, rows, step):
        part = weight[start : start + step].to(device, dtype).contiguous()
        if not torch.isfinite(part).all():
            raise PrepareError("the weight holds NaN or infinity, which has no NF4 form")
        codes, scales = torch.ops.bitsandbytes.quantize_4bit.default(part, BLOCK, "nf4", torch.uint8)
        first = start * columns
        packed[first // 2 : first // 2 + len(codes)] = codes
        absmax[first // BLOCK : first // BLOCK + len(scales)] = scales
    return packed, absmax


def _check_arguments(scheme: Scheme, backend: str) -> None:
    if scheme.kind != "nf4":
        raise ConfigError(f"{scheme} is not nf4 or nf4-dq")
    if backend not in ("bitsandbytes", "torchao"):
        raise ConfigError(f"backend={backend!r} is not one of bitsandbytes, torchao")
