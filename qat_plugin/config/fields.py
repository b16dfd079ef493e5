"""What the dataclasses of a recipe are written with: keys with their line of help, and checks that name the key."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import field
from pathlib import Path
from typing import Any

from qat_plugin.errors import ConfigError, did_you_mean


def is_hub_name(path: str) -> bool:
    """Whether a model's path is a hub's ``org/name``: of that form, and no directory ``org`` here."""
    named = re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", path) is not None
    return named and not Path(path.partition("/")[0]).exists()


def absolute(path: str) -> str:
    """A path that means the same from any working directory, from which a run may be resumed; blank stays blank."""
    return path and str(Path(path).expanduser().absolute())


def help_text(text: str) -> dict[str, str]:
    """Metadata of a dataclass field: its line of help."""
    return {"help": text}


def option(default: Any, help: str) -> Any:
    """A key of a recipe with its default and its line of help."""
    return field(default=default, metadata=help_text(help))


def check_choice(key: str, value: str, allowed: Sequence[str], also: str = "") -> None:
    """Raise ConfigError unless ``value`` is one of ``allowed``."""
    if value not in allowed:
        listed = ", ".join([*allowed, also] if also else allowed)
        raise ConfigError(f"{key}={value} is not allowed: it is one of {listed}.{did_you_mean(value, allowed)}")


def check_at_least(key: str, value: float | None, least: float) -> None:
    """Raise ConfigError when a number is given and below ``least`` (or NaN)."""
    if value is not None and not value >= least:
        raise ConfigError(f"{key}={value} is not allowed: it must be at least {least}")


def check_above(key: str, value: float | None, bound: float) -> None:
    """Raise ConfigError when a number is given and not above ``bound``."""
    if value is not None and not value > bound:
        raise ConfigError(f"{key}={value} is not allowed: it must be above {bound}")
