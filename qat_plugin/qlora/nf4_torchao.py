"""torchao's NF4Tensor as the backend of NF4 layers."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import Any, Final

import torch
from torch import Tensor, nn

from qat_plugin.errors import CheckpointError, ConfigError, PrepareError
from qat_plugin.kernels.torchao_import import known_noise_dropped
from qat_plugin.qlora.pieces import flat_pieces
from qat_plugin.scheme import Scheme

BLOCK: Final = 64
SCALER_BLOCK: Final = 256
_CHUNK: Final = 1 << 18  # numbers quantized at a time: torchao compares each with all 16 codes, 40 MB in float32
_PARTS: Final = ("quantized_data", "quantized_scalers", "quantization_factor", "scaler_mean", "nf4")
_META: Final = "torchao__nf4"


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
    """A frozen NF4Tensor, equal in all its parts to that of ``torchao.quantization.to_nf4``.

    Raises:
        ConfigError: for ``nf4``: torchao always quantizes its scales.
        PrepareError: for a size that torchao does not take.
    """
    if not scheme.double_quant:
        raise ConfigError("backend='torchao' always quantizes its scales: use base='nf4-dq', or backend='bitsandbytes'")
    if weight.numel() % (BLOCK * SCALER_BLOCK):
        raise PrepareError(
            f"the weight has {weight.numel()} numbers, and torchao's NF4 takes multiples of {BLOCK * SCALER_BLOCK}: "
            "use backend='bitsandbytes', or keep the layer in the policy"
        )
    nf4_tensor, absmax_of = _torchao("NF4Tensor"), _torchao("get_block_absmax")
    smallest = torch.arange(BLOCK * SCALER_BLOCK, device=device).to(weight.dtype)
    table: Tensor = nf4_tensor.from_tensor(smallest, BLOCK, SCALER_BLOCK).nf4  # the 16 values, in this type
    codes = torch.empty(weight.numel() // 2, dtype=torch.uint8, device=device)
    absmax = torch.empty(weight.numel() // BLOCK, dtype=weight.dtype, device=device)
    for start, piece in flat_pieces(weight, _CHUNK, device, weight.dtype):
        blocks = slice(start // BLOCK, (start + len(piece)) // BLOCK)
        absmax[blocks] = absmax_of(piece, BLOCK)
        codes[start // 2 : (start + len(piece)) // 2] = nf4_tensor.convert_to_norm_float_weight(
            piece, len(piece) // BLOCK, BLOCK, table
        )
    # absmax is its own absmax, in blocks of one
    scalers, factor, mean = nf4_tensor.double_quantize_scalers(absmax, 1, SCALER_BLOCK)
    parts = {"quantized_data": codes, "quantized_scalers": scalers, "quantization_factor": factor}
    return _assembled({**parts, "scaler_mean": mean, "nf4": table}, weight.shape, weight.dtype)


def values(weight: Any) -> Tensor:
    """What the weight stands for, [out_features, in_features], in its own type: torchao multiplies in no other."""
    original: Tensor = weight.data.get_original_weight()
    return original


def state_tensors(weight: Any) -> dict[str, Tensor]:
    """The tensors of an NF4Tensor, and its shape and type as JSON in a uint8 tensor."""
    tensor = weight.data
    meta = {"shape": list(tensor.shape), "dtype": str(tensor.dtype).removeprefix("torch.")}
    text = torch.tensor(list(json.dumps(meta).encode()), dtype=torch.uint8)
    return {**{name: getattr(tensor, name) for name in _PARTS}, _META: text}


def from_state_tensors(tensors: Mapping[str, Tensor]) -> nn.Parameter:
    """The inverse of :func:`state_tensors`.

    Raises:
        CheckpointError: when a tensor is missing, or of another size than the shape asks for.
    """
    if missing := sorted({*_PARTS, _META} - tensors.keys()):
        raise CheckpointError(f"these are not the tensors of torchao's NF4 weight: {', '.join(missing)} missing")
    try:
        meta = json.loads(bytes(tensors[_META].cpu().tolist()))
        shape, dtype = torch.Size(meta["shape"]), getattr(torch, meta["dtype"])
    except (KeyError, ValueError, TypeError, AttributeError) as error:
        raise CheckpointError(f"the shape and type of torchao's NF4 weight cannot be read: {error}") from error
    blocks = shape.numel() // BLOCK
    expected = {"quantized_data": shape.numel() // 2, "quantized_scalers": blocks}
    expected |= {"quantization_factor": blocks // SCALER_BLOCK, "scaler_mean": 1, "nf4": 16}
    if wrong := [name for name, size in expected.items() if tensors[name].numel() != size]:
        sizes = ", ".join(f"{name} has {tensors[name].numel()} numbers, not {expected[name]}" for name in wrong)
        raise CheckpointError(f"these are not the tensors of a weight {list(shape)} in torchao's NF4: {sizes}")
    return _assembled(tensors, shape, dtype)


def _assembled(parts: Mapping[str, Tensor], shape: torch.Size, dtype: torch.dtype) -> nn.Parameter:
    device = parts["quantized_data"].device
    arguments = _torchao("SubclassTensorArgs")(shape, (shape[1], 1), 0, dtype, device, False)
    tensor = _torchao("NF4Tensor")(
        arguments, BLOCK, shape.numel() // BLOCK, SCALER_BLOCK, parts["quantized_scalers"],
        parts["quantization_factor"], parts["scaler_mean"], parts["quantized_data"], parts["nf4"],
    )  # fmt: skip
    return nn.Parameter(tensor, requires_grad=False)


def _torchao(name: str) -> Any:
    with known_noise_dropped():
        from torchao.quantization.quantize_.workflows.nf4 import nf4_tensor
    return getattr(nf4_tensor, name)
