"""An ONNX file read back: checked, its integers compared, its outputs computed by ONNX Runtime in two sizes."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor

from qat_plugin.errors import ExportError
from qat_plugin.exporting.agreement import Agreement
from qat_plugin.exporting.contents import Exportable, Layer
from qat_plugin.exporting.float32_runtime import compared_in_float32, widened
from qat_plugin.exporting.onnx.cache import past_of
from qat_plugin.exporting.onnx.options import Options
from qat_plugin.exporting.onnx.products import operator_of
from qat_plugin.exporting.onnx.reading import File, has_integer_bias, integers, uses
from qat_plugin.exporting.onnx.standin import PENDING
from qat_plugin.exporting.onnx.tracing import grown, inputs_of, is_language_model
from qat_plugin.exporting.onnx.write import FILE
from qat_plugin.exporting.verification import Comparison, Verification

# ONNX Runtime turns DequantizeLinear before MatMul into MatMulNBits, by default with INT8 inputs (level 4).
EXACT: Final = {"session.qdq_matmulnbits_accuracy_level": "0"}
_ROUNDED_BLOCKS: Final = 5e-2
_ROUNDING: Final = "accuracy_level=4 rounds inputs to INT8 per block, which training did not"


def verify(model: Exportable, path: Path, options: Options) -> Verification:
    """Read the folder with onnx and ONNX Runtime.

    Raises:
        ExportError: when a quantized layer is not in the graph as a quantized operator, or onnx refuses the file.
    """
    import onnx
    import onnxruntime

    try:
        onnx.checker.check_model(str(path / FILE), full_check=True)
    except onnx.checker.ValidationError as refused:
        raise ExportError(f"onnx refuses the file: {str(refused).splitlines()[0]}") from refused
    seen, file = Comparison(), File(path / FILE)
    _check_graph(model, file)
    for name, layer in model.layers.items():
        held = layer.integers
        groups = held.scale.shape[1]
        rows, columns = held.q.shape
        q, scale, zero = integers(file, name, layer.name, rows, columns, groups, held.scheme.weight_bits)
        if held.scheme.per_tensor:
            scale, zero = scale[:1, :1], None if zero is None else zero[:1, :1]
        seen.quantized(name, held, _tensor(q), _tensor(scale), None if zero is None else _tensor(zero))
        _check_input(name, layer, file)
    merged = 0
    for name, tensor in model.floats():
        if name in file.initializers and list(file.initializers[name].dims) == list(tensor.shape):
            seen.plain(name, tensor, _tensor(file.array(name)))
        else:
            merged += tensor.is_floating_point()
    agreed, sizes, told = _outputs(
        model,
        path / FILE,
        options,
        [name for name, layer in model.layers.items() if has_integer_bias(file, layer.name)],
    )
    if options.accuracy_level == 4:
        agreed = replace(agreed, tolerance=max(agreed.tolerance, _ROUNDED_BLOCKS), reason=_ROUNDING)
    return seen.verification(
        f"onnx {onnx.__version__}", error=agreed.error, tolerance=agreed.tolerance, reason=agreed.reason,
        notes=(f"run by ONNX Runtime {onnxruntime.__version__} on {sizes}", *told, *_notes(model, options, merged)),
    )  # fmt: skip


def _check_input(name: str, layer: Layer, file: File) -> None:
    """Scales of a layer's input are the model's; layers that read one value on one scale share it."""
    for suffix in ("activation_scale", "input_scale"):
        held: Tensor | None = getattr(layer.weight, suffix)
        if held is None:
            continue
        shared = [entry for entry in file.initializers if entry.endswith(f".{suffix}")]
        stored = [f"{name}.{suffix}"] if f"{name}.{suffix}" in file.initializers else shared
        wanted = held.float().cpu().reshape(-1)
        if not any(torch.equal(_tensor(file.array(entry)).reshape(-1), wanted) for entry in stored):
            raise ExportError(f"{layer.name}: the file lacks its {suffix}, or has another")


def session(path: Path, **settings: str) -> Any:
    """ONNX Runtime on the CPU, one thread, computing what the file says (see :data:`EXACT`)."""
    import onnxruntime

    chosen = onnxruntime.SessionOptions()
    chosen.intra_op_num_threads, chosen.log_severity_level = 1, 3
    for name, value in {**EXACT, **settings}.items():
        chosen.add_session_config_entry(name, value)
    return onnxruntime.InferenceSession(str(path), chosen, providers=["CPUExecutionProvider"])


def _check_graph(model: Exportable, file: File) -> None:
    """Each quantized layer of the plan is a quantized operator."""
    pending = [node.name for node in file.graph.node if node.domain == PENDING]
    if pending:
        raise ExportError(f"nodes that are no operator of any runtime are left in the file: {', '.join(pending[:8])}")
    sharing: dict[str, int] = {}
    for planned in model.plan.quantized:
        name = f"{planned.name}.weight"
        leader = model.ties.get(name, name)
        if leader in model.layers:
            sharing[leader] = sharing.get(leader, 0) + 1
    for name, layer in model.layers.items():
        found, wanted = uses(file, layer.name), sharing.get(name, 1)
        if found < wanted:
            raise ExportError(
                f"{layer.name} ({layer.scheme}) is in the file {found} times as a quantized operator, in the plan "
                f"{wanted} times"
            )


def _outputs(
    model: Exportable, path: Path, options: Options, biases: Collection[str]
) -> tuple[Agreement, str, tuple[str, ...]]:
    """The worse agreement of the sample and, where sizes are free, of another one; the sizes; notes."""
    run = session(path)
    asked = {entry.name for entry in run.get_inputs()}
    samples = [inputs_of(model)]
    if options.dynamic:
        samples.append(grown(samples[0], batch=1, sequence=is_language_model(model)))
    runs = []
    for sample in samples:
        given = {name: value for name, value in sample.items() if name in asked}
        found = _in_two_steps(model, run, given) if options.cache else _run(run, given)[0]
        runs.append((found, tuple(sample.values()) if isinstance(model.sample, tuple) else sample))
    sizes = [" x ".join(str(n) for n in next(iter(sample.values())).shape) for sample in samples]
    agreed, notes = compared_in_float32(model, runs, biases)
    return agreed, " and ".join(sizes), notes


def _run(run: Any, given: Mapping[str, Tensor]) -> list[Tensor]:
    return [
        torch.from_numpy(found)
        for found in run.run(None, {name: widened(value).numpy() for name, value in given.items()})
    ]


def _in_two_steps(model: Exportable, run: Any, given: Mapping[str, Tensor]) -> Tensor:
    """Logits of all tokens but computed half by half: without a past, then with the first half's."""
    ids, mask = given["input_ids"].cpu(), given["attention_mask"].cpu()
    half = max(1, ids.shape[1] // 2)
    past = past_of(model, ids.shape[0], 0)
    first, *present = _run(run, {"input_ids": ids[:, :half], "attention_mask": mask[:, :half], **past})
    if half == ids.shape[1]:
        return first
    grown_past = dict(zip(past, present, strict=True))
    second = _run(run, {"input_ids": ids[:, half:], "attention_mask": mask, **grown_past})[0]
    return torch.cat([first, second], dim=1)


def _notes(model: Exportable, options: Options, merged: int) -> tuple[str, ...]:
    counted: dict[str, int] = {}
    for layer in model.layers.values():
        if layer.weight.usage in ("embedding", "conv"):
            kind = "Gather of integer rows" if layer.weight.usage == "embedding" else "Conv on DequantizeLinear"
        else:
            kind = operator_of(layer, options)
        counted[kind] = counted.get(kind, 0) + 1
    notes = ["operators: " + ", ".join(f"{count} x {kind}" for kind, count in counted.items())]
    if merged:
        notes.append(f"{merged} float tensors are not in the file as such (merged into others, or not used)")
    if "Cast" in counted:
        notes.append("weights read through Cast are integers on disk and float32 in the memory of a session")
    if any(layer.scheme.weight_bits < 4 for layer in model.layers.values()):
        notes.append("2- and 3-bit integers lie in 4-bit elements")
    if options.target == "tensorrt":
        notes.append("written for TensorRT and not run by it here")
    return tuple(notes)


def _tensor(array: Any) -> Tensor:
    import numpy as np

    if array.dtype.name == "bfloat16":
        return torch.from_numpy(array.astype(np.float32)).to(torch.bfloat16)
    return torch.from_numpy(np.array(array))  # a copy: what is read from a file cannot be written
