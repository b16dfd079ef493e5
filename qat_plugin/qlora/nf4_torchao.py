"""torchao's NF4Tensor as the backend of NF4 layers."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import Any, Final

import torch
from torch import Tensor, nn

from qat_plugin.errors import CheckpointError, ConfigError, PrepareError
from qat_plugin.kernels.torchao_import import known_noise_dropped
from qat_plugin.scheme import Scheme

BLOCK: Final = 64
SCALER_BLOCK: Final = 256
TABLE_BYTES: Final = 16 * 4 + 4
_PARTS: Final = ("quantized_data", "quantized_scalers", "quantization_factor", "scaler_mean", "nf4")
_SHAPE: Final = "torchao__nf4"


class TorchaoNF4Linear(nn.Linear):
    """An nn.Linear that holds an NF4Tensor; a cast of the model leaves the quantized weight as it is."""

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> TorchaoNF4Linear:
        weight = self._parameters["weight"]
        if weight is None or not is_nf4_tensor(weight):
            super()._apply(fn, recurse)
            return self
        self._parameters["weight"] = None
        super()._apply(fn, recurse)
        moved = fn(torch.empty(0, dtype=torch.uint8, device=weight.device)).device
        same = weight.device == moved
        self._parameters["weight"] = weight if same else nn.Parameter(weight.data.to(moved), requires_grad=False)
        return self


def is_nf4_tensor(weight: Tensor) -> bool:
    """Whether a weight is an NF4Tensor; does not import torchao."""
    return type(weight).__name__ == "NF4Tensor" and type(weight).__module__.startswith("torchao.")


def quantized(weight: Tensor, scheme: Scheme, device: torch.device) -> nn.Parameter:
    """An NF4Tensor in a frozen Parameter.

    Raises:
        ConfigError: for ``nf4``: torchao always quantizes its scales.
        PrepareError: for a size that torchao does not take.
    """
    if not scheme.double_quant:
        raise ConfigError("backend='torchao' always quantizes its scales: use base='nf4-dq', or backend='bitsandbytes'")
    if weight.numel() % (BLOCK * SCALER_BLOCK):
        raise PrepareError(
            f"the weight has {weight.numel()} numbers, and torchao's NF4 takes multiples of {BLOCK * SCALER_BLOCK}: use "
            "backend='bitsandbytes', or keep the layer in the policy"
        )
    moved = weight.detach().to(device).contiguous()
    if not torch.isfinite(moved).all():
        raise PrepareError("the weight holds NaN or infinity, which has no NF4 form")
    with known_noise_dropped():
        from torchao.quantization import to_nf4
    return nn.Parameter(to_nf4(moved, BLOCK, SCALER_BLOCK), requires_grad=False)


def values(weight: Any) -> Tensor:
    """What the weight stands for, [out_features, in_features]."""
    original: Tensor = weight.data.get_original_weight()
    return original


def state_tensors(weight: Any) -> dict[str, Tensor]:
    """The tensors of an NF4Tensor, and its shape and type as JSON in a uint8 tensor."""
    tensor = weight.data
    meta = {"shape": list(tensor.shape), "dtype": str(tensor.dtype).removeprefix("torch."), "n_blocks": tensor.n_blocks}
    text = torch.tensor(list(json.dumps(meta).encode()), dtype=torch.uint8)
    return {**{name: getattr(tensor, name) for name in _PARTS}, _SHAPE: text}


def from_state_tensors(tensors: Mapping[str, Tensor]) -> nn.Parameter:
    """The inverse of :func:`state_tensors`.

    Raises:
        CheckpointError: when a tensor is missing.
    """
    if missing := sorted({*_PARTS, _SHAPE} - tensors.keys()):
        raise CheckpointError(f"these are not the tensors of torchao's NF4 weight: {', '.join(missing)} missing")
    with known_noise_dropped():
        from torchao.quantization import NF4Tensor
        from torchao.quantization.quantize_.workflows.nf4.nf4_tensor import SubclassTensorArgs
    meta = json.loads(bytes(tensors[_SHAPE].cpu().tolist()))
    shape = torch.Size(meta["shape"])
    device = tensors["quantized_data"].device
    arguments = SubclassTensorArgs(shape, (shape[1], 1), 0, getattr(torch, meta["dtype"]), device, False)
    tensor = NF4Tensor(
        arguments, BLOCK, meta["n_blocks"], SCALER_BLOCK, tensors["quantized_scalers"], tensors["quantization_factor"],
        tensors["scaler_mean"], tensors["quantized_data"], tensors["nf4"],
    )  # fmt: skip
    return nn.Parameter(tensor, requires_grad=False)
