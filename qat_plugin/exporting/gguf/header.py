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
import numpy.typing as npt

from qat_plugin.errors import CheckpointError, DataError

MAGIC: Final = b"GGUF"
VERSIONS: Final = (2, 3)
ALIGNMENT: Final = "general.alignment"
_STRING, _ARRAY, _BOOL = 8, 9, 7
# Types of fixed size: as struct spells them.
_FIXED: Final = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "B", 10: "Q", 11: "q", 12: "d"}
_LEAST_ENTRY, _LEAST_TENSOR = 8 + 4 + 1, 8 + 4 + 8 + 4 + 8
_MOST_DIMENSIONS = 4
_MOST_NESTED = 4
_MOST_ITEMS = 1 << 24  # strings and arrays in arrays, together: real vocabularies have less than a million
_MOST_ALIGNMENT = 1 << 24

Bytes = npt.NDArray[np.uint8]


@dataclass(frozen=True)
class Array:
    """An array in the metadata; its values stay in the file until they are asked for.

    Attributes:
        kind: type number of its elements.
        count: of them.
        start, stop: bytes of the file that they take.
    """

    kind: int
    count: int
    start: int
    stop: int


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
        cursor = _Cursor(self.path, self.file, array.start)
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
    cursor = _Cursor(path, file, len(MAGIC))
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


def _version(cursor: _Cursor) -> int:
    version: int = cursor.number("I", "version")
    if version in VERSIONS:
        return version
    if int.from_bytes(struct.pack("<I", version), "big") in (1, *VERSIONS):
        raise CheckpointError(f"{cursor.path} is a big-endian GGUF file; convert it for little-endian machines")
    raise CheckpointError(f"{cursor.path} has GGUF version {version}; versions that can be read: 2 and 3")


def _entries(cursor: _Cursor, count: int) -> tuple[dict[str, Any], dict[str, tuple[int, int]]]:
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
        spans[key] = (start + 8 if kind == _STRING else start, cursor.at)
    return metadata, spans


def _alignment(cursor: _Cursor, metadata: dict[str, Any], spans: dict[str, tuple[int, int]]) -> int:
    alignment = metadata.get(ALIGNMENT, 32)
    whole = isinstance(alignment, int) and not isinstance(alignment, bool)
    if not whole or not 0 < alignment <= _MOST_ALIGNMENT or alignment & (alignment - 1):
        raise cursor.damaged(f"{ALIGNMENT} ({alignment!r}) is no power of two", spans[ALIGNMENT][0])
    return int(alignment)


def _tensors(cursor: _Cursor, count: int) -> Iterator[TensorInfo]:
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


def _placed(cursor: _Cursor, found: list[TensorInfo], data_start: int, alignment: int) -> dict[str, TensorInfo]:
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


class _Cursor:
    """A place in the mapped file; each reading is checked against its end."""

    def __init__(self, path: Path, file: Bytes, at: int) -> None:
        self.path, self.at, self.size = path, at, len(file)
        self._view = file.data
        self._items = 0

    def damaged(self, what: str, at: int) -> CheckpointError:
        return CheckpointError(f"{self.path} is damaged: {what} (at byte {at})")

    def count(self, what: str, least: int) -> int:
        """A number of things of which each takes at least ``least`` bytes."""
        count: int = self.number("Q", f"number of {what}")
        if count * least > self.size - self.at:
            raise self.damaged(f"it claims {count} {what}, more than its {self.size} bytes hold", self.at - 8)
        return count

    def number(self, code: str, what: str) -> Any:
        code = f"<{code}"
        stop = self._end(struct.calcsize(code), what)
        (value,) = struct.unpack_from(code, self._view, self.at)
        self.at = stop
        return value

    def string(self, what: str) -> str:
        length = self.number("Q", f"length of the {what}")
        start, stop = self.at, self._end(length, what)
        try:
            text = str(self._view[start:stop], "utf-8")
        except UnicodeDecodeError as error:
            raise self.damaged(f"the {what} is no UTF-8 ({error.reason})", start + error.start) from None
        self.at = stop
        return text

    def value(self, kind: int, what: str, nested: int = 0) -> Any:
        if kind == _STRING:
            return self.string(f"value of {what}")
        if kind == _ARRAY:
            return self._array(what, nested + 1)
        if kind not in _FIXED:
            raise self.damaged(f"{what} has type {kind}, which there is none of", self.at - 4)
        number = self.number(_FIXED[kind], f"value of {what}")
        if kind != _BOOL:
            return number
        if number > 1:
            raise self.damaged(f"{what} is a truth value of {number}", self.at - 1)
        return bool(number)

    def _array(self, what: str, nested: int) -> Array:
        at = self.at
        kind = self.number("I", f"type of the elements of {what}")
        if nested > _MOST_NESTED:
            raise self.damaged(f"{what} has arrays in arrays, more than {_MOST_NESTED} deep", at)
        if kind not in (*_FIXED, _STRING, _ARRAY):
            raise self.damaged(f"the elements of {what} have type {kind}, which there is none of", at)
        least = struct.calcsize(_FIXED[kind]) if kind in _FIXED else 8 if kind == _STRING else 12
        count = self.count(f"elements of {what}", least)
        start = self.at
        if kind in _FIXED:
            self.at = self._end(count * least, f"values of {what}")
            if kind == _BOOL and count and max(self._view[start : self.at]) > 1:
                raise self.damaged(f"{what} has truth values above 1", start)
            return Array(kind, count, start, self.at)
        self._items += count
        if self._items > _MOST_ITEMS:
            raise self.damaged(f"{what} makes its arrays hold more than {_MOST_ITEMS} strings", at)
        for _ in range(count):  # only to see that they are what they claim to be
            self.value(kind, what, nested)
        return Array(kind, count, start, self.at)

    def _end(self, length: int, what: str) -> int:
        if length > self.size - self.at:
            raise CheckpointError(
                f"{self.path} was cut short or is damaged: the {what} takes {length} bytes from byte {self.at} on, the "
                f"file has {self.size}"
            )
        return self.at + length
