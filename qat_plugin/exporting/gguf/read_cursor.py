"""A place in a mapped GGUF file: numbers, strings and arrays are read there, each within the file's end."""

from __future__ import annotations

import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from qat_plugin.errors import CheckpointError

Bytes = npt.NDArray[np.uint8]
STRING, _ARRAY, _BOOL = 8, 9, 7
# Types of fixed size: as struct spells them.
_FIXED: Final = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "B", 10: "Q", 11: "q", 12: "d"}
_MOST_NESTED = 4
_MOST_ITEMS = 1 << 24  # strings and arrays in arrays, together: real vocabularies have less than a million


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


class Cursor:
    """A place in the mapped file; each reading is checked against its end.

    Methods that read raise :class:`~qat_plugin.errors.CheckpointError` for what is not there or not allowed.
    """

    def __init__(self, path: Path, file: Bytes, at: int) -> None:
        self.path, self.at, self.size = path, at, len(file)
        self._view = file.data
        self._items = 0

    def damaged(self, what: str, at: int) -> CheckpointError:
        """An error that names the file and the byte."""
        return CheckpointError(f"{self.path} is damaged: {what} (at byte {at})")

    def count(self, what: str, least: int) -> int:
        """A number of things, of which each takes at least ``least`` bytes of what is left."""
        count: int = self.number("Q", f"number of {what}")
        if count * least > self.size - self.at:
            raise self.damaged(f"it claims {count} {what}, more than its {self.size} bytes hold", self.at - 8)
        return count

    def number(self, code: str, what: str) -> Any:
        """A little-endian number, of a code of ``struct``; ``what`` names it in errors, as in all of these."""
        code = f"<{code}"
        stop = self._end(struct.calcsize(code), what)
        (value,) = struct.unpack_from(code, self._view, self.at)
        self.at = stop
        return value

    def string(self, what: str) -> str:
        """A length and that many bytes of UTF-8."""
        length = self.number("Q", f"length of the {what}")
        start, stop = self.at, self._end(length, what)
        try:
            text = str(self._view[start:stop], "utf-8")
        except UnicodeDecodeError as error:
            raise self.damaged(f"the {what} is no UTF-8 ({error.reason})", start + error.start) from None
        self.at = stop
        return text

    def value(self, kind: int, what: str, nested: int = 0) -> Any:
        """A value of a type number; an array is walked, and stays where it is."""
        if kind == STRING:
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
        if kind not in (*_FIXED, STRING, _ARRAY):
            raise self.damaged(f"the elements of {what} have type {kind}, which there is none of", at)
        least = struct.calcsize(_FIXED[kind]) if kind in _FIXED else 8 if kind == STRING else 12
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
