"""How llama.cpp calls the splitting of text that a byte-level tokenizer does before it merges: found by its pattern."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

DEFAULT = "default"
_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_LETTERS = r"[^\r\n\p{L}\p{N}]?\p{L}+"
_REST = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_WORDS = rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+"
_CAPITALS = rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*"
_MARKS = r" ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_PATTERNS = {
    (_GPT2,): "gpt-2",
    (rf"{_CONTRACTIONS}|{_LETTERS}|\p{{N}}{{1,3}}|{_REST}",): "llama-bpe",
    (rf"{_CONTRACTIONS}|{_LETTERS}|\p{{N}}|{_REST}",): "qwen2",
    (rf"{_WORDS}|{_CAPITALS}|\p{{N}}|{_MARKS}",): "tekken",
    (rf"{_WORDS}{_CONTRACTIONS}?|{_CAPITALS}{_CONTRACTIONS}?|\p{{N}}{{1,3}}|{_MARKS}",): "gpt-4o",
    ("digit", _GPT2): "smollm",
}
MERGES_IGNORED = ("llama-bpe", "tekken")
"""Where llama.cpp takes a word that is a token as a whole, as a tokenizer.json with ``ignore_merges`` does."""


def pre_tokenizer_of(tokenizer: Mapping[str, Any]) -> str | None:
    """The name of a tokenizer.json's splitting, or ``None`` when it is none that is known here."""
    return _PATTERNS.get(tuple(_splits(tokenizer.get("pre_tokenizer") or {})))


def is_byte_level(tokenizer: Mapping[str, Any]) -> bool:
    """Whether text becomes bytes, spelled as letters, before it is merged."""
    return any(part.get("type") == "ByteLevel" for part in _parts(tokenizer.get("pre_tokenizer") or {}))


def prefixes_space(tokenizer: Mapping[str, Any]) -> bool:
    """Whether a byte-level tokenizer puts a space before the text."""
    parts = _parts(tokenizer.get("pre_tokenizer") or {})
    return any(part.get("type") == "ByteLevel" and part.get("add_prefix_space") for part in parts)


def _splits(node: Mapping[str, Any]) -> Iterator[str]:
    for part in _parts(node):
        kind = part.get("type")
        if kind == "Split":
            pattern = part.get("pattern", {})
            isolated = part.get("behavior") in ("Isolated", "Removed") and bool(part.get("invert")) == (
                part.get("behavior") == "Removed"
            )
            yield str(pattern.get("Regex")) if isolated else "unknown"
        elif kind == "Digits":
            yield "digit" if part.get("individual_digits") else "digits"
        elif kind == "ByteLevel":
            if part.get("use_regex", True):
                yield _GPT2
        else:
            yield str(kind)


def _parts(node: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    if node.get("type") == "Sequence":
        for part in node.get("pretokenizers", ()):
            yield from _parts(part)
    elif node:
        yield node
