"""Documents -> one stream of token ids."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Protocol

import torch

from qat_plugin.data.documents import Documents
from qat_plugin.measure import Progress, progressing

_PIECE = 1 << 20  # characters: about a second of tokenizing, so that progress can be shown within one long text


class Tokenizer(Protocol):
    """What is used of a transformers tokenizer."""

    bos_token_id: int | None
    eos_token_id: int | None

    def __call__(self, text: list[str], **options: Any) -> Any:
        """Return a mapping with ``input_ids``: a list of token ids for each text."""


def encode(documents: Documents, tokenizer: Tokenizer, *, progress: Progress | bool = True) -> torch.Tensor:
    """Token ids of all documents in their order, with the end-of-text token between two of them.

    No beginning-of-text token is added (:class:`~qat_plugin.data.windows.TokenWindows` puts one before each window). A
    document of up to a million characters is tokenized in one piece; a longer one is cut at line ends.

    Args:
        documents: what to encode.
        tokenizer: a transformers tokenizer.
        progress: progress on stderr once it has taken two seconds, nothing, or a callback(done, total) in characters.

    Returns:
        int32 tensor [tokens].
    """
    separator = tokenizer.eos_token_id if tokenizer.eos_token_id is not None else tokenizer.bos_token_id
    stream: list[torch.Tensor] = []
    done = 0
    with progressing(progress, "tokenizing", sum(map(len, documents.texts))) as advance:
        for pieces, closes in _batches(documents):
            # verbose=False: else it warns that a text is longer than the model's context; windows are cut afterwards
            encoded = tokenizer(pieces, add_special_tokens=False, verbose=False)["input_ids"]
            for ids, closing in zip(encoded, closes, strict=True):
                if closing and separator is not None:
                    ids = [*ids, separator]
                stream.append(torch.tensor(ids, dtype=torch.int32))
            done += sum(map(len, pieces))
            advance(done)
    return torch.cat(stream)


def _batches(documents: Documents) -> Iterator[tuple[list[str], list[bool]]]:
    """Groups of about ``_PIECE`` characters: texts, and for each whether a document ends there and another follows."""
    pieces: list[str] = []
    closes: list[bool] = []
    last = len(documents.texts) - 1
    for index, text in enumerate(documents.texts):
        parts = list(_pieces(text))
        pieces += parts
        closes += [False] * (len(parts) - 1) + [index != last]
        if sum(map(len, pieces)) >= _PIECE:
            yield pieces, closes
            pieces, closes = [], []
    if pieces:
        yield pieces, closes


def _pieces(text: str) -> Iterator[str]:
    start = 0
    while len(text) - start > _PIECE:
        end = text.rfind("\n", start, start + _PIECE) + 1 or start + _PIECE
        yield text[start:end]
        start = end
    yield text[start:]
