"""Checksums inside a GGUF file: the format has none, and a flipped bit in it is another number.

Two strings of 64 hexadecimal digits in the metadata, which other readers pass over: ``qat_plugin.data_sha256`` is the
SHA-256 of all bytes from the start of the data section on, ``qat_plugin.sha256`` that of all bytes before it, its own
64 digits taken as zeros. They are written as zeros and filled in afterwards, in place.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Final

from qat_plugin.errors import CheckpointError
from qat_plugin.exporting.gguf.header import Header, read_header
from qat_plugin.exporting.gguf.read_cursor import Bytes

SEAL: Final = "qat_plugin.sha256"
DATA_SEAL: Final = "qat_plugin.data_sha256"
BLANK: Final = "0" * 64
_CHUNK = 1 << 22


def seal(path: Path) -> None:
    """Fill both checksums of a file in.

    Args:
        path: a complete GGUF file whose metadata has both keys with :data:`BLANK` for values.

    Raises:
        CheckpointError: when it is damaged, or has not both keys.
    """
    header = read_header(path)
    _check_keys(header)
    with path.open("r+b") as file:
        for key, digest in ((DATA_SEAL, _data_digest), (SEAL, _header_digest)):
            file.seek(header.spans[key][0])
            file.write(digest(header).encode())
            file.flush()  # the mapped header sees it: the second checksum is over the first
            header = read_header(path)


def is_sealed(header: Header) -> bool:
    """Whether a file carries checksums."""
    return SEAL in header.metadata or DATA_SEAL in header.metadata


def check_seal(header: Header) -> None:
    """Compare a file with its checksums, reading it once; a file without any is left alone.

    Raises:
        CheckpointError: when it is not what was written.
    """
    if not is_sealed(header):
        _check_unnamed(header)
        return
    _check_keys(header)
    if header.metadata[SEAL] != _header_digest(header):
        raise CheckpointError(
            f"{header.path} is damaged: its header does not match its checksum ({SEAL}). If another program made it of "
            "such a file and copied the key (llama-quantize does), read it with checksums=False"
        )
    if header.metadata[DATA_SEAL] != _data_digest(header):
        raise CheckpointError(
            f"{header.path} is damaged or was cut short: its tensors do not match their checksum ({DATA_SEAL})"
        )


def _check_keys(header: Header) -> None:
    for key in (SEAL, DATA_SEAL):
        value = header.metadata.get(key)
        if not isinstance(value, str) or len(value) != len(BLANK) or not value.isascii():
            raise CheckpointError(
                f"{header.path} is damaged: its metadata has no {key} of {len(BLANK)} digits beside the other checksum"
            )


def _check_unnamed(header: Header) -> None:
    """A damaged header may hide the checksums: their names are there, but not as keys."""
    text = header.file[: header.data_start].tobytes()
    for key in (SEAL, DATA_SEAL):
        if (at := text.find(key.encode())) >= 0:
            raise CheckpointError(f"{header.path} is damaged: {key} is in its header, but not as a key (at byte {at})")


def _header_digest(header: Header) -> str:
    start, stop = header.spans[SEAL]
    digest = hashlib.sha256(header.file[:start].data)
    digest.update(BLANK.encode())
    digest.update(header.file[stop : header.data_start].data)
    return digest.hexdigest()


def _data_digest(header: Header) -> str:
    digest = hashlib.sha256()
    data: Bytes = header.file[header.data_start :]
    for at in range(0, len(data), _CHUNK):
        digest.update(data[at : at + _CHUNK].data)
    return digest.hexdigest()
