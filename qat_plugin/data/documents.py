"""Text as documents: from a plain file, a JSONL file or memory, with errors that say which line is wrong."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

from qat_plugin.errors import DataError, did_you_mean

SEPARATOR = "<|endoftext|>"
"""Stands between the documents of a plain text, as in TinyStories and GPT-2's training data."""

JSONL_SUFFIXES = (".jsonl", ".ndjson")
_REFUSED_SUFFIXES = {
    ".json": "write one object per line and call it .jsonl",
    ".csv": "convert it to .jsonl with one object per line",
    ".parquet": "convert it to .jsonl with one object per line",
    ".arrow": "convert it to .jsonl with one object per line",
    ".gz": "unpack it first",
    ".zst": "unpack it first",
    ".zip": "unpack it first",
}


@dataclass(frozen=True)
class Documents:
    """A sequence of texts that belong together.

    Attributes:
        texts: the documents in their order; none is blank.
        source: where they come from, for messages: a path, or a few words.
    """

    texts: tuple[str, ...] = field(repr=False)
    source: str

    def __post_init__(self) -> None:
        if not any(text.strip() for text in self.texts):
            raise DataError(f"{self.source} is empty: it holds no text; give at least one sequence of text")

    @cached_property
    def fingerprint(self) -> str:
        """sha256 of the texts, in hexadecimal; the boundaries between documents count, the source does not."""
        digest = hashlib.sha256()
        for text in self.texts:
            content = text.encode("utf-8", "surrogatepass")
            digest.update(len(content).to_bytes(8, "little"))
            digest.update(content)
        return digest.hexdigest()

    @classmethod
    def from_text(cls, text: str, source: str = "the given text") -> Documents:
        """Split a text at ``<|endoftext|>``; a text without it is one document and is not changed in any way.

        Raises:
            DataError: when the text is blank.
        """
        parts = text.split(SEPARATOR)
        texts = parts if len(parts) == 1 else [part.strip("\n") for part in parts]
        return cls(tuple(part for part in texts if part.strip()), source)

    @classmethod
    def read(cls, path: str | os.PathLike[str], *, key: str = "text") -> Documents:
        """Read a file of UTF-8: JSONL where its name ends in .jsonl or .ndjson, else plain text.

        Args:
            path: plain text, its documents separated by ``<|endoftext|>``; or one JSON object per line.
            key: the entry of each JSON object that holds the text.

        Raises:
            DataError: when the path is missing or a directory, the bytes are not UTF-8, a JSONL line is not an object
                with a string under ``key``, or there is no text at all.
        """
        file = existing_file(path)
        content = read_text(file)
        if file.suffix.lower() in JSONL_SUFFIXES:
            return cls(tuple(text for text in _jsonl_texts(content, str(file), key) if text.strip()), str(file))
        return cls.from_text(content, str(file))


def existing_file(path: str | os.PathLike[str], *, also: tuple[str, ...] = ()) -> Path:
    """The file, with ``~`` expanded.

    Args:
        path: as it was given.
        also: suffixes that are read here though :class:`Documents` refuses them.

    Raises:
        DataError: when it is missing, a directory, or of a kind that is not read.
    """
    if "\n" in os.fspath(path):
        raise DataError(
            f"the data is a text of {len(os.fspath(path))} characters where a path is expected; "
            "wrap it: Documents.from_text(text)"
        )
    file = Path(path).expanduser()
    if file.is_dir():
        names = sorted(entry.name for entry in file.iterdir())
        listed = ", ".join(names[:5]) + (", ..." if len(names) > 5 else "") or "nothing"
        raise DataError(f"{str(path)!r} is a directory, a file is needed; it holds {listed}")
    if not file.is_file():
        siblings = [entry.name for entry in file.parent.iterdir()] if file.parent.is_dir() else []
        where = "" if file.parent.is_dir() else f" (nor does the folder {file.parent.absolute()})"
        raise DataError(
            f"data file {str(path)!r} does not exist{where}; looked for "
            f"{file.absolute()}.{did_you_mean(file.name, siblings)}"
        )
    suffix = file.suffix.lower()
    if suffix not in also and (advice := _REFUSED_SUFFIXES.get(suffix)):
        raise DataError(f"{str(path)!r}: {file.suffix} files are not read, only plain text and .jsonl; {advice}")
    return file


def read_text(file: Path) -> str:
    """The content of a UTF-8 file, line ends as ``\\n``.

    Raises:
        DataError: when it cannot be read or is not UTF-8.
    """
    try:
        content = file.read_bytes()
    except OSError as error:
        raise DataError(f"{file} cannot be read: {error.strerror or error}") from error
    try:
        return content.decode("utf-8-sig").replace("\r\n", "\n")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise DataError(
            f"{file} is not UTF-8: byte {content[error.start]:#04x} at offset {error.start} (line {line}); "
            "convert it to UTF-8, or unpack it if it is compressed"
        ) from error


def _jsonl_texts(content: str, source: str, key: str) -> Iterator[str]:
    # not splitlines(): U+2028 and its like may stand unescaped inside a JSON string
    for number, line in enumerate(content.split("\n"), start=1):
        if line.strip():
            yield _jsonl_text(line, f"{source} line {number}", key)


def _jsonl_text(line: str, where: str, key: str) -> str:
    try:
        entry = json.loads(line)
    except json.JSONDecodeError as error:
        raise DataError(
            f"{where} is not JSON: {error.msg} at column {error.colno}; each line must be one object such as "
            f'{{"{key}": "..."}}'
        ) from error
    if not isinstance(entry, dict):
        raise DataError(f"{where} is a JSON {type(entry).__name__}, not an object with the key {key!r}")
    if key not in entry:
        keys = ", ".join(repr(name) for name in entry) or "none"
        raise DataError(f"{where} lacks the key {key!r}; its keys: {keys}.{did_you_mean(key, entry)}")
    if not isinstance(entry[key], str):
        raise DataError(f"{where}: {key!r} is {type(entry[key]).__name__}, a string is needed")
    return str(entry[key])
