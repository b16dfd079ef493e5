"""A tokenizer as GGUF holds it: tokens with types, merges or scores, and the ids of special tokens."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from qat_plugin.errors import ExportError
from qat_plugin.exporting.contents import Exportable
from qat_plugin.exporting.gguf.options import Options
from qat_plugin.exporting.gguf.pre_tokenizers import (
    DEFAULT,
    MERGES_IGNORED,
    is_byte_level,
    pre_tokenizer_of,
    prefixes_space,
)

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)
"""``gguf.TokenType``."""
_BYTE_TOKEN = re.compile(r"<0x[0-9A-F]{2}>")
_SPACE = "\u2581"
_KNOWN = "byte-level BPE (GPT-2, Llama 3, Qwen) and SentencePiece-like BPE with byte tokens (Llama 2, Gemma)"


@dataclass(frozen=True)
class Vocabulary:
    """What ``tokenizer.ggml.*`` will hold.

    Attributes:
        model: ``gpt2`` (byte-level BPE), ``llama`` (SentencePiece) or ``no_vocab``.
        pre: name of the splitting.
        tokens, types: by id.
        scores: of ``llama``; the greater, the earlier merged.
        merges: "left right", the earlier first.
        ids: ``bos``, ``eos``, ``unk``, ``pad`` -> id.
        flags: ``add_bos_token``, ``add_eos_token``, ``add_space_prefix``.
        chat_template: Jinja, or ``None``.
        notes: what the file does not say as the tokenizer does.
    """

    model: str
    pre: str = DEFAULT
    tokens: list[str] = field(default_factory=list)
    types: list[int] = field(default_factory=list)
    scores: list[float] = field(default_factory=list)
    merges: list[str] = field(default_factory=list)
    ids: Mapping[str, int] = field(default_factory=dict)
    flags: Mapping[str, bool] = field(default_factory=dict)
    chat_template: str | None = None
    notes: tuple[str, ...] = ()

    def add_to(self, writer: Any) -> None:
        """Its keys."""
        writer.add_tokenizer_model(self.model)
        if self.model == "no_vocab":
            return
        writer.add_tokenizer_pre(self.pre)
        writer.add_token_list(self.tokens)
        writer.add_token_types(self.types)
        if self.scores:
            writer.add_token_scores(self.scores)
        if self.merges:
            writer.add_token_merges(self.merges)
        for name, index in self.ids.items():
            getattr(writer, f"add_{name}_token_id")(index)
        writer.add_add_bos_token(self.flags["add_bos_token"])
        writer.add_add_eos_token(self.flags["add_eos_token"])
        writer.add_add_space_prefix(self.flags["add_space_prefix"])
        if self.chat_template:
            writer.add_chat_template(self.chat_template)


def vocabulary_of(model: Exportable, options: Options) -> Vocabulary:
    """The vocabulary of a model's tokenizer; an empty one where it has none.

    Raises:
        ExportError: for a kind of tokenizer that is not known here, or one with more tokens than the model.
    """
    tokenizer = model.tokenizer
    if tokenizer is None:
        return Vocabulary("no_vocab", notes=("no tokenizer was given: the file has no vocabulary",))
    content = _content(tokenizer)
    rows = int(model.config.vocab_size)
    if content["model"].get("type") != "BPE":
        raise ExportError(
            f"a tokenizer of type {content['model'].get('type')} has no form in GGUF that is known here; known are "
            f"{_KNOWN}. tokenizer=None writes the file without one"
        )
    tokens, types = _tokens(content, rows)
    ids = _special_ids(tokenizer)
    if is_byte_level(content):
        made = _byte_level(content, options)
    elif content["model"].get("byte_fallback"):
        made = _sentencepiece(content, tokens, types)
    else:
        raise ExportError(f"a BPE tokenizer without bytes has no form in GGUF; known are {_KNOWN}")
    flags = {**_added(tokenizer, ids), "add_space_prefix": made.flags.get("add_space_prefix", False)}
    template = getattr(tokenizer, "chat_template", None)
    return Vocabulary(
        made.model, made.pre, tokens, types, made.scores, made.merges, ids, flags,
        template if isinstance(template, str) else None, made.notes,
    )  # fmt: skip


def _content(tokenizer: Any) -> dict[str, Any]:
    """What its tokenizer.json says."""
    backend = getattr(tokenizer, "backend_tokenizer", tokenizer)
    if not hasattr(backend, "to_str"):
        raise ExportError(
            f"{type(tokenizer).__name__} is no tokenizer of transformers or tokenizers: there is no tokenizer.json to "
            "take a vocabulary from"
        )
    content: dict[str, Any] = json.loads(backend.to_str())
    return content


def _tokens(content: Mapping[str, Any], rows: int) -> tuple[list[str], list[int]]:
    """Tokens and types by id; ids that no token has are unused ones."""
    by_id = {int(index): token for token, index in content["model"]["vocab"].items()}
    types = {index: BYTE if _BYTE_TOKEN.fullmatch(token) else NORMAL for index, token in by_id.items()}
    if is_byte_level(content):
        types = dict.fromkeys(by_id, NORMAL)
    for added in content.get("added_tokens", ()):
        index, text = int(added["id"]), str(added["content"])
        if added["special"]:
            types[index] = CONTROL
        else:
            types[index], text = USER_DEFINED, text.replace(_SPACE, " ")
        by_id[index] = text
    for index, token in by_id.items():
        if token == content["model"].get("unk_token") and not is_byte_level(content):
            types[index] = UNKNOWN
    greatest = max(by_id)
    if greatest >= rows:
        raise ExportError(f"the tokenizer has a token {greatest} ({by_id[greatest]!r}), the model only {rows} rows")
    tokens = [by_id.get(index, _unused(index)) for index in range(rows)]
    # a vocabulary that was read from a file has the names of unused ones
    return tokens, [UNUSED if tokens[index] == _unused(index) else types[index] for index in range(rows)]


def _unused(index: int) -> str:
    return f"[PAD{index}]"


def _special_ids(tokenizer: Any) -> dict[str, int]:
    found = {name: getattr(tokenizer, f"{name}_token_id", None) for name in ("bos", "eos", "unk", "pad")}
    return {name: int(index) for name, index in found.items() if index is not None}


def _added(tokenizer: Any, ids: Mapping[str, int]) -> dict[str, bool]:
    """Which tokens stand before and after any text: asked of the tokenizer itself."""
    encoded = tokenizer.encode("a")
    got = list(getattr(encoded, "ids", encoded))
    return {
        "add_bos_token": bool(got) and got[0] == ids.get("bos"),
        "add_eos_token": len(got) > 1 and got[-1] == ids.get("eos"),
    }


def _byte_level(content: Mapping[str, Any], options: Options) -> Vocabulary:
    notes = []
    pre = options.pre_tokenizer or pre_tokenizer_of(content)
    if pre is None:
        pre = DEFAULT
        notes.append(
            "the tokenizer's splitting of text is none that is known here: tokenizer.ggml.pre is 'default', and "
            "llama.cpp may split words otherwise (pre_tokenizer= sets it)"
        )
    if bool(content["model"].get("ignore_merges")) != (pre in MERGES_IGNORED):
        notes.append(f"llama.cpp {'takes' if pre in MERGES_IGNORED else 'does not take'} whole words as tokens before "
                     f"it merges ({pre}), the tokenizer does the other")  # fmt: skip
    if content.get("normalizer"):
        notes.append(f"the tokenizer's normalizer ({content['normalizer'].get('type')}) has no place in the file")
    if prefixes_space(content):
        notes.append("the tokenizer puts a space before the text, which llama.cpp does not for this kind")
    return Vocabulary("gpt2", pre, merges=_merges(content), notes=tuple(notes))


def _sentencepiece(content: Mapping[str, Any], tokens: list[str], types: list[int]) -> Vocabulary:
    """Scores in the order of the merges: llama.cpp joins the pair whose result has the greatest."""
    merges = _merges(content)
    rank: dict[str, int] = {}
    for position, merge in enumerate(merges):
        rank.setdefault(merge.replace(" ", ""), position)
    last = len(merges)
    scores = [
        float(-rank.get(token, last)) if kind == NORMAL else 0.0 for token, kind in zip(tokens, types, strict=True)
    ]
    given = {tuple(merge.split(" ")) for merge in merges}
    known = {token for token, kind in zip(tokens, types, strict=True) if kind == NORMAL}
    other = sum(
        (token[:cut], token[cut:]) not in given
        for token in rank
        for cut in range(1, len(token))
        if token[:cut] in known and token[cut:] in known
    )
    notes: tuple[str, ...] = ()
    if other:
        notes = (
            f"llama.cpp may join {other} pairs of tokens that the tokenizer has no merge for (it merges by the "
            "score of the result)",
        )
    return Vocabulary("llama", DEFAULT, scores=scores, merges=merges, notes=notes,
                      flags={"add_space_prefix": _adds_space(content)})  # fmt: skip


def _adds_space(content: Mapping[str, Any]) -> bool:
    """Whether a space is put before the text."""
    text = json.dumps([content.get("normalizer"), content.get("pre_tokenizer")], ensure_ascii=False)
    if '"Prepend"' in text:
        return True
    return '"Metaspace"' in text and '"prepend_scheme": "never"' not in text


def _merges(content: Mapping[str, Any]) -> list[str]:
    return [merge if isinstance(merge, str) else " ".join(merge) for merge in content["model"]["merges"]]
