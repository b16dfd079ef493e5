"""Texts on which tokenizers disagree, if they do."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from qat_plugin.exporting.gguf.reference import encode

_TEXTS = (
    "Hello world", " leading space", "  two  inner   spaces", "trailing ", "line\nbreak\n\n\nend", "tab\tand\t\ttabs",
    "\r\n", "naïve café", "日本語のテキスト", "한국어 문장", "😀 👩\u200d👩\u200d👧 🇩🇪", "control \x01\x1b\x7f",
    "12345 3.14 1e-9", "don't I'LL we've", "def f(x):\n    return x[0] != {'a': \"b\"}", "UPPER lower MiXed", "a",
    "\u00a0\u2003wide\u200bspaces", "<|im_start|>[INST]",
)  # fmt: skip


def odd_strings(tokenizer: Any) -> Iterator[str]:
    """Emoji, CJK, leading spaces, newlines, tabs, control characters, and special tokens as text."""
    yield from _TEXTS
    for name in ("bos_token", "eos_token", "unk_token"):
        token = getattr(tokenizer, name, None)
        if token:
            yield f"before {token} after"


def compare_tokens(reader: str, tokenizer: Any, tokens_of: Callable[[str], list[int]]) -> str:
    """One phrase: on how many strings another tokenizer gives the same ids."""
    texts = list(odd_strings(tokenizer))
    other = [text for text in texts if tokens_of(text) != encode(tokenizer, text)]
    if not other:
        return f"{reader}'s tokenizer gives the same ids on {len(texts)} odd strings"
    shown = ", ".join(repr(text) for text in other[:3])
    return f"{reader}'s TOKENIZER DIFFERS on {len(other)} of {len(texts)} odd strings, such as {shown}"
