"""Writing a safetensors file piece by piece: no more than one piece is in memory.

``safetensors.torch.save_file`` takes all tensors of a file at once. The format is simple enough to stream (8 bytes with
the header's length, a JSON header with type, shape and offsets, the bytes): https://github.com/huggingface/safetensors.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import BinaryIO, Final

import torch
from torch import Tensor

from qat_plugin.errors import CheckpointError

FLOAT_NAMES: Final = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16", torch.float64: "F64"}
"""Type -> its name in a safetensors header."""


@dataclass(frozen=True)
class Entry:
    """A tensor that will be written: its type's name in the format, its shape, its bytes."""

    dtype: str
    shape: tuple[int, ...]
    size: int

    @classmethod
    def of(cls, tensor: Tensor, dtype: torch.dtype) -> Entry:
        """The entry of a float tensor that is written in ``dtype``."""
        return cls(FLOAT_NAMES[dtype], tuple(tensor.shape), prod(tensor.shape) * dtype.itemsize)


class ShardWriter:
    """An open file whose header is written and whose tensors follow in its order.

    Args:
        path: written from the start.
        entries: every tensor, in the order in which :meth:`write` will be called.
        metadata: strings of the header.
    """

    def __init__(self, path: Path, entries: Mapping[str, Entry], metadata: Mapping[str, str] | None) -> None:
        header: dict[str, object] = {"__metadata__": dict(metadata)} if metadata else {}
        offset = 0
        for name, entry in entries.items():
            ends = [offset, offset + entry.size]
            header[name] = {"dtype": entry.dtype, "shape": list(entry.shape), "data_offsets": ends}
            offset += entry.size
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)  # tensors start at a multiple of eight
        self._left = dict(entries)
        self._file: BinaryIO = path.open("wb")
        self._file.write(len(text).to_bytes(8, "little") + text)

    def write(self, name: str, pieces: Iterable[Tensor]) -> None:
        """Write the next tensor, given in contiguous pieces of the type that its entry names.

        Raises:
            CheckpointError: when it is not the next, or the pieces do not make up its size.
        """
        entry = self._left.pop(name)
        written = 0
        for piece in pieces:
            written += self._file.write(piece.reshape(-1).view(torch.uint8).numpy().data)
        if written != entry.size:
            raise CheckpointError(f"{name}: {written} bytes were made of {entry.size}")

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()
