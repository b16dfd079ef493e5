"""The folder: the graph, its tensors, and what a tokenizer and a runtime need beside it."""

from __future__ import annotations

from pathlib import Path
from typing import Final

import onnx_ir as ir

from qat_plugin.exporting.contents import Exportable
from qat_plugin.exporting.formats import Told
from qat_plugin.exporting.onnx.options import Options
from qat_plugin.exporting.onnx.rewriting import rewrite
from qat_plugin.exporting.onnx.tracing import trace

FILE: Final = "model.onnx"
DATA: Final = "model.onnx.data"
_ONE_FILE: Final = 1_500_000_000  # bytes; protobuf ends at two gigabytes


def write(model: Exportable, path: Path, options: Options, progress: Told) -> None:
    """Fill the folder, one tensor in memory at a time where they have a file of their own."""
    traced = trace(model, options)
    told: list[int] = []  # of a small file, tracing is nearly all the time: the tensors would promise too much
    rewrite(traced, model, options, lambda made: progress(made) if told else None)
    traced.producer_name, traced.producer_version = "qat_plugin", None
    size = sum(_bytes(value) for value in traced.graph.initializers.values())
    apart = size > _ONE_FILE if options.external_data is None else options.external_data
    if apart:
        told.append(size)
        ir.save(traced, path / FILE, external_data=DATA, max_workers=1, max_in_flight_bytes=1)
    else:
        ir.save(traced, path / FILE)
    if model.config is not None and hasattr(model.config, "save_pretrained"):
        model.config.save_pretrained(path)
    if model.tokenizer is not None:
        model.tokenizer.save_pretrained(path)


def _bytes(value: ir.Value) -> int:
    return 0 if value.const_value is None else int(value.const_value.nbytes)
