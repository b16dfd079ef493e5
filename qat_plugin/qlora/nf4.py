"""NF4 linear layers (arXiv:2305.14314): quantizing in bounded memory, dequantizing, and taking apart for files.

The numbers are bitsandbytes' own, to the bit: blocks of 64 weights in the flattened [out, in] weight, each with its
absmax; ``nf4-dq`` quantizes the absmax again, 8 bits in blocks of 256. Blocks are independent, so a large weight is
quantized piece by piece. Each backend has a module: ``nf4_bitsandbytes`` (its layers multiply in ``nf4_product``) and
``nf4_torchao``.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from types import ModuleType
from typing import Any, Final, Literal

import torch
from torch import Tensor, nn

from qat_plugin.errors import CheckpointError, ConfigError, PrepareError
from qat_plugin.policy.roles import is_conv1d, is_quantized
from qat_plugin.qlora import nf4_bitsandbytes, nf4_product, nf4_torchao
from qat_plugin.scheme import Scheme

Backend = Literal["bitsandbytes", "torchao"]

BLOCK: Final = 64
NESTED_BLOCK: Final = 256
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
    """Quantize a weight to NF4; beside the result it takes less than 64 MB, whatever the size.

    Args:
        weight: [out_features, in_features], float; it is not changed.
        scheme: ``nf4`` or ``nf4-dq``.
        backend: who holds it.
        device: where to quantize; by default where the weight is.
        compute_dtype: type that bitsandbytes notes as the one to dequantize to; by default the weight's.

    Returns:
        A frozen Parameter: bitsandbytes' ``Params4bit`` (packed, uint8 [ceil(out * in / 2), 1]), equal in all parts to
        ``quantize_4bit(blocksize=64, quant_type="nf4")``; or torchao's ``NF4Tensor`` ([out, in]), equal to ``to_nf4``.

    Raises:
        PrepareError: when the weight is no float matrix, is empty or on the meta device, holds NaN or infinity, or has
            a size that torchao refuses.
        ConfigError: for another scheme, backend or compute_dtype, or a missing package.
    """
    _check_arguments(scheme, backend, compute_dtype)
    if weight.dim() != 2 or not weight.is_floating_point() or is_quantized(weight):
        raise PrepareError(
            f"the weight is {str(weight.dtype).removeprefix('torch.')} {list(weight.shape)}; NF4 takes a float matrix "
            "[out_features, in_features] that is not quantized yet"
        )
    if weight.is_meta or not weight.numel():
        state = "is on the meta device" if weight.is_meta else f"{list(weight.shape)} is empty"
        raise PrepareError(f"the weight {state}: there are no numbers to quantize")
    target = weight.device if device is None else torch.device(device)
    if backend == "torchao":
        return nf4_torchao.quantized(weight.detach(), scheme, target)
    return nf4_bitsandbytes.quantized(weight.detach(), scheme, target, compute_dtype)


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
        compute_dtype: type that bitsandbytes multiplies in; by default that of the input.

    Raises:
        PrepareError: for a layer whose forward is its own, that has hooks, or cannot be quantized.
    """
    if is_nf4(layer):
        raise PrepareError("the layer is NF4 already")
    conv1d = is_conv1d(layer)
    if not isinstance(layer, nn.Linear) and not conv1d:
        raise PrepareError(f"{type(layer).__name__} is no linear layer")
    if _has_own_forward(layer):
        raise PrepareError(
            f"{type(layer).__name__} has a forward of its own, which an NF4 layer would not call: keep it in the policy"
        )
    if any(getattr(layer, name) for name in _HOOKS):
        raise PrepareError("it has hooks, which would be lost with the layer: register them after preparing the model")
    if not isinstance(layer._parameters.get("weight"), Tensor):
        raise PrepareError("its weight is computed by a parametrization; make that permanent first")
    weight: Tensor = layer.weight.detach()  # type: ignore[operator]
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
    """A layer on the meta device, to be filled: ``layer.weight = nf4_weight(...)``.

    Raises:
        ConfigError: as for :func:`nf4_weight`.
    """
    _check_arguments(scheme, backend, compute_dtype)
    if backend == "torchao":
        return nf4_torchao.TorchaoNF4Linear(in_features, out_features, bias=bias, device="meta").requires_grad_(False)
    kind: Any = nf4_product.layer_class()
    layer: nn.Linear = kind(
        in_features, out_features, bias=bias, compute_dtype=compute_dtype, compress_statistics=scheme.double_quant,
        quant_type="nf4", device="meta",
    )  # fmt: skip
    layer.support_avx512bf16_for_cpu = False  # type: ignore[assignment]
    return layer.requires_grad_(False)


