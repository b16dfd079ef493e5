"""Prompts and answers from JSONL or JSON: chat, Alpaca and prompt/completion records, as turns of a conversation."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from qat_plugin.data.documents import existing_file, read_text
from qat_plugin.errors import DataError

FORMS: Final = (
    '{"messages": [{"role": "user", "content": "..."}, {"role": "assistant", "content": "..."}]}, '
    '{"conversations": [{"from": "human", "value": "..."}, {"from": "gpt", "value": "..."}]}, '
    '{"instruction": "...", "input": "...", "output": "..."} or {"prompt": "...", "completion": "..."}'
)
_ROLES: Final = {
    "system": "system", "user": "user", "human": "user", "assistant": "assistant", "gpt": "assistant",
    "model": "assistant", "bot": "assistant", "tool": "tool",
}  # fmt: skip


@dataclass(frozen=True)
class Turn:
    """One message: role ``system``, ``user``, ``assistant`` or ``tool``, and its text."""

    role: str
    content: str


Conversation = tuple[Turn, ...]


@dataclass(frozen=True)
class Conversations:
    """Records in their order.

    Attributes:
        items: each has at least one assistant turn with text.
        source: the file, for messages.
        fingerprint: sha256 of roles and texts, in hexadecimal.
    """

    items: tuple[Conversation, ...]
    source: str

    @property
    def fingerprint(self) -> str:
        """sha256 of roles and texts."""
        content = json.dumps([[(turn.role, turn.content) for turn in item] for item in self.items])
        return hashlib.sha256(content.encode()).hexdigest()

    @classmethod
    def read(cls, path: str | os.PathLike[str]) -> Conversations:
        """Read a ``.jsonl`` file, one record a line, or a ``.json`` file with an array of records.

        Raises:
            DataError: naming the file and the line (or the record's number) that is not of a known form.
        """
        file = existing_file(path, also=(".json",))
        items = tuple(_conversation(record, where) for record, where in _records(file))
        if not items:
            raise DataError(f"{file} holds no record; each is {FORMS}")
        return cls(items, str(file))


def _records(file: Path) -> Iterator[tuple[Any, str]]:
    text = read_text(file)
    if file.suffix.lower() == ".json":
        try:
            records = json.loads(text)
        except json.JSONDecodeError as error:
            raise DataError(
                f"{file} is not JSON: {error.msg} at line {error.lineno}; with one record a line, call it .jsonl"
            ) from error
        if not isinstance(records, list):
            raise DataError(f"{file} is a JSON {type(records).__name__}, an array of records is needed: {FORMS}")
        yield from ((record, f"{file} record {number}") for number, record in enumerate(records, start=1))
        return
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            where = f"{file} line {number}"
            try:
                yield json.loads(line), where
            except json.JSONDecodeError as error:
                raise DataError(
                    f"{where} is not JSON: {error.msg} at column {error.colno}; a record is {FORMS}"
                ) from error


def _conversation(record: Any, where: str) -> Conversation:
    if not isinstance(record, Mapping):
        raise DataError(f"{where} is a JSON {type(record).__name__}, not an object: {FORMS}")
    if "messages" in record:
        turns = _turns(record["messages"], "role", "content", where)
    elif "conversations" in record:
        turns = _turns(record["conversations"], "from", "value", where)
    elif "instruction" in record:
        extra = _text(record, "input", where, needed=False)
        question = _text(record, "instruction", where) + (f"\n\n{extra}" if extra.strip() else "")
        turns = (Turn("user", question), Turn("assistant", _text(record, "output", where)))
    elif "prompt" in record:
        turns = (Turn("user", _text(record, "prompt", where)), Turn("assistant", _text(record, "completion", where)))
    else:
        keys = ", ".join(map(repr, record)) or "none"
        raise DataError(f"{where} has the keys {keys}; a record is {FORMS}")
    if not any(turn.role == "assistant" and turn.content.strip() for turn in turns):
        raise DataError(f"{where} has no answer: at least one assistant turn with text is needed to learn from")
    return turns


def _turns(messages: Any, role: str, content: str, where: str) -> Conversation:
    if not isinstance(messages, list) or not messages:
        found = "an empty list" if messages == [] else type(messages).__name__
        raise DataError(f"{where}: the messages are {found}, a list of turns is needed: {FORMS}")
    turns = []
    for number, message in enumerate(messages, start=1):
        if not isinstance(message, Mapping) or not isinstance(message.get(content), str):
            raise DataError(f"{where}, message {number}: an object with strings {role!r} and {content!r} is needed")
        name = str(message.get(role)).lower()
        if name not in _ROLES:
            raise DataError(f"{where}, message {number}: role {name!r} is not one of {', '.join(_ROLES)}")
        turns.append(Turn(_ROLES[name], message[content]))
    return tuple(turns)


def _text(record: Mapping[str, Any], key: str, where: str, *, needed: bool = True) -> str:
    value = record.get(key, None if needed else "")
    if value is None and not needed:
        return ""
    if not isinstance(value, str):
        found = "is missing" if key not in record else f"is {type(value).__name__}"
        raise DataError(f"{where}: {key!r} {found}, a string is needed; a record is {FORMS}")
    return value
