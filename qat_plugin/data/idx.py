"""The idx format of MNIST: unsigned bytes behind a header of big-endian sizes; every number in it is checked.

::

    0 0 8 d | size of each of d dimensions, 4 bytes each | bytes, the last dimension running fastest
"""

from __future__ import annotations

import gzip
import zlib
from pathlib import Path
from typing import BinaryIO, Final

import torch
from torch import Tensor

from qat_plugin.errors import DataError

_UNSIGNED_BYTES: Final = 8
_MOST: Final = 1 << 32  # bytes of one file's contents


def read_idx(path: Path, dimensions: int) -> Tensor:
    """The bytes of an idx file, gzipped or plain: uint8 with so many dimensions.

    Raises:
        DataError: when the file is missing, no idx file of unsigned bytes, of other dimensions, truncated or longer
            than its header says.
    """
    try:
        raw = path.open("rb")
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror or error}") from error
    with raw:
        zipped = raw.read(2) == b"\x1f\x8b"
        raw.seek(0)
        try:
            return _read(path, gzip.GzipFile(fileobj=raw) if zipped else raw, dimensions)
        except (EOFError, gzip.BadGzipFile, zlib.error) as error:
            raise DataError(f"{path} is truncated or corrupt: {error}") from error


def _read(path: Path, file: BinaryIO | gzip.GzipFile, dimensions: int) -> Tensor:
    header = file.read(4 + 4 * dimensions)
    if header[:3] != bytes([0, 0, _UNSIGNED_BYTES]) or len(header) < 8:
        raise DataError(f"{path} is no idx file of unsigned bytes: it begins with {header[:4].hex(' ') or 'nothing'}")
    if header[3] != dimensions:
        raise DataError(f"{path} has {header[3]} dimensions; {dimensions} are needed ({_FORM[dimensions]})")
    if len(header) != 4 + 4 * dimensions:
        raise DataError(f"{path} ends in its header, after {len(header)} bytes")
    sizes = [int.from_bytes(header[at : at + 4], "big") for at in range(4, len(header), 4)]
    count = 1
    for size in sizes:
        count *= size
    if not 0 < count <= _MOST:
        raise DataError(f"{path} says that it holds {' x '.join(map(str, sizes))} bytes, which cannot be")
    content = bytearray()
    while len(content) <= count:  # in pieces: a header cannot make us reserve what the file does not hold
        piece = file.read(min(1 << 20, count + 1 - len(content)))
        if not piece:
            break
        content += piece
    if len(content) != count:
        more = "more" if len(content) > count else f"only {len(content)}"
        raise DataError(f"{path} says that it holds {count} bytes ({' x '.join(map(str, sizes))}) and holds {more}")
    return torch.frombuffer(content, dtype=torch.uint8).reshape(sizes)


_FORM: Final = {1: "one label an image", 3: "images, rows, columns"}
