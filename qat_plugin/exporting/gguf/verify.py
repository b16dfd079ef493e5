"""Reads a file back: integers and scales bit for bit, then outputs, by programs that are not this package."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from qat_plugin.errors import ExportError
from qat_plugin.exporting.contents import Exportable, outputs_of
from qat_plugin.exporting.gguf import in_llama_cpp, in_transformers, own_outputs
from qat_plugin.exporting.gguf.blocks import block_scales, unpack_q4_0, unpack_q4_1, unpack_q8_0, zero_points
from qat_plugin.exporting.gguf.copies import float_copy
from qat_plugin.exporting.gguf.layout import DTYPES, Entry, integers, layout, numbers, state
from qat_plugin.exporting.gguf.notes import notes_of
from qat_plugin.exporting.gguf.options import Options
from qat_plugin.exporting.gguf.reference import Reference
from qat_plugin.exporting.gguf.schemes import KEY, spelled
from qat_plugin.exporting.verification import Comparison, Verification, relative_difference
from qat_plugin.measure import parameter_count
from qat_plugin.measure.host_memory import available_bytes
from qat_plugin.numerics import Quantized, row_chunks
from qat_plugin.policy.plan import human_bytes

TOLERANCE = 1e-5


def verify_file(model: Exportable, path: Path, options: Options) -> Verification:
    """Compare everything.

    Raises:
        ExportError: when the file lacks a tensor or has one too many, or a runtime computes something else.
    """
    entries = layout(model, options)
    seen = compare_numbers(model, path, entries) if options.kquant else compare_tensors(model, path, entries)
    notes = list(notes_of(model, options, entries))
    reader = f"gguf {in_transformers.version('gguf')}"
    unasked = _too_large(model) if options.outputs else "not asked for"
    if unasked:
        return _told(seen.verification(reader, reason=unasked, notes=tuple(notes)), options)
    copy = float_copy(model, entries)
    notes.append(own_outputs.check(model, copy, entries))
    reference = Reference.of(copy, model, entries)
    del copy
    error: float | None = None
    reason = in_transformers.unable(model)
    if not reason:
        network, told = in_transformers.load(model, path)
        error = relative_difference(outputs_of(network, model.sample), reference.outputs)
        reader += f" and transformers {in_transformers.version('transformers')}"
        notes += told
        del network
        notes += in_transformers.tokenizer_notes(model, path)
    if in_llama_cpp.installed():
        notes += in_llama_cpp.check(model, path, reference, demand=not options.kquant)
    else:
        notes.append("llama.cpp is not installed here (llama-cpp-python): it has not run the file")
    found = seen.verification(reader, error=error, tolerance=TOLERANCE, reason=reason, notes=tuple(notes))
    return _told(found, options)


def _too_large(model: Exportable) -> str:
    """Why there is no room to run the model in float32, or nothing."""
    needed, free = 2 * 4 * parameter_count(model.network), available_bytes()
    if free is None or needed <= free:
        return ""
    return f"running it in float32 takes about {human_bytes(needed)} of memory, {human_bytes(free)} are free"


def _told(found: Verification, options: Options) -> Verification:
    return replace(found, exact=False, tensors=found.floats) if options.kquant else found


def compare_numbers(model: Exportable, path: Path, entries: list[Entry]) -> Comparison:
    """How far the numbers of a file that was quantized anew are from the model's.

    Raises:
        ExportError: when names or shapes differ.
    """
    import gguf

    stored, held, seen = _stored(path, entries), state(model), Comparison()
    for entry in entries:
        tensor = stored[entry.name]
        read = np.array(gguf.dequantize(tensor.data, tensor.tensor_type)).reshape(entry.shape)
        wanted = numbers(model, entry, held.get(entry.source, torch.empty(0)))
        seen.requantized(entry.name, wanted, torch.from_numpy(read))
    return seen


def _stored(path: Path, entries: list[Entry]) -> dict[str, Any]:
    import gguf

    stored = {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}
    if stored.keys() != {entry.name for entry in entries}:
        other = sorted(stored.keys() ^ {entry.name for entry in entries})
        raise ExportError(f"{path.name} holds other tensors than the model: {', '.join(other[:8])}")
    return stored


def compare_tensors(model: Exportable, path: Path, entries: list[Entry]) -> Comparison:
    """Every tensor of the file, as ``gguf.GGUFReader`` finds it.

    Raises:
        ExportError: when names, types or shapes differ, or ``gguf`` reads other numbers from the blocks.
    """
    import gguf

    stored, seen, held = _stored(path, entries), Comparison(), state(model)
    if gguf.GGUFReader(path).fields[KEY].contents() != spelled(model, entries):
        raise ExportError(f"{path.name} names other schemes than the model's ({KEY})")
    for entry in entries:
        tensor = stored[entry.name]
        if tensor.tensor_type.name != entry.kind or tuple(map(int, reversed(tensor.shape))) != entry.shape:
            raise ExportError(
                f"{entry.name} is {tensor.tensor_type.name} {tensor.shape}, not {entry.kind} {entry.shape}"
            )
        if entry.blocks:
            _compare_blocks(seen, entry, integers(model, entry), tensor)
            continue
        read = torch.from_numpy(np.array(gguf.dequantize(tensor.data, tensor.tensor_type)).reshape(entry.shape))
        wanted = numbers(model, entry, held.get(entry.source, torch.empty(0)))
        if entry.source in model.layers and not torch.equal(read, wanted):
            raise ExportError(f"{entry.name}: {entry.kind} does not hold the numbers of {entry.source} exactly")
        seen.plain(entry.name, wanted, read, DTYPES[entry.kind])
    return seen


def _compare_blocks(seen: Comparison, entry: Entry, held: Quantized, tensor: object) -> None:
    import gguf

    data = np.asarray(tensor.data)  # type: ignore[attr-defined]
    scale = torch.from_numpy(np.array(block_scales(held.scale, entry.shape)))
    zero: torch.Tensor | None = None
    if entry.kind == "Q4_1" and held.zero_point is not None:
        q, d, m = unpack_q4_1(data)
        z, exact = zero_points(d, m)
        if not exact:
            raise ExportError(f"{entry.name} holds minima that are no zero points of its scales")
        wanted = block_scales(held.zero_point.float(), entry.shape)
        z = np.where(d == 0, wanted, z)  # a scale of 0 makes every zero point the same
        zero, held_zero = torch.from_numpy(z), torch.from_numpy(np.array(wanted))
        expanded = Quantized(held.q, scale, held_zero, held.scheme)
    else:
        q, d = (unpack_q8_0 if entry.kind == "Q8_0" else unpack_q4_0)(data)
        expanded = Quantized(held.q, scale, None, held.scheme)
    seen.quantized(entry.name, expanded, torch.from_numpy(q), torch.from_numpy(d), zero)
    kind = gguf.GGMLQuantizationType[entry.kind]
    for rows in row_chunks(held.q):
        if not np.array_equal(gguf.dequantize(data[rows], kind), held.rows(rows).dequantize().numpy()):
            raise ExportError(
                f"{entry.name}: the gguf package reads other numbers from its blocks than the model holds"
            )
