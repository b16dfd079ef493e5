"""What a GGUF file or its runtimes do otherwise than the converted model: said in the verification, never silent."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from qat_plugin.exporting.contents import Exportable
from qat_plugin.exporting.gguf.families import family_of
from qat_plugin.exporting.gguf.layout import Entry
from qat_plugin.exporting.gguf.metadata import window_of
from qat_plugin.exporting.gguf.options import Options
from qat_plugin.exporting.gguf.vocabulary import vocabulary_of

_SHOWN = 4


def notes_of(model: Exportable, options: Options, entries: Sequence[Entry]) -> Iterator[str]:
    """One phrase for each."""
    layers = {layer.name: layer.scheme for layer in model.layers.values()}
    rounding = [name for name, scheme in layers.items() if scheme.quantizes_activations]
    if rounding:
        yield (
            f"{_counted(rounding)} round their inputs to INT8 per token here; runtimes of GGUF round in their own way "
            "(llama.cpp: INT8 per 32) or not at all"
        )
    if options.kquant:
        yield f"quantized to {options.kquant} by llama.cpp from the dequantized model"
        yield from _window(model)
        yield from vocabulary_of(model, options).notes
        return
    narrow = [name for name, scheme in layers.items() if scheme.weight_bits < 4]
    if narrow:
        bits = "/".join(sorted({str(scheme.weight_bits) for scheme in layers.values() if scheme.weight_bits < 4}))
        yield f"{_counted(narrow)}: {bits}-bit integers unchanged in 4-bit blocks"
    for kind in ("F16", "F32"):
        floats = [entry.source.removesuffix(".weight") for entry in entries
                  if entry.source in model.layers and entry.kind == kind]  # fmt: skip
        if floats:
            yield (
                f"{_counted(floats)}: written as {kind} with exactly their quantized numbers, as blocks of 32 do not "
                "tile them"
            )
    yield from _window(model)
    yield from vocabulary_of(model, options).notes


def _window(model: Exportable) -> Iterator[str]:
    window = window_of(model)
    if window is not None and not family_of(model.config, model.network).sliding:
        yield (
            f"the model attends to a window of {window} tokens, which its GGUF architecture does not have: runtimes "
            "attend to all"
        )


def _counted(names: Sequence[str]) -> str:
    shown = ", ".join(names[:_SHOWN])
    return shown if len(names) <= _SHOWN else f"{len(names)} layers ({shown}, …)"
