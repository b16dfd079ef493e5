"""The formats: what each is called, what it needs, and the module that writes and verifies it.

A format's module has

* ``Options``: a frozen dataclass of what can be set, with ``metadata={"help": ...}`` on each field;
* ``refusals(model, options) -> list[Refusal]``: what it cannot hold;
* ``write(model, path, options, progress) -> None``: writes the file (or fills the empty folder) ``path``, tensor by
  tensor; ``path`` is a temporary place, moved to its own when verified;
* ``verify(model, path, options) -> Verification``: reads it back with something that is not this package;
* ``usage(model, path, options) -> str``: how it is loaded, as three lines of code or a command;
* ``keeps_integers(options) -> bool``, only where an option gives them up.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Final, Protocol, get_type_hints

from qat_plugin.errors import ConfigError, did_you_mean
from qat_plugin.exporting.contents import Exportable
from qat_plugin.exporting.refusal import Refusal
from qat_plugin.exporting.verification import Verification

Told = Callable[[int], None]
"""Called with the number of tensors written so far."""


class Writer(Protocol):
    """What a format's module offers."""

    Options: type[Any]

    def refusals(self, model: Exportable, options: Any) -> list[Refusal]:
        """What the format cannot hold."""

    def write(self, model: Exportable, path: Path, options: Any, progress: Told) -> None:
        """Write the file, or fill the folder."""

    def verify(self, model: Exportable, path: Path, options: Any) -> Verification:
        """Read it back."""

    def usage(self, model: Exportable, path: Path, options: Any) -> str:
        """How it is loaded."""


@dataclass(frozen=True)
class Format:
    """One format.

    Attributes:
        name: as ``format=`` spells it.
        title: what it is, for people.
        module: in this room.
        needs: modules that must be importable.
        extra: the extra of this package that installs them; empty where they come with it.
        suffix: of the file; empty for a folder.
        of_adapters: it holds what QLoRA leaves, not a converted model.
        language: of transformers language models alone.
    """

    name: str
    title: str
    module: str
    needs: tuple[str, ...] = ()
    extra: str = ""
    suffix: str = ""
    of_adapters: bool = False
    language: bool = False

    @property
    def missing(self) -> list[str]:
        """Packages that are not installed."""
        return [name for name in self.needs if importlib.util.find_spec(name) is None]

    def writer(self) -> Writer:
        """The format's module.

        Raises:
            ConfigError: when a package it needs is not installed.
        """
        if self.missing:
            raise ConfigError(
                f'format={self.name} needs {", ".join(self.missing)}: pip install ".[{self.extra}]" in a checkout of '
                f'the project, or pip install "qat-plugin[{self.extra}]"'
            )
        module: Any = importlib.import_module(f"qat_plugin.exporting.{self.module}")
        return module  # type: ignore[no-any-return]

    def options(self, given: Mapping[str, Any]) -> Any:
        """The format's options from what was given.

        Raises:
            ConfigError: for an option that there is none of, or a value that is not allowed.
        """
        kind = self.writer().Options
        known, types = [entry.name for entry in fields(kind)], get_type_hints(kind)
        for name, value in given.items():
            if name not in known:
                raise ConfigError(
                    f"format={self.name} has no option {name!r}.{did_you_mean(name, known)} "
                    + (f"Its options: {', '.join(known)}" if known else "It has none")
                )
            if not _is_of(value, types[name]):
                raise ConfigError(
                    f"format={self.name}: option {name}={value!r} is of type {type(value).__name__}; it takes "
                    f"{_KINDS[types[name]]}"
                )
        return kind(**given)


_KINDS: Final[dict[Any, str]] = {
    str: "text, in quotes where it looks like a number",
    bool: "true or false",
    bool | None: "true, false or null",
    int: "a whole number",
}


def _is_of(value: object, kind: Any) -> bool:
    """Whether an option's value is of its type; a truth value is no number."""
    return isinstance(value, kind) and (kind is not int or not isinstance(value, bool))


FORMATS = {
    entry.name: entry
    for entry in (
        Format("converted", "this project's own files, with the model's configuration", "native"),
        Format("gguf", "GGUF, for llama.cpp and its kin", "gguf", needs=("gguf",), suffix=".gguf", language=True),
        Format("torchao", "a transformers directory with torchao's tensors", "torchao_checkpoint", language=True),
        Format(
            "compressed-tensors", "a transformers directory in compressed-tensors' format", "compressed",
            needs=("compressed_tensors",), extra="compressed-tensors", language=True,
        ),
        Format("onnx", "ONNX", "onnx", ("onnx", "onnx_ir", "onnxscript", "onnxruntime"), "onnx"),
        Format("executorch", "ExecuTorch", "executorch", ("executorch",), "executorch", ".pte"),
        Format("peft", "a peft adapter", "peft_adapter", ("peft",), "qlora", of_adapters=True),
        Format(
            "bitsandbytes", "a transformers directory with bitsandbytes' NF4", "bitsandbytes_checkpoint",
            ("bitsandbytes",), "qlora", of_adapters=True,
        ),
    )
}  # fmt: skip


def format_named(name: str) -> Format:
    """A format by its name.

    Raises:
        ConfigError: for a name that there is none of.
    """
    if name not in FORMATS:
        raise ConfigError(f"unknown export format {name!r}.{did_you_mean(name, FORMATS)} Formats: {', '.join(FORMATS)}")
    return FORMATS[name]
