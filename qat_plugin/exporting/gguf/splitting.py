"""How a tokenizer splits text before it merges, which GGUF has only a name or a flag for.

A sealed file carries the two parts of ``tokenizer.json`` that say it in ``qat_plugin.splitting``, so that a model is
measured on the same tokens after it was read back. In other files SentencePiece's kind is split as llama.cpp does.
"""

from __future__ import annotations

import json
from typing import Any, Final

from qat_plugin.exporting.gguf.header import Header

KEY: Final = "qat_plugin.splitting"
_PARTS: Final = ("normalizer", "pre_tokenizer")
_SPACE: Final = "\u2581"


def splitting_of(tokenizer: Any) -> str:
    """The value of the key, of a tokenizer of transformers or tokenizers."""
    content = json.loads(getattr(tokenizer, "backend_tokenizer", tokenizer).to_str())
    return json.dumps({part: content.get(part) for part in _PARTS})


def split_as_written(tokenizer: Any, header: Header, *, sealed: bool) -> None:
    """Let a tokenizer that transformers built from a file split text as the file's own, in place.

    Args:
        tokenizer: of transformers.
        header: of the file.
        sealed: its own keys can be believed.

    Raises:
        ValueError: (or what ``tokenizers`` raises) when the key is no such description.
    """
    parts: Any = None
    if sealed and KEY in header.metadata:
        parts = json.loads(header.metadata[KEY])
        if not isinstance(parts, dict) or parts.keys() != set(_PARTS):
            raise ValueError(f"{KEY} does not say how text is split")
    elif header.metadata.get("tokenizer.ggml.model") == "llama":
        parts = _by_llama_cpp(prefix=header.metadata.get("tokenizer.ggml.add_space_prefix") is not False)
    if parts is not None:
        rebuild(tokenizer, json.loads(tokenizer.backend_tokenizer.to_str()) | parts)


def rebuild(tokenizer: Any, described: dict[str, Any]) -> None:
    """Let a tokenizer of transformers be what a ``tokenizer.json`` describes."""
    from tokenizers import Tokenizer

    tokenizer._tokenizer = Tokenizer.from_str(json.dumps(described))


def _by_llama_cpp(*, prefix: bool) -> dict[str, Any]:
    """A space before each piece of text, whether it begins with one or not; transformers puts fewer."""
    first = [{"type": "Prepend", "prepend": _SPACE}] if prefix else []
    spaces = {"type": "Replace", "pattern": {"String": " "}, "content": _SPACE}
    return {"normalizer": {"type": "Sequence", "normalizers": [*first, spaces]}, "pre_tokenizer": None}
