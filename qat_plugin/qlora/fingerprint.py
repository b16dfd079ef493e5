"""Content sums of tensors and of a frozen base: quick, on the tensor's own device, in bounded memory.

A sum is 64 bits. The tensor's bytes as 32-bit words x_i make chunks c of 2^20 words; with fixed odd multipliers m_i,
``h_c = h_(c-1) * p + sum_i x_i * m_i mod 2^64``: the place counts within a chunk by m_i, and among chunks by powers
of p. Dtype and shape count too. It tells accidental changes, of one bit or of an order; it is no protection against
somebody who wants to deceive.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Final

import torch
from torch import Tensor, nn

from qat_plugin.errors import CheckpointError
from qat_plugin.policy import clean_name
from qat_plugin.qlora.nf4 import is_nf4, state_tensors

_CHUNK: Final = 1 << 19  # words at a time: 12 MB of int64 temporaries
_PRIME: Final = 0x100000001B3  # of FNV-1a, 64 bits
_MASK: Final = (1 << 64) - 1
_multipliers: dict[torch.device, Tensor] = {}


@torch.no_grad()
def tensor_sum(tensor: Tensor) -> str:
    """16 hexadecimal digits that depend on every byte of a tensor and its place, and on its dtype and shape."""
    flat = tensor.detach().contiguous().reshape(-1)
    if flat.stride(-1) != 1:  # a single number may keep any stride
        flat = flat.clone(memory_format=torch.contiguous_format)
    flat = flat.view(torch.uint8)
    rest = flat.numel() % 4
    words = flat[: flat.numel() - rest]
    if words.storage_offset() % 4:
        words = words.clone()
    words = words.view(torch.int32)
    multipliers = _multipliers_on(tensor.device)
    total = 0
    for start in range(0, len(words), _CHUNK):
        part = words[start : start + _CHUNK].long()
        total = (total * _PRIME + int((part * multipliers[: len(part)]).sum().item())) & _MASK  # both wrap around
    for byte in flat[flat.numel() - rest :].tolist():
        total = total * _PRIME + byte + 1
    head = f"{tensor.dtype} {list(tensor.shape)} {total & _MASK}"
    return hashlib.sha256(head.encode()).hexdigest()[:16]


def fingerprint(model: nn.Module) -> str:
    """sha256 over name, dtype, shape and content of all that is frozen: parameters and saved buffers.

    NF4 weights count with their scales. Parameters that train, and the quantizers of fake quantization, do not count.
    Names are without wrappers, so that a model has one fingerprint before and after adapters are put in.
    """
    digest = hashlib.sha256()
    entries: dict[str, str] = {}
    for path, module in model.named_modules():
        if ".fake_quantizer" in path or ".lora_" in f".{path}":
            continue
        quantized = is_nf4(module)
        if quantized:
            for name, part in state_tensors(module).items():
                entries[f"{path}.{name}"] = tensor_sum(part)
        for name, parameter in module._parameters.items():
            if parameter is not None and not parameter.requires_grad and not (quantized and name == "weight"):
                entries[f"{path}.{name}"] = tensor_sum(parameter)
        for name, buffer in module._buffers.items():
            if buffer is not None and name not in module._non_persistent_buffers_set:
                entries[f"{path}.{name}"] = tensor_sum(buffer)
    for name in sorted(entries, key=clean_name):
        digest.update(f"{clean_name(name)} {entries[name]}\n".encode())
    return digest.hexdigest()


def weight_sums(layers: Mapping[str, nn.Module]) -> tuple[str, dict[str, str]]:
    """Float type of the first layer's weight, and name -> :func:`tensor_sum` of the weights of that type."""
    weights = {name: layer._parameters["weight"] for name, layer in layers.items() if not is_nf4(layer)}
    dtype = next((weight.dtype for weight in weights.values() if weight is not None), None)
    sums = {
        name: tensor_sum(weight) for name, weight in weights.items() if weight is not None and weight.dtype == dtype
    }
    return str(dtype).removeprefix("torch.") if sums else "", sums


def directory_fingerprint(folder: str | os.PathLike[str]) -> dict[str, str]:
    """Tensor name -> :func:`tensor_sum`, of all safetensors files in a directory; one tensor is read at a time.

    Raises:
        CheckpointError: when it has no such files, or one is truncated.
    """
    from safetensors import SafetensorError, safe_open

    files = sorted(Path(folder).glob("*.safetensors"))
    if not files:
        raise CheckpointError(f"{str(folder)!r} holds no .safetensors files")
    sums: dict[str, str] = {}
    for file in files:
        try:
            with safe_open(file, framework="pt") as opened:
                for name in opened.keys():  # noqa: SIM118 - it is no dict
                    sums[name] = tensor_sum(opened.get_tensor(name))
        except SafetensorError as error:
            raise CheckpointError(f"{str(file)!r} cannot be read, download or copy it again: {error}") from error
    return sums


def _multipliers_on(device: torch.device) -> Tensor:
    if device not in _multipliers:
        generator = torch.Generator().manual_seed(0x5EED)
        drawn = torch.randint(-(2**62), 2**62, (_CHUNK,), generator=generator, dtype=torch.int64)
        _multipliers[device] = (drawn * 2 + 1).to(device)
    return _multipliers[device]
