"""Conversation -> token ids, and which of them are answers."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Final

import torch

from qat_plugin.data.conversations import Conversation
from qat_plugin.data.packing import IGNORED, Example
from qat_plugin.errors import DataError

_PREAMBLE: Final = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request."
)
_HEADINGS: Final = {
    "system": "### System:", "user": "### Instruction:", "tool": "### Result:", "assistant": "### Response:",
}  # fmt: skip
_GENERATION: Final = "{% generation"


def encode_conversation(conversation: Conversation, tokenizer: Any, *, answers_only: bool, where: str) -> Example:
    """Token ids and labels of one conversation.

    With a chat template, its text is the template's. Without one it is Alpaca's form: a preamble, then each turn under
    a heading, answers closed by the end-of-text token. Labels are the ids, and -100 where nothing is to be learned.

    Args:
        conversation: turns; the assistant's are the answers.
        tokenizer: a transformers tokenizer.
        answers_only: learn only the answers, their end-of-turn token included.
        where: file and record, for messages.

    Returns:
        int64 [tokens] ids and labels.

    Raises:
        DataError: when the template fails on this conversation, or where its answers are cannot be told.
    """
    if getattr(tokenizer, "chat_template", None):
        ids, learned = _by_template(conversation, tokenizer, where)
    else:
        ids, learned = _plainly(conversation, tokenizer)
    labels = [token if take or not answers_only else IGNORED for token, take in zip(ids, learned, strict=True)]
    return torch.tensor(ids), torch.tensor(labels)


def _by_template(conversation: Conversation, tokenizer: Any, where: str) -> tuple[list[int], list[bool]]:
    messages = [{"role": turn.role, "content": turn.content} for turn in conversation]
    try:
        if _GENERATION in tokenizer.chat_template.replace("{%-", "{%").replace("{%  ", "{% "):
            marked = tokenizer.apply_chat_template(messages, return_dict=True, return_assistant_tokens_mask=True)
            return list(marked["input_ids"]), [bool(flag) for flag in marked["assistant_masks"]]
        return _by_prefixes(messages, tokenizer, where)
    except DataError:
        raise
    except Exception as error:  # Jinja and templates raise what they like
        reason = str(error).strip().split("\n")[0] or type(error).__name__
        raise DataError(f"{where}: the tokenizer's chat template does not take this conversation: {reason}") from error


def _by_prefixes(messages: list[dict[str, str]], tokenizer: Any, where: str) -> tuple[list[int], list[bool]]:
    """An answer is what the template adds with it to the text that asks for it."""

    def text_of(upto: int, *, asking: bool = False) -> str:
        text: str = tokenizer.apply_chat_template(messages[:upto], tokenize=False, add_generation_prompt=asking)
        return text

    whole = text_of(len(messages))
    spans = []
    for number, message in enumerate(messages):
        if message["role"] == "assistant":
            asked, answered = text_of(number, asking=True), text_of(number + 1)
            if not (whole.startswith(answered) and answered.startswith(asked)):
                raise DataError(
                    f"{where}: the tokenizer's chat template changes earlier turns when later ones come, so that the "
                    "answers cannot be told apart. Use data.answers_only=false, or give the template {% generation %} "
                    "marks around assistant turns"
                )
            spans.append((len(asked), len(answered)))
    encoded = tokenizer(whole, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    ids, offsets = encoded["input_ids"], encoded["offset_mapping"]
    return list(ids), [any(a < end and start < b for a, b in spans) for start, end in offsets]


def _plainly(conversation: Conversation, tokenizer: Any) -> tuple[list[int], list[bool]]:
    ids: list[int] = []
    learned: list[bool] = []
    if tokenizer.bos_token_id is not None:
        ids, learned = [tokenizer.bos_token_id], [False]
    end = tokenizer.eos_token_id if tokenizer.eos_token_id is not None else tokenizer.bos_token_id
    for text, answer in _pieces(conversation):
        tokens = list(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])
        if answer and end is not None:
            tokens.append(end)
        ids += tokens
        learned += [answer] * len(tokens)
    return ids, learned


def _pieces(conversation: Conversation) -> Iterator[tuple[str, bool]]:
    """Texts, and whether each is an answer."""
    if conversation[0].role != "system":
        yield f"{_PREAMBLE}\n\n", False
    before = ""
    for turn in conversation:
        yield f"{before}{_HEADINGS[turn.role]}\n", False
        yield turn.content, turn.role == "assistant"
        before = "\n\n"
