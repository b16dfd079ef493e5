"""Errors meant for people: what was given, where, what is allowed, what to do.

Every error that a user can cause derives from :class:`QatError`; the command line prints its text without a traceback
and exits with code 2. Anything else that escapes is a bug and keeps its traceback.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class QatError(ValueError):
    """Base of all errors that a user's input can cause."""


class SchemeError(QatError):
    """A scheme's spelling or its combination of fields is not one the package knows."""


class PolicyError(QatError):
    """A policy does not fit the model it was resolved against."""


class PrepareError(QatError):
    """A model cannot be prepared for (or taken out of) quantization-aware training."""


class ConversionError(QatError):
    """A model cannot be converted, or a converted layer broke the promise of equal integers."""


class CheckpointError(QatError):
    """A file or a checkpoint is missing, truncated, corrupt, or belongs to another model."""


class ExportError(QatError):
    """A format cannot hold a model, or a written file does not hold what was trained."""


class DataError(QatError):
    """A dataset is missing, empty, or of the wrong form."""


class ConfigError(QatError):
    """A recipe, a command-line key or an argument's value is not allowed."""


def did_you_mean(given: str, allowed: Iterable[str], cutoff: float = 0.5) -> str:
    """Return " Did you mean 'x'?" for the closest of ``allowed``, or an empty string when nothing is close."""
    close = difflib.get_close_matches(given, [str(name) for name in allowed], n=3, cutoff=cutoff)
    if not close:
        return ""
    return " Did you mean " + " or ".join(repr(name) for name in close) + "?"
