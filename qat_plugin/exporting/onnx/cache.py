"""Past keys and values as inputs and outputs of a file, by the names that Optimum and ONNX Runtime's examples use."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import onnx_ir as ir
import torch
from torch import Tensor

from qat_plugin.errors import ExportError
from qat_plugin.exporting.contents import Exportable


def past_of(model: Exportable, batch: int, length: int) -> dict[str, Tensor]:
    """Keys and values of ``length`` past tokens, zeros, by the names of the file's inputs.

    Args:
        model: a language model.
        batch: rows.
        length: tokens; 0 where there is no past yet.

    Raises:
        ExportError: when the model does not keep its past as one growing tensor of keys and one of values a layer.
    """
    ids = torch.zeros(1, 2, dtype=torch.int64, device=next(model.network.parameters()).device)
    with torch.no_grad():
        cache = getattr(model.network(input_ids=ids, use_cache=True), "past_key_values", None)
    layers = getattr(cache, "layers", [])
    if not layers or any(type(layer).__name__ != "DynamicLayer" for layer in layers):
        kinds = ", ".join(sorted({type(layer).__name__ for layer in layers})) or type(cache).__name__
        raise ExportError(
            f"{type(model.network).__name__} keeps its past as {kinds}: cache=True exports DynamicLayer alone; leave "
            "it out, and the file takes whole sequences"
        )
    past = {}
    for i, layer in enumerate(layers):
        for name, held in (("key", layer.keys), ("value", layer.values)):
            past[f"past_key_values.{i}.{name}"] = torch.zeros(batch, held.shape[1], length, held.shape[3])
    return past


def present_names(past: Sequence[str]) -> list[str]:
    """Of the outputs that become the next call's past."""
    return [name.replace("past_key_values", "present") for name in past]


def cache_of(values: Sequence[Tensor]) -> Any:
    """A transformers cache of keys and values, alternating, layer by layer."""
    from transformers.cache_utils import DynamicCache, DynamicLayer

    cache = DynamicCache()
    for keys, held in zip(values[::2], values[1::2], strict=True):
        layer = DynamicLayer()
        layer.keys, layer.values, layer.is_initialized = keys, held, True
        layer.dtype, layer.device = keys.dtype, keys.device
        cache.layers.append(layer)
    return cache


def name_axes(graph: ir.Graph) -> None:
    """Call the free axes of a graph batch, sequence, past and total instead of by the exporter's numbers."""
    names: dict[str, str] = {}
    for value in graph.inputs:
        kind = (value.name or "").split(".")[0]
        axes = {"past_key_values": {0: "batch", 2: "past"}, "attention_mask": {0: "batch", 1: "total"}}
        for axis, name in axes.get(kind, {0: "batch", 1: "sequence"}).items():
            symbol = value.shape[axis] if value.shape is not None else None
            if isinstance(symbol, ir.SymbolicDim) and symbol.value is not None:
                names[str(symbol.value)] = name
    produced = [value for node in graph for value in node.outputs]
    for value in (*graph.inputs, *produced):
        if value.shape is not None:
            value.shape = ir.Shape([_renamed(size, names) for size in value.shape])


def _renamed(size: Any, names: dict[str, str]) -> int | str | None:
    if not isinstance(size, ir.SymbolicDim):
        return int(size)
    if size.value is None:
        return None
    return re.sub(r"\b[A-Za-z_]\w*\b", lambda found: names.get(found[0], found[0]), str(size.value))


def tensors_of(cache: Any) -> list[Tensor]:
    """The reverse of :func:`cache_of`."""
    return [held for layer in cache.layers for held in (layer.keys, layer.values)]
