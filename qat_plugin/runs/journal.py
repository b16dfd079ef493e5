"""What a run says: to the console in short, to the folder's ``log`` in full."""

from __future__ import annotations

import logging
import sys
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Final

_CHATTY: Final = ("lightning", "lightning.pytorch", "lightning.fabric", "transformers", "torch.distributed")
"""Loggers with handlers of their own. Their messages go into the log, not to the console."""

_KNOWN: Final = (
    "does not have many workers",
    "isinstance(treespec, LeafSpec)",
    "resuming from a checkpoint that ended before the epoch ended",
    "resuming from a checkpoint saved",
    "`max_epochs` was not set",
    "You passed in a `val_dataloader` but have no `validation_step`",
)
"""Warnings that are expected here and help nobody; they too go into the log."""

_PACKAGE: Final = Path(__file__).resolve().parents[1]

_said = logging.getLogger("qat_plugin.runs.said")


def say(text: str) -> None:
    """Tell the user one thing, on stdout, and put it into the log."""
    _said.info(text)


@contextmanager
def journal(log: Path | None, *, verbose: bool = False) -> Iterator[None]:
    """Route all messages of a run.

    Args:
        log: file that everything is appended to; ``None`` for no file.
        verbose: show on the console what otherwise goes only to the log.
    """
    root = logging.getLogger()
    with ExitStack() as stack:
        if log is not None:
            stack.enter_context(_handler(root, _file_handler(log)))
        stack.enter_context(_handler(root, _console_handler(verbose)))
        stack.enter_context(_handler(_said, _plain_handler()))
        for name in _CHATTY:
            stack.enter_context(_passing_on(logging.getLogger(name)))
        stack.enter_context(_captured_warnings())
        level, _said.level = _said.level, logging.INFO
        stack.callback(_said.setLevel, level)
        yield


def _file_handler(log: Path) -> logging.Handler:
    handler = logging.FileHandler(log, encoding="utf-8")
    handler.setFormatter(logging.Formatter("%(asctime)s %(name)s %(levelname)s %(message)s"))
    return handler


def _console_handler(verbose: bool) -> logging.Handler:
    handler = logging.StreamHandler(sys.stderr)
    handler.setLevel(logging.INFO if verbose else logging.WARNING)
    handler.setFormatter(logging.Formatter("%(message)s"))
    if not verbose:
        handler.addFilter(lambda record: not any(text in record.getMessage() for text in _KNOWN))
    handler.addFilter(lambda record: record.name != _said.name)
    return handler


def _plain_handler() -> logging.Handler:
    handler = logging.StreamHandler(sys.stdout)
    handler.setFormatter(logging.Formatter("%(message)s"))
    return handler


@contextmanager
def _handler(logger: logging.Logger, handler: logging.Handler) -> Iterator[None]:
    logger.addHandler(handler)
    try:
        yield
    finally:
        logger.removeHandler(handler)
        handler.close()


@contextmanager
def _passing_on(logger: logging.Logger) -> Iterator[None]:
    """Its records go up to the root's handlers instead of its own."""
    handlers, propagate = logger.handlers, logger.propagate
    logger.handlers, logger.propagate = [], True
    try:
        yield
    finally:
        logger.handlers, logger.propagate = handlers, propagate


@contextmanager
def _captured_warnings() -> Iterator[None]:
    """Into the log; this package's own as the sentence that they are, without file and line."""
    theirs = warnings.formatwarning

    def formatted(
        message: Warning | str, category: type[Warning], filename: str, lineno: int, line: str | None = None
    ) -> str:
        own = Path(filename).is_relative_to(_PACKAGE) and issubclass(category, UserWarning)
        return f"warning: {message}" if own else theirs(message, category, filename, lineno, line)

    with warnings.catch_warnings():
        logging.captureWarnings(True)
        warnings.formatwarning = formatted
        try:
            yield
        finally:
            warnings.formatwarning = theirs
            logging.captureWarnings(False)
