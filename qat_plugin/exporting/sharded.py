"""Writing a transformers directory's safetensors files tensor by tensor: one parameter is in memory at a time.

What a parameter becomes in the file is computed twice by the same function: on the meta device, for the header and the
division into shards, and for the bytes. Within a file wide types come before narrow ones, as safetensors wants them
aligned, whatever the order of writing.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import torch
from torch import Tensor

from qat_plugin.errors import ConfigError, ExportError

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
DEFAULT_SHARD_SIZE = "50GB"
_UNITS: Final = {"KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}
_NAMES: Final = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16",
    torch.int64: "I64", torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8", torch.bool: "BOOL",
}  # fmt: skip


@dataclass(frozen=True)
class Part:
    """What one parameter becomes.

    Attributes:
        planned: name in the file -> tensor on the meta device.
        make: the same with their contents, on the CPU.
    """

    planned: Mapping[str, Tensor]
    make: Callable[[], Mapping[str, Tensor]]

    @property
    def size(self) -> int:
        """Bytes."""
        return sum(tensor.numel() * tensor.element_size() for tensor in self.planned.values())


def bytes_of(size: str | int) -> int:
    """Bytes of "5GB", "512MB", "2GiB" or a number.

    Raises:
        ConfigError: for anything else.
    """
    text = str(size).strip().upper()
    unit = next((unit for unit in sorted(_UNITS, key=len, reverse=True) if text.endswith(unit)), "")
    try:
        found = int(float(text.removesuffix(unit)) * _UNITS.get(unit, 1))
    except ValueError:
        found = 0
    if found <= 0:
        raise ConfigError(f"shard_size={size!r} is not a size: give one such as '5GB', '500MB' or '2GiB'")
    return found


def write_shards(
    folder: Path, parts: Sequence[Part], metadata: Mapping[str, str], shard_size: str | int, told: Callable[[int], None]
) -> None:
    """Write ``model.safetensors``, or shards with their index.

    Args:
        folder: exists.
        parts: in the order of the state; one that is larger than a shard gets its own.
        metadata: strings of each file's header.
        shard_size: bytes of a shard at most, as :func:`bytes_of` takes it.
        told: called with the number of parts written so far.

    Raises:
        ConfigError: for a size that is none.
        ExportError: when a part is not what was planned.
    """
    shards = list(_divided(parts, bytes_of(shard_size)))
    written = 0
    index: dict[str, str] = {}
    for number, shard in enumerate(shards, 1):
        name = SINGLE if len(shards) == 1 else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        with _File(folder / name, shard, metadata) as file:
            for part in shard:
                file.write(part)
                written += 1
                told(written)
        index |= {tensor: name for part in shard for tensor in part.planned}
    if len(shards) > 1:
        total = {"total_size": sum(part.size for part in parts)}
        text = json.dumps({"metadata": total, "weight_map": index}, indent=2, sort_keys=True)
        (folder / INDEX).write_text(text + "\n", encoding="utf-8")


def _divided(parts: Sequence[Part], limit: int) -> Iterator[list[Part]]:
    shard: list[Part] = []
    size = 0
    for part in parts:
        if shard and size + part.size > limit:
            yield shard
            shard, size = [], 0
        shard.append(part)
        size += part.size
    yield shard


class _File:
    """An open safetensors file whose header is written; each tensor has its place."""

    def __init__(self, path: Path, parts: Sequence[Part], metadata: Mapping[str, str]) -> None:
        planned = {name: tensor for part in parts for name, tensor in part.planned.items()}
        header: dict[str, object] = {"__metadata__": dict(metadata)}
        self._places: dict[str, int] = {}
        offset = 0
        for name, tensor in sorted(planned.items(), key=lambda entry: -entry[1].element_size()):
            end = offset + tensor.numel() * tensor.element_size()
            header[name] = {
                "dtype": _NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [offset, end]
            }  # fmt: skip
            self._places[name], offset = offset, end
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)  # tensors start at a multiple of eight
        self._start = 8 + len(text)
        self._file = path.open("wb")
        self._file.write(len(text).to_bytes(8, "little") + text)
        self._file.truncate(self._start + offset)

    def write(self, part: Part) -> None:
        made = part.make()
        for name, planned in part.planned.items():
            tensor = made[name].detach().cpu().contiguous()
            if (tensor.dtype, tensor.shape) != (planned.dtype, planned.shape):
                raise ExportError(
                    f"{name}: {tuple(tensor.shape)} {tensor.dtype} was made, planned were {tuple(planned.shape)} "
                    f"{planned.dtype}"
                )
            self._file.seek(self._start + self._places[name])
            self._file.write(tensor.reshape(-1).view(torch.uint8).numpy().data)

    def __enter__(self) -> _File:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()
