"""Tensors of a GGUF file as a model of transformers has them: by its names, in its order of rows.

llama.cpp rotates pairs of neighbouring rows of a head where transformers rotates rows half a head apart, so that rows
of Llama's queries and keys lie in another order in the file. A permutation of rows takes integers and scales along.
Gemma's norms lie in it with one added.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Final, TypeVar

import torch
from torch import Tensor, nn

from qat_plugin.errors import CheckpointError
from qat_plugin.exporting.assemble import Stored
from qat_plugin.exporting.gguf.header import Header, TensorInfo
from qat_plugin.exporting.gguf.read_blocks import SCHEMES, off_grid, unpack_blocks
from qat_plugin.exporting.gguf.read_rope import FACTORS
from qat_plugin.exporting.gguf.schemes import regrouped
from qat_plugin.numerics import Quantized
from qat_plugin.scheme import Scheme

_FLOATS: Final = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "F64": torch.float64}
_GEMMAS: Final = ("gemma", "gemma2", "gemma3")
Value = TypeVar("Value")


class Lazy(Mapping[str, Value]):
    """Values that are made when they are asked for, one at a time."""

    def __init__(self, make: Mapping[str, Callable[[], Value]]) -> None:
        self._make = make

    def __getitem__(self, name: str) -> Value:
        return self._make[name]()

    def __iter__(self) -> Iterator[str]:
        return iter(self._make)

    def __len__(self) -> int:
        return len(self._make)


@dataclass(frozen=True)
class Tensors:
    """A file's tensors by the names of the model's parameters.

    Attributes:
        quantized: on grids of this project; integers and scales as they are in the file.
        floats: all others.
        notes: tensor name in the file -> why it became float numbers though the file has integers.
    """

    quantized: Lazy[Stored]
    floats: Lazy[Tensor]
    notes: dict[str, str]


def tensors_of(header: Header, network: nn.Module, config: Any, trained: Mapping[str, Scheme] | None = None) -> Tensors:
    """All tensors of a file for a network.

    Args:
        header: of the file.
        network: of the file's architecture, its parameters on the meta device.
        config: its configuration.
        trained: name of a tensor in the file -> the scheme whose integers its blocks hold; by default the block's own.

    Raises:
        CheckpointError: when names or shapes in the file are not the network's, or a type cannot be read.
    """
    architecture = str(header.metadata["general.architecture"])
    names = _names(header, network, architecture, config.num_hidden_layers)
    layers = {
        f"{name}.weight" for name, module in network.named_modules() if isinstance(module, (nn.Linear, nn.Embedding))
    }
    quantized: dict[str, Callable[[], Stored]] = {}
    floats: dict[str, Callable[[], Tensor]] = {}
    notes: dict[str, str] = {}
    for info in header.tensors.values():
        if info.name == FACTORS:
            continue  # in the configuration
        name = names[info.name]
        heads = _heads(info.name, architecture, config)
        reason = _reason(header, info, name in layers)
        if reason:
            notes[info.name] = reason
        if info.kind in SCHEMES and not reason:
            quantized[name] = _stored(header, info, heads, (trained or {}).get(info.name))
        else:
            less = 1.0 if architecture in _GEMMAS and info.name.endswith("norm.weight") else 0.0
            floats[name] = _float(header, info, heads, less)
    return Tensors(Lazy(quantized), Lazy(floats), notes)


def _names(header: Header, network: nn.Module, architecture: str, layers: int) -> dict[str, str]:
    """Name in the file -> name in the network, of tensors that have the network's shapes."""
    from gguf import MODEL_ARCH_NAMES, get_tensor_name_map

    kind = next(kind for kind, name in MODEL_ARCH_NAMES.items() if name == architecture)
    known = get_tensor_name_map(kind, layers)
    parameters = dict(network.named_parameters(remove_duplicate=False))
    ours = {}
    for name in parameters:
        stem, _, leaf = name.rpartition(".")
        if found := known.get_name(stem):
            ours[f"{found}.{leaf}"] = name
    present = header.tensors.keys() - {FACTORS}
    if unknown := sorted(present - ours.keys()):
        raise CheckpointError(
            f"{header.path}: {type(network).__name__} has no place for {_some(unknown)} of the file's tensors"
        )
    ties = {id(parameters[ours[name]]) for name in present}
    missing = sorted(name for name, parameter in parameters.items() if id(parameter) not in ties)
    if missing:
        raise CheckpointError(f"{header.path} lacks {_some(missing)} of {type(network).__name__}")
    for name in present:
        shape, wanted = header.tensors[name].shape, tuple(parameters[ours[name]].shape)
        if shape != wanted:
            raise CheckpointError(f"{header.path}: {name} has shape {shape}, {ours[name]} has {wanted}")
    return {name: ours[name] for name in present}