def is_nf4(layer: nn.Module) -> bool:
    """Whether a layer's weight is NF4, bitsandbytes' or torchao's; empty layers on the meta device included."""
    weight = layer._parameters.get("weight")
    if weight is None:
        return False
    if hasattr(layer, "quant_storage"):  # a Linear4bit; only a weight that has lost its state names no type
        return bool(getattr(weight, "quant_type", "nf4") == "nf4")
    return isinstance(layer, nf4_torchao.TorchaoNF4Linear) or nf4_torchao.is_nf4_tensor(weight)


@torch.no_grad()
def dequantized(layer: nn.Module, dtype: torch.dtype = torch.float32) -> Tensor:
    """The numbers that an NF4 layer's weight stands for, [out_features, in_features].

    bitsandbytes' products of code and absmax are made in float32; torchao's in the type it was given.

    Raises:
        CheckpointError: when the weight has been repacked for inference or lost its scales, so that its bytes no longer
            mean what they did.
        PrepareError: for a layer that is not NF4.
    """
    if not is_nf4(layer):
        raise PrepareError(f"{type(layer).__name__} is not NF4")
    values: Tensor = _backend_of(layer).values(layer.weight)
    return values.to(dtype)


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
                raise CheckpointError(f"{name or type(module).__name__}: {nf4_bitsandbytes.REPACKED}")
            module.support_avx512bf16_for_cpu = False
            if is_nf4(module):
                module.__class__ = nf4_product.layer_class()
            count += 1
    return count


def nf4_bytes(
    shape: tuple[int, ...], scheme: Scheme, backend: Backend = "bitsandbytes", dtype: torch.dtype | None = None
) -> int:
    """Bytes of a weight in NF4: codes, scales, scales of scales, and the tables that go with them.

    Args:
        shape: [out_features, in_features].
        scheme: ``nf4`` or ``nf4-dq``.
        backend: torchao always quantizes its scales.
        dtype: type that torchao was given, which its scales of scales keep; by default float32.
    """
    weights = math.prod(shape)
    blocks = math.ceil(weights / BLOCK)
    nested = math.ceil(blocks / NESTED_BLOCK)
    if backend == "torchao":
        size = (dtype or torch.float32).itemsize
        return weights // 2 + blocks + size * (nested + 1 + 16)  # factors, the mean, the table of codes
    scales = blocks + 4 * nested + _NESTED_TABLE + _OFFSET if scheme.double_quant else 4 * blocks
    return math.ceil(weights / 2) + scales + _TABLE


def state_tensors(layer: nn.Module) -> dict[str, Tensor]:
    """The tensors that make up an NF4 weight, by names of the backend; :func:`from_state_tensors` is the inverse.

    Raises:
        CheckpointError, PrepareError: as for :func:`dequantized`.
    """
    if not is_nf4(layer):
        raise PrepareError(f"{type(layer).__name__} is not NF4")
    tensors: dict[str, Tensor] = _backend_of(layer).state_tensors(layer.weight)
    return tensors


def from_state_tensors(
    tensors: Mapping[str, Tensor], scheme: Scheme, *, backend: Backend = "bitsandbytes"
) -> nn.Parameter:
    """A quantized weight from the tensors that :func:`state_tensors` gave, on their device.

    Raises:
        CheckpointError: when they are not those of a weight in this scheme, or are cut short.
    """
    _check_arguments(scheme, backend)
    if backend == "torchao":
        return nf4_torchao.from_state_tensors(tensors)
    return nf4_bitsandbytes.from_state_tensors(tensors, scheme)


def _backend_of(layer: nn.Module) -> ModuleType:
    torchaos = isinstance(layer, nf4_torchao.TorchaoNF4Linear) or nf4_torchao.is_nf4_tensor(layer._parameters["weight"])  # type: ignore[arg-type]
    return nf4_torchao if torchaos else nf4_bitsandbytes


def _has_own_forward(layer: nn.Module) -> bool:
    """Whether another forward than nn.Linear's or Conv1D's would be called."""
    definer = next(each for each in type(layer).__mro__ if "forward" in vars(each))
    known = definer is nn.Linear or definer.__module__ == "transformers.pytorch_utils"
    return not known or "forward" in layer.__dict__


def _check_arguments(scheme: Scheme, backend: str, compute_dtype: torch.dtype | None = None) -> None:
    if scheme.kind != "nf4":
        raise ConfigError(f"{scheme} is not nf4 or nf4-dq")
    if backend not in ("bitsandbytes", "torchao"):
        raise ConfigError(f"backend={backend!r} is not one of bitsandbytes, torchao")
    if compute_dtype not in (None, torch.float32, torch.bfloat16, torch.float16):
        raise ConfigError(f"compute_dtype={compute_dtype} is not one of float32, bfloat16, float16")
