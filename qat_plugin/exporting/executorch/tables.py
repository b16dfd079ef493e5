"""Tables of a flatbuffer by the numbers of their fields, which is all that reading XNNPACK's graph takes."""

from __future__ import annotations

from typing import Any

from flatbuffers import number_types as types
from flatbuffers.encode import Get
from flatbuffers.table import Table as Raw


class Table:
    """One table; fields are numbered from 0 in the schema's order, a union takes two (its type, its table)."""

    def __init__(self, raw: Raw) -> None:
        self._raw = raw

    @classmethod
    def root(cls, data: bytes) -> Table:
        """The root table of a buffer."""
        return cls(Raw(data, Get(types.UOffsetTFlags.packer_type, data, 0)))

    def number(self, field: int, kind: Any = types.Uint32Flags, default: Any = 0) -> Any:
        """A scalar."""
        at = self._offset(field)
        return self._raw.Get(kind, at + self._raw.Pos) if at else default

    def text(self, field: int) -> str:
        """A string; empty where there is none."""
        at = self._offset(field)
        return self._raw.String(at + self._raw.Pos).decode() if at else ""

    def table(self, field: int) -> Table:
        """A table, or that of a union.

        Raises:
            ValueError: where there is none.
        """
        at = self._offset(field)
        if not at:
            raise ValueError(f"field {field} is missing")
        return Table(Raw(self._raw.Bytes, self._raw.Indirect(at + self._raw.Pos)))

    def tables(self, field: int) -> list[Table]:
        """A vector of tables."""
        start, count = self._vector(field)
        return [Table(Raw(self._raw.Bytes, self._raw.Indirect(start + 4 * i))) for i in range(count)]

    def numbers(self, field: int) -> list[int]:
        """A vector of 32-bit numbers."""
        start, count = self._vector(field)
        return [self._raw.Get(types.Uint32Flags, start + 4 * i) for i in range(count)]

    def _vector(self, field: int) -> tuple[int, int]:
        at = self._offset(field)
        return (self._raw.Vector(at), self._raw.VectorLen(at)) if at else (0, 0)

    def _offset(self, field: int) -> int:
        return int(self._raw.Offset(4 + 2 * field))