def _some(names: list[str]) -> str:
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")


def _heads(name: str, architecture: str, config: Any) -> int:
    """Heads whose rows are in llama.cpp's order; 0 where they are in transformers'."""
    if architecture != "llama" or not name.startswith("blk."):
        return 0
    part = name.split(".")[2]
    heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}
    return int(heads.get(part, 0))


def _reason(header: Header, info: TensorInfo, is_layer: bool) -> str:
    """Why a tensor of integers is read as float numbers; empty when it is not one, or is not."""
    if info.kind in _FLOATS:
        return ""
    if info.kind not in SCHEMES:
        return f"{info.kind} is no grid of this project"
    if len(info.shape) != 2 or not is_layer:
        return "no weight of a linear layer or embedding"
    reason = off_grid(header.data(info.name), info.kind)
    if reason.startswith("damaged"):
        raise CheckpointError(f"{header.path}: {info.name} is {reason}")
    return f"{info.kind} with {reason}" if reason else ""


def _stored(header: Header, info: TensorInfo, heads: int, scheme: Scheme | None) -> Callable[[], Stored]:
    def make() -> Stored:
        found = unpack_blocks(header.data(info.name), info.kind, (info.shape[0], info.shape[1]))
        if heads:
            zero_point = None if found.zero_point is None else halves_apart(found.zero_point, heads)
            q, scale = halves_apart(found.q, heads), halves_apart(found.scale, heads)
            found = Quantized(q, scale, zero_point, found.scheme)
        if scheme is None:
            return Stored(found)
        whole = regrouped(found, scheme)
        if whole is None:
            raise CheckpointError(f"{header.path} is damaged: {info.name} holds no integers and scales of {scheme}")
        return Stored(whole)

    return make


def _float(header: Header, info: TensorInfo, heads: int, less: float) -> Callable[[], Tensor]:
    def make() -> Tensor:
        data = header.data(info.name)
        if info.kind in _FLOATS:
            number = torch.from_numpy(data.copy()).view(_FLOATS[info.kind]).reshape(info.shape)
        else:
            number = _dequantized(header, info)
        number = halves_apart(number, heads) if heads else number
        return number.float() - less if less else number

    return make


def _dequantized(header: Header, info: TensorInfo) -> Tensor:
    import numpy as np
    from gguf import GGMLQuantizationType
    from gguf.quants import dequantize

    try:
        rows = header.data(info.name).reshape(*info.shape[:-1], -1)
        number = dequantize(rows, GGMLQuantizationType[info.kind])
    except NotImplementedError as error:
        raise CheckpointError(f"{header.path}: {info.name} has type {info.kind}, which gguf cannot read") from error
    return torch.from_numpy(np.ascontiguousarray(number, dtype=np.float32)).reshape(info.shape)


def halves_apart(rows: Tensor, heads: int) -> Tensor:
    """Rows [heads x width, ...] of pairs side by side, with each pair's rows half a head apart."""
    width = rows.shape[0] // heads
    return rows.reshape(heads, width // 2, 2, *rows.shape[1:]).transpose(1, 2).reshape(rows.shape).contiguous()
