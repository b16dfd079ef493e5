"""GGUF: one file for llama.cpp and its kin, packed straight from the integers that were trained."""

from __future__ import annotations

from pathlib import Path

from qat_plugin.exporting.contents import Exportable
from qat_plugin.exporting.formats import Told
from qat_plugin.exporting.gguf.copies import check_described
from qat_plugin.exporting.gguf.fits import refusal_of
from qat_plugin.exporting.gguf.kquant import check_kquant, requantize
from qat_plugin.exporting.gguf.layout import layout
from qat_plugin.exporting.gguf.metadata import check_metadata
from qat_plugin.exporting.gguf.options import Options
from qat_plugin.exporting.gguf.verify import verify_file
from qat_plugin.exporting.gguf.vocabulary import vocabulary_of
from qat_plugin.exporting.gguf.write import write_file
from qat_plugin.exporting.refusal import Refusal
from qat_plugin.exporting.verification import Verification

__all__ = ["Options", "keeps_integers", "refusals", "usage", "verify", "write"]


def refusals(model: Exportable, options: Options) -> list[Refusal]:
    """Layers that no block type holds as they are.

    Raises:
        ExportError: for an architecture, a setting of it or a tokenizer that GGUF has no place for.
    """
    if options.kquant:
        check_kquant(options)
    check_metadata(model)
    check_described(model)
    vocabulary_of(model, options)
    layers = () if options.kquant else model.layers.values()  # llama.cpp quantizes the others' numbers anew
    refused = [found for layer in layers if (found := refusal_of(layer, options.indivisible)) is not None]
    if not refused:
        layout(model, options)  # raises for parameters without a name
    return refused


def write(model: Exportable, path: Path, options: Options, progress: Told) -> None:
    """Write the file."""
    if not options.kquant:
        write_file(model, path, options, progress)
        return
    floats = path.with_name(f"{path.name}.float")
    try:
        write_file(model, floats, options, progress, sealed=False)
        requantize(floats, path, options)
    finally:
        floats.unlink(missing_ok=True)


def verify(model: Exportable, path: Path, options: Options) -> Verification:
    """Read it with gguf, transformers and, where it is installed, llama.cpp."""
    return verify_file(model, path, options)


def keeps_integers(options: Options) -> bool:
    """Whether the file holds the model's own integers: not where llama.cpp quantizes anew."""
    return not options.kquant


def usage(model: Exportable, path: Path, options: Options) -> str:
    """How it is run."""
    return (
        f'llama-cli -m {path.name} -p "Once upon a time"\n'
        f'AutoModelForCausalLM.from_pretrained(".", gguf_file="{path.name}")  # in transformers\n'
        f'qat_plugin.load("{path.name}")  # on this project\'s kernels'
    )
