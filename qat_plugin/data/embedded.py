"""A corpus that is on every machine: the source text of Python's standard library."""

from __future__ import annotations

import hashlib
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from qat_plugin.data.documents import SEPARATOR, Documents
from qat_plugin.errors import DataError

TRAIN_CHARACTERS = 4_000_000
VALID_CHARACTERS = 250_000

_SKIPPED_FOLDERS = {
    "__pycache__",
    "dist-packages",  # not the standard library: what is installed differs between machines
    "site-packages",
    "encodings",  # tables of characters, each like the next
    "ensurepip",
    "idlelib",
    "lib2to3",
    "pydoc_data",  # the language reference as string literals
    "test",
    "tests",
    "turtledemo",
}


@dataclass(frozen=True)
class Corpus:
    """Text to train on and text of other files to evaluate on; files are separated by ``<|endoftext|>``.

    Attributes:
        train: source text of the training files.
        valid: source text of the held-out files.
        fingerprint: sha256 of both, in hexadecimal.
    """

    train: str = field(repr=False)
    valid: str = field(repr=False)
    fingerprint: str

    @property
    def train_documents(self) -> Documents:
        """The training text, one document a file."""
        return Documents.from_text(self.train, "the embedded training text")

    @property
    def valid_documents(self) -> Documents:
        """The held-out text, one document a file."""
        return Documents.from_text(self.valid, "the embedded held-out text")


def embedded_corpus(
    *,
    train_characters: int = TRAIN_CHARACTERS,
    valid_characters: int = VALID_CHARACTERS,
    root: Path | None = None,
) -> Corpus:
    """Source text of Python's standard library, whole files up to the given numbers of characters.

    Which files are held out, and which are left out where there is more text than asked for, depends on nothing but
    their paths within the library: it is the same on every machine with the same Python. Within each part the files
    are in the order of their names.

    Args:
        train_characters: least amount of training text, as far as there is so much.
        valid_characters: the same for the held-out text.
        root: folder of the library; that of the running interpreter by default.

    Raises:
        DataError: when there is too little source text, as in some embedded or zipped Pythons.
    """
    root = root or Path(sysconfig.get_path("stdlib"))
    held_out: dict[str, str] = {}
    training: dict[str, str] = {}
    remaining = {True: valid_characters, False: train_characters}
    for name in sorted(_python_files(root), key=_rank):
        holds_out = remaining[True] > 0
        if remaining[holds_out] <= 0:
            break
        if text := _source_text(root / name):
            (held_out if holds_out else training)[name] = text
            remaining[holds_out] -= len(text)
    if not training:
        raise DataError(
            f"no source text of Python's standard library under {root}: this Python ships without it; "
            "give a text file of your own (data.train=, data.valid=) and a model (model.path=)"
        )
    train, valid = (SEPARATOR.join(part[name] for name in sorted(part)) for part in (training, held_out))
    return Corpus(train, valid, hashlib.sha256(f"{len(train)} {train}{valid}".encode()).hexdigest())


def _python_files(root: Path) -> Iterator[str]:
    for path in root.rglob("*.py"):
        relative = path.relative_to(root)
        # _sysconfigdata holds paths and flags of one machine's build; its namesakes lie in config-*/
        generated = path.name.startswith("_sysconfigdata") or relative.parts[0].startswith("config-")
        if not generated and _SKIPPED_FOLDERS.isdisjoint(relative.parts):
            yield relative.as_posix()


def _rank(name: str) -> bytes:
    return hashlib.sha256(name.encode()).digest()


def _source_text(path: Path) -> str:
    """The text of a file, empty if it is not UTF-8 (Python allows other encodings) or holds the separator."""
    try:
        text = path.read_bytes().decode("utf-8").replace("\r\n", "\n")
    except UnicodeDecodeError:
        return ""
    return "" if SEPARATOR in text or not text.strip() else text
