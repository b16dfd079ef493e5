"""The keys of a recipe with their defaults and lines of help, as the command shows them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import MISSING as NO_DEFAULT
from dataclasses import fields, is_dataclass
from typing import Any

from qat_plugin.config.schema import Config


def keys_with_help(section: type = Config, prefix: str = "") -> Iterator[tuple[str, str, str]]:
    """(dotted key, default, help) of every key below a section."""
    for entry in fields(section):
        name = prefix + entry.name
        default: Any = entry.default if entry.default_factory is NO_DEFAULT else entry.default_factory()
        if is_dataclass(default):
            yield from keys_with_help(type(default), name + ".")
        else:
            yield name, _spelled(default), entry.metadata["help"]


def help_of(section: object, name: str) -> str:
    """The line of help of one key of a section's dataclass; empty where there is none."""
    entries = fields(section) if isinstance(section, type) and is_dataclass(section) else ()
    return next((str(entry.metadata["help"]) for entry in entries if entry.name == name), "")


def _spelled(value: Any) -> str:
    """A default as it is written on the command line."""
    if isinstance(value, list):
        return "[" + ",".join(map(str, value)) + "]"
    return {"None": "null", "True": "true", "False": "false", "???": "(needed)"}.get(str(value), str(value))
