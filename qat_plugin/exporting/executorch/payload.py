"""What a ``.pte`` holds: XNNPACK's graphs and their constants, read by ExecuTorch's own parser.

Field numbers of XNNPACK's graphs are those of ``backends/xnnpack/serialization/schema.fbs`` of ExecuTorch 1.5.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, Literal

import torch
from flatbuffers import number_types as types
from torch import Tensor

from qat_plugin.errors import ExportError
from qat_plugin.exporting.executorch.tables import Table

Kind = Literal["linear", "conv", "depthwise"]

_HEADER = struct.Struct("<4x4sHIIIQ")  # zeros, magic, length, flatbuffer offset and size, constants' offset and size
_NODES: dict[int, tuple[Kind, int]] = {2: ("linear", 0), 7: ("conv", 15), 13: ("depthwise", 15)}
"""Number in ``XNodeUnion`` -> kind and number of its field ``input1_id``; ``filter_id`` is the next one."""
_QCINT8, _QCINT4, _QBINT4 = 6, 8, 10
_PER_CHANNEL, _PER_TENSOR, _PER_TOKEN, _PER_GROUP = 1, 2, 3, 4


@dataclass(frozen=True)
class Stored:
    """A quantized weight of one XNNPACK operator.

    Attributes:
        kind: of the operator.
        q: int8 [out, columns]; a convolution's [out, in / groups, height, width].
        scale: float32 [out, groups].
        input: how its input is quantized: ``"token"`` (or per image), or the static scale.
        zero_point: of a static input.
    """

    kind: Kind
    q: Tensor
    scale: Tensor
    input: Literal["token"] | float
    zero_point: int = 0


@dataclass(frozen=True)
class Payload:
    """All that was read.

    Attributes:
        weights: quantized ones, in the order of the program; the same constants once.
        float_products: matrix products and convolutions of XNNPACK with float weights.
        constants: every constant of the file as bytes.
        operators: of ExecuTorch itself that run outside XNNPACK, without repetition.
    """

    weights: list[Stored]
    float_products: int
    constants: list[bytes]
    operators: list[str]


def read(path: Path) -> Payload:
    """Read a file.

    Raises:
        ExportError: when it is no ``.pte``, or holds what this reader does not know.
    """
    from executorch.exir._serialize._program import deserialize_pte_binary

    try:
        file = deserialize_pte_binary(path.read_bytes())
        named = _named(file)
        weights: dict[tuple[Any, ...], Stored] = {}
        floats = 0
        for delegate in file.program.backend_delegate_data:
            floats += _graph(bytes(delegate.data), named, weights)
    except (ValueError, KeyError, struct.error, RuntimeError) as error:
        raise ExportError(f"{path.name} cannot be read as ExecuTorch 1.5's format: {error}") from error
    plain = [bytes(buffer.storage) for buffer in file.program.constant_buffer]
    operators = sorted({operator.name for plan in file.program.execution_plan for operator in plan.operators})
    return Payload(list(weights.values()), floats, [*plain, *named.values()], operators)


def _named(file: Any) -> dict[str, bytes]:
    if file.named_data is None:
        return {}
    return {key: file.named_data.buffers[entry.buffer_index] for key, entry in file.named_data.pte_data.items()}


def _graph(data: bytes, named: Mapping[str, bytes], weights: dict[tuple[Any, ...], Stored]) -> int:
    magic, _, offset, size, _, _ = _HEADER.unpack_from(data)
    if magic != b"XH00":
        raise ValueError(f"a delegate begins with {magic!r}, not XNNPACK's XH00")
    graph = Table.root(data[offset : offset + size])
    values = {_tensor(value).number(6): value for value in graph.tables(2)}
    keys = [constant.text(2) for constant in graph.tables(8)]
    floats = 0
    for node in graph.tables(1):
        if node.number(0, types.Uint8Flags) not in _NODES:
            continue
        kind, first = _NODES[node.number(0, types.Uint8Flags)]
        operator = node.table(1)
        weight, source = values[operator.number(first + 1)], values[operator.number(first)]
        if not _quantized(weight):
            floats += 1
            continue
        read = _weight(kind, weight, source, keys, named)
        weights.setdefault((kind, read[0], read[1], read[2].input), read[2])
    return floats


def _quantized(value: Table) -> bool:
    return bool(value.number(0, types.Uint8Flags) == 2)


def _tensor(value: Table) -> Table:
    return value.table(1).table(0) if _quantized(value) else value.table(1)


def _weight(
    kind: Kind, value: Table, source: Table, keys: list[str], named: Mapping[str, bytes]
) -> tuple[str, str, Stored]:
    tensor, parameters = _tensor(value), value.table(1).table(2)
    how, datatype = value.table(1).number(1, types.Uint8Flags), tensor.number(0, types.Int16Flags)
    if how not in (_PER_CHANNEL, _PER_GROUP) or datatype not in (_QCINT8, _QCINT4, _QBINT4):
        raise ValueError(f"a weight of type {datatype}, quantized as {how}")
    grouped = how == _PER_GROUP
    key, scale_key = keys[tensor.number(3)], keys[parameters.number(4 if grouped else 2)]
    dims = tensor.numbers(2)
    scale = _floats(named[scale_key], torch.bfloat16 if grouped else torch.float32)
    q = _int8(named[key], dims) if datatype == _QCINT8 else _int4(named[key], dims)
    if kind == "conv":  # [out, height, width, in / groups]
        q = q.reshape(dims).permute(0, 3, 1, 2)
    elif kind == "depthwise":  # [1, height, width, out]
        q = q.reshape(dims).permute(3, 0, 1, 2)
    else:
        q = q.reshape(dims)
    taken: Literal["token"] | float = "token"
    zero_point = 0
    if not _quantized(source):
        raise ValueError("an integer weight multiplies a float input")
    if source.table(1).number(1, types.Uint8Flags) == _PER_TENSOR:
        static = source.table(1).table(2)
        taken, zero_point = float(static.number(0, types.Float32Flags)), int(static.number(1, types.Int32Flags))
    return key, scale_key, Stored(kind, q.contiguous(), scale.reshape(q.shape[0], -1), taken, zero_point)


def _floats(data: bytes, dtype: torch.dtype) -> Tensor:
    return torch.frombuffer(bytearray(data), dtype=dtype).float()


def _int8(data: bytes, dims: list[int]) -> Tensor:
    return torch.frombuffer(bytearray(data), dtype=torch.int8)[: prod(dims)]


def _int4(data: bytes, dims: list[int]) -> Tensor:
    """Two to a byte, the first in the low half, plus 8."""
    rows, columns = dims
    packed = torch.frombuffer(bytearray(data), dtype=torch.uint8).reshape(rows, -1)
    both = torch.stack([packed & 15, packed >> 4], dim=-1).reshape(rows, -1)
    return (both.to(torch.int8) - 8)[:, :columns]
