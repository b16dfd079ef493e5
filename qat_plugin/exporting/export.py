"""A converted model into one format: refused, or written, read back, proven and put in place.

::

    converted network -> refusals? -> temporary place: write, tensor by tensor
                                   -> verify (an independent reader) -> fails: nothing is left behind
                                   -> model card beside it -> moved into its place
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from qat_plugin.atomic import replacing, replacing_folder, write_text
from qat_plugin.errors import ConfigError, ExportError
from qat_plugin.exporting.card import SIGN, CardFacts, model_card
from qat_plugin.exporting.contents import Exportable, check_adapted, check_converted, language_model_in
from qat_plugin.exporting.formats import FORMATS, Format, Told, Writer, format_named
from qat_plugin.exporting.refusal import check_refusals
from qat_plugin.exporting.verification import Verification
from qat_plugin.measure import file_bytes
from qat_plugin.measure.progress import progressing

CARD = "README.md"
_SAMPLE_TOKENS = 24


@dataclass(frozen=True)
class Exported:
    """One exported file or folder.

    Attributes:
        path: where it is.
        format: its format's name.
        verification: what reading it back has shown; ``None`` where that was not asked for.
        bytes: on disk.
        card: the model card.
    """

    path: Path
    format: str
    verification: Verification | None
    bytes: int
    card: Path

    def __str__(self) -> str:
        """One line."""
        proven = "not verified" if self.verification is None else f"verified: {self.verification}"
        return f"{self.format}: {self.path}, {self.bytes:,} bytes; {proven}"


def export_model(
    network: nn.Module,
    format: str,
    path: str | Path,
    *,
    tokenizer: Any = None,
    sample: Mapping[str, Tensor] | tuple[Tensor, ...] | Tensor | None = None,
    options: Mapping[str, Any] | None = None,
    verify: bool = True,
    facts: CardFacts | None = None,
    progress: bool = True,
) -> Exported:
    """Write a converted model in a runtime's own format, with the integers and scales it was trained with.

    Args:
        network: converted (with adapters on a frozen base, for peft and bitsandbytes); it is left as it is (in eval
            mode while this runs). Of a LightningModule around a transformers model, that model is exported.
        format: a name of :data:`~qat_plugin.exporting.formats.FORMATS`.
        path: the file to write (its suffix is added where it has none), or the folder; replaced when it exists, once
            the new one is proven. Of folders only empty ones and earlier exports are: what else lies in one is never
            deleted. The model card goes into the folder, or beside the file as ``<file>.md``.
        tokenizer: of a language model; goes into the file where the format has a place for it.
        sample: one call's arguments (a mapping of keyword arguments, a tuple, or one tensor): what is traced, and what
            outputs are compared on. By default token ids for a transformers language model.
        options: the format's own, see its module's ``Options``.
        verify: read the file back and compare; a file that does not hold the model is an error and is not kept.
        facts: for the model card.
        progress: show progress of work longer than two seconds.

    Raises:
        ConfigError: for an unknown format or option, a package that is not installed, or a path that something else
            is at.
        ExportError: when the format cannot hold the plan (nothing is written), or the file does not hold the model.
    """
    chosen, writer, settings, network = _asked(network, format, options)
    modes = {module: module.training for module in network.modules()}
    network.eval()
    try:
        with torch.no_grad():
            model = Exportable(network, _sample(network, sample), tokenizer)
            check_refusals(writer.refusals(model, settings), chosen.title)
            target = _target(chosen, Path(path))
            return _written(chosen, writer, model, target, settings, verify=verify, facts=facts, progress=progress)
    finally:
        for module, mode in modes.items():
            module.training = mode


def check_format(
    network: nn.Module,
    format: str,
    *,
    tokenizer: Any = None,
    sample: Mapping[str, Tensor] | tuple[Tensor, ...] | Tensor | None = None,
    options: Mapping[str, Any] | None = None,
) -> None:
    """Raise what :func:`export_model` would raise before it writes anything.

    For a model that is yet to be trained, convert one with the same plan and ask.

    Raises:
        ConfigError: for an unknown format or option, or a package that is not installed.
        ExportError: when the format cannot hold the plan.
    """
    chosen, writer, settings, network = _asked(network, format, options)
    with torch.no_grad():
        model = Exportable(network, _sample(network, sample), tokenizer)
        check_refusals(writer.refusals(model, settings), chosen.title)


def _asked(network: nn.Module, format: str, options: Mapping[str, Any] | None) -> tuple[Format, Writer, Any, nn.Module]:
    """The format, its writer and options, and the network that is meant, of a kind that the format is of."""
    chosen = format_named(format)
    writer, settings = chosen.writer(), chosen.options(options or {})
    if chosen.of_adapters:
        check_adapted(network)
    else:
        network = language_model_in(network)
        check_converted(network)
    if chosen.language and not hasattr(getattr(network, "config", None), "vocab_size"):
        others = ", ".join(name for name, entry in FORMATS.items() if not entry.language and not entry.of_adapters)
        raise ConfigError(
            f"format={chosen.name} is of language models, and {type(network).__name__} is no transformers language "
            f"model; formats of any module: {others}"
        )
    return chosen, writer, settings, network


def _written(
    chosen: Format,
    writer: Writer,
    model: Exportable,
    target: Path,
    settings: Any,
    *,
    verify: bool,
    facts: CardFacts | None,
    progress: bool,
) -> Exported:
    card = _card(chosen, target)
    total = len(model.network.state_dict())
    place = replacing if chosen.suffix else replacing_folder
    try:
        with place(target) as temporary:
            with progressing(progress, f"exporting to {chosen.name}", total) as advance:
                writer.write(model, temporary, settings, advance)
            found = writer.verify(model, temporary, settings).check(target.name) if verify else None
            usage = writer.usage(model, target, settings)
            kept = getattr(writer, "keeps_integers", lambda _: True)(settings)
            size = file_bytes(temporary)
            text = model_card(model, chosen, usage, size, found, facts or CardFacts(), exact=kept)
            if not chosen.suffix:
                write_text(temporary / CARD, text)
        if chosen.suffix:
            write_text(card, text)
    except OSError as error:
        raise ExportError(f"cannot write {target}: {error.strerror or error}; choose another path") from error
    return Exported(target, chosen.name, found, file_bytes(target), card)


def _target(chosen: Format, path: Path) -> Path:
    path = path.expanduser().absolute()
    if not chosen.suffix:
        if path.exists() and not path.is_dir():
            raise ConfigError(f"{path} is a file; {chosen.title} is a folder: choose another path")
        if path.is_dir() and any(path.iterdir()) and not _is_export(path):
            raise ConfigError(
                f"{path} holds other files than an export's ({CARD} is no model card of this project): they would be "
                f"deleted. Give a folder of its own, such as {path / chosen.name}"
            )
        return path
    if path.is_dir():
        raise ConfigError(f"{path} is a folder; {chosen.title} is one file: give its name, such as {path / 'model'}")
    target = path if path.suffix == chosen.suffix else path.with_name(path.name + chosen.suffix)
    for place in (target, _card(chosen, target)):
        if place.is_dir():
            raise ConfigError(f"{place}, which is to be written, is a folder: choose another path")
    return target


def _card(chosen: Format, target: Path) -> Path:
    return target.with_name(f"{target.name}.md") if chosen.suffix else target / CARD


def _is_export(folder: Path) -> bool:
    try:
        return SIGN in (folder / CARD).read_text(encoding="utf-8", errors="replace")
    except OSError:
        return False


def _sample(network: nn.Module, given: Any) -> Mapping[str, Tensor] | tuple[Tensor, ...]:
    """What was given; else token ids that are the same each time, two rows of them."""
    if isinstance(given, Tensor):
        return (given,)
    if given is not None:
        sample: Mapping[str, Tensor] | tuple[Tensor, ...] = given
        return sample
    vocabulary = getattr(getattr(network, "config", None), "vocab_size", None)
    if vocabulary is None:
        raise ConfigError(
            f"{type(network).__name__} is no transformers language model: give sample=, the arguments of one call "
            "(a mapping of keyword arguments, a tuple, or one tensor)"
        )
    generator = torch.Generator().manual_seed(0)
    return {"input_ids": torch.randint(int(vocabulary), (2, _SAMPLE_TOKENS), generator=generator)}


__all__ = ["Exported", "Told", "check_format", "export_model"]
