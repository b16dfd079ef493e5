"""The header of a GGUF file, versions 2 and 3, read with bounds on everything it claims.

::

    magic "GGUF" | version u32 | tensors u64 | entries u64
    entries  x (key string | type u32 | value)          string: length u64, UTF-8 bytes; array: type u32, length u64
    tensors  x (name string | dimensions u32 | each u64, fastest first | type u32 | offset u64)
    padding to general.alignment (32) | data, each tensor's offset a multiple of the alignment

Nothing is believed before it is checked against the file's size, and nothing is copied that is not asked for: arrays
stay in the mapped file. Specification: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

from __future__ import annotations

import itertools
import math
import struct
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import numpy as np

from qat_plugin.errors import CheckpointError, DataError
from qat_plugin.exporting.gguf.read_cursor import STRING, Array, Bytes, Cursor

MAGIC: Final = b"GGUF"
VERSIONS: Final = (2, 3)
ALIGNMENT: Final = "general.alignment"
_LEAST_ENTRY, _LEAST_TENSOR = 8 + 4 + 1, 8 + 4 + 8 + 4 + 8
_MOST_DIMENSIONS = 4
_MOST_ALIGNMENT = 1 << 24


@dataclass(frozen=True)
class TensorInfo:
    """Where one tensor lies, and how it is stored.

    Attributes:
        name: in the file.
        shape: in torch's order, the fastest dimension last.
        kind: ggml's name of its type: ``"F32"``, ``"Q4_0"``.
        start: first byte in the file.
        nbytes: of its data.
    """

    name: str
    shape: tuple[int, ...]
    kind: str
    start: int
    nbytes: int


@dataclass(frozen=True)
class Header:
    """A checked header.

    Attributes:
        path: of the file.
        version: 2 or 3.
        metadata: key -> int, float, bool, str or :class:`Array`.
        spans: key -> first byte of its value, and the first one after it (of a string: its text).
        tensors: name -> where it lies, in the file's order.
        data_start: first byte of the data section.
        file: all bytes, mapped read-only.
    """

    path: Path
    version: int
    metadata: dict[str, Any]
    spans: dict[str, tuple[int, int]]
    tensors: dict[str, TensorInfo]
    data_start: int
    file: Bytes = field(repr=False)

    def data(self, name: str) -> Bytes:
        """The bytes of a tensor, mapped."""
        info = self.tensors[name]
        return self.file[info.start : info.start + info.nbytes]

    def values(self, key: str) -> list[Any]:
        """The values of an array.

        Raises:
            CheckpointError: when the key is missing or something else.
        """
        array = self.metadata.get(key)
        if not isinstance(array, Array):
            raise CheckpointError(f"{self.path}: its metadata has no array {key!r}")
        cursor = Cursor(self.path, self.file, array.start)
        return [cursor.value(array.kind, key) for _ in range(array.count)]


def read_header(path: Path) -> Header:
    """Read and check the header of a GGUF file.

    Args:
        path: of the file; its data is mapped, not read.

    Raises:
        DataError: when there is no such file.
        CheckpointError: when it is no GGUF file, of another version or byte order, truncated or damaged; the message
            says what, and at which byte.
    """
    if not path.is_file():
        raise DataError(f"there is no file at {path} (looked for {path.absolute()})")
    try:
        size = path.stat().st_size
        if size < len(MAGIC) + 4 + 8 + 8:
            raise CheckpointError(f"{path} is no GGUF file, or was cut short: it has {size} bytes")
        file: Bytes = np.memmap(path, dtype=np.uint8, mode="r").view(np.ndarray)
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror or error}") from error
    cursor = Cursor(path, file, len(MAGIC))
    if file[: len(MAGIC)].tobytes() != MAGIC:
        raise CheckpointError(f"{path} is no GGUF file: it does not begin with GGUF")
    version = _version(cursor)
    tensor_count = cursor.count("tensors", _LEAST_TENSOR)
    entry_count = cursor.count("metadata entries", _LEAST_ENTRY)
    metadata, spans = _entries(cursor, entry_count)
    alignment = _alignment(cursor, metadata, spans)
    found = list(_tensors(cursor, tensor_count))
    data_start = -(-cursor.at // alignment) * alignment
    return Header(path, version, metadata, spans, _placed(cursor, found, data_start, alignment), data_start, file)


def _version(cursor: Cursor) -> int:
    version: int = cursor.number("I", "version")
    if version in VERSIONS:
        return version
    if int.from_bytes(struct.pack("<I", version), "big") in (1, *VERSIONS):
        raise CheckpointError(f"{cursor.path} is a big-endian GGUF file; convert it for little-endian machines")
    raise CheckpointError(f"{cursor.path} has GGUF version {version}; versions that can be read: 2 and 3")


def _entries(cursor: Cursor, count: int) -> tuple[dict[str, Any], dict[str, tuple[int, int]]]:
    metadata: dict[str, Any] = {}
    spans: dict[str, tuple[int, int]] = {}
    for index in range(count):
        at = cursor.at
        key = cursor.string(f"key of metadata entry {index}")
        if not key or key in metadata:
            raise cursor.damaged(
                f"the key of metadata entry {index}, {key!r}, is " + ("there twice" if key else "empty"), at
            )
        kind = cursor.number("I", f"type of {key}")
        start = cursor.at
        metadata[key] = cursor.value(kind, key)
        spans[key] = (start + 8 if kind == STRING else start, cursor.at)
    return metadata, spans


def _alignment(cursor: Cursor, metadata: dict[str, Any], spans: dict[str, tuple[int, int]]) -> int:
    alignment = metadata.get(ALIGNMENT, 32)
    whole = isinstance(alignment, int) and not isinstance(alignment, bool)
    if not whole or not 0 < alignment <= _MOST_ALIGNMENT or alignment & (alignment - 1):
        raise cursor.damaged(f"{ALIGNMENT} ({alignment!r}) is no power of two", spans[ALIGNMENT][0])
    return int(alignment)


def _tensors(cursor: Cursor, count: int) -> Iterator[TensorInfo]:
    """Each entry of the table, with the offset in the data section for a start."""
    from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

    kinds = {
        int(kind): (kind.name, *GGML_QUANT_SIZES[kind]) for kind in GGMLQuantizationType if kind in GGML_QUANT_SIZES
    }
    for index in range(count):
        at = cursor.at
        name = cursor.string(f"name of tensor {index}")
        if not name:
            raise cursor.damaged(f"tensor {index} has no name", at)
        dimensions = cursor.number("I", f"number of dimensions of {name}")
        if not 1 <= dimensions <= _MOST_DIMENSIONS:
            raise cursor.damaged(
                f"{name} has {dimensions} dimensions (1 to {_MOST_DIMENSIONS} are allowed)", cursor.at - 4
            )
        shape = tuple(cursor.number("Q", f"shape of {name}") for _ in range(dimensions))[::-1]
        number = cursor.number("I", f"type of {name}")
        if number not in kinds:
            raise cursor.damaged(f"{name} has type {number}, which is none that can be read here", cursor.at - 4)
        kind, block, nbytes = kinds[number]
        elements = math.prod(shape)
        if elements == 0 or elements >= 1 << 63 or shape[-1] % block:
            raise cursor.damaged(f"{name} has shape {shape}, which {kind} cannot have (blocks of {block})", at)
        yield TensorInfo(name, shape, kind, cursor.number("Q", f"offset of {name}"), elements // block * nbytes)


def _placed(cursor: Cursor, found: list[TensorInfo], data_start: int, alignment: int) -> dict[str, TensorInfo]:
    """The tensors with their places in the file: inside it, aligned, no two over each other."""
    placed: dict[str, TensorInfo] = {}
    for info in found:
        start = data_start + info.start
        if info.name in placed:
            raise cursor.damaged(f"there are two tensors {info.name}", cursor.at)
        if info.start % alignment:
            raise cursor.damaged(f"{info.name} lies at offset {info.start}, no multiple of {alignment}", cursor.at)
        if start + info.nbytes > cursor.size:
            raise CheckpointError(
                f"{cursor.path} was cut short or is damaged: {info.name} ({info.kind}, {info.shape}) takes bytes "
                f"{start} to {start + info.nbytes}, the file has {cursor.size}"
            )
        placed[info.name] = TensorInfo(info.name, info.shape, info.kind, start, info.nbytes)
    ordered = sorted(placed.values(), key=lambda info: info.start)
    for before, after in itertools.pairwise(ordered):
        if before.start + before.nbytes > after.start:
            raise cursor.damaged(f"{before.name} and {after.name} lie over each other", after.start)
    return placed
