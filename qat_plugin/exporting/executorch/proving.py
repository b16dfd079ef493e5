"""A ``.pte`` against the model: its constants, read back, and what ExecuTorch's runtime computes with them."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import torch
from torch import Tensor, nn

from qat_plugin.errors import ExportError
from qat_plugin.exporting.contents import Exportable, Layer
from qat_plugin.exporting.executorch.columns import Columns
from qat_plugin.exporting.executorch.convolution import kernel_of
from qat_plugin.exporting.executorch.options import Options
from qat_plugin.exporting.executorch.payload import Payload, Stored, read
from qat_plugin.exporting.executorch.skeleton import arguments, is_language_model, limits, rows_of
from qat_plugin.exporting.float32_runtime import compared_in_float32
from qat_plugin.exporting.verification import Comparison, Verification

_ALIGNMENT = 16


def verify(model: Exportable, path: Path, options: Options) -> Verification:
    """Read the file by ExecuTorch's parser and run it by its Python runtime.

    Raises:
        ExportError: when the file cannot be read or run, lacks a layer or holds one that the model has not.
    """
    payload = read(path)
    seen = Comparison()
    bytes_of = set(payload.constants)
    chained = _quantized(model, payload, bytes_of, seen)
    merged = _plain(model, bytes_of, seen)
    static = sum(stored.input != "token" for stored in payload.weights)
    notes = [
        f"each of them is an integer product of XNNPACK, {static} with an INT8 output; "
        f"{payload.float_products} products are float"
    ]
    if merged:
        notes.append(f"{merged} float tensors are not in the file as such (merged into others, or not used)")
    if any(isinstance(module, nn.Embedding) for module in model.network.modules()):
        notes.append("embeddings are float")
    notes.append(f"{len(payload.operators)} kinds of operators run outside XNNPACK")
    try:
        ran = _ran(model, path, options)
    except RuntimeError as failure:
        raise ExportError(f"ExecuTorch's runtime cannot run {path.name}: {failure}") from failure
    notes.append("ran at shapes " + ", ".join("x".join(map(str, given[0].shape)) for _, given in ran))
    names = None if isinstance(model.sample, tuple) else tuple(model.sample)
    agreed, told = compared_in_float32(
        model,
        [(found, given if names is None else dict(zip(names, given, strict=True))) for found, given in ran],
        chained,
    )
    return seen.verification(
        f"executorch {version('executorch')}",
        error=agreed.error, tolerance=agreed.tolerance, reason=agreed.reason, notes=(*notes, *told),
    )  # fmt: skip


@dataclass(frozen=True)
class _Form:
    """A layer as a file may have it.

    Attributes:
        q, scale: what it would hold.
        chained: by XNNPACK's static kernel, without constants beside the input.
    """

    q: Tensor
    scale: Tensor
    chained: bool

    @classmethod
    def all_of(cls, layer: Layer) -> list[_Form]:
        """Both, or the one that a layer has."""
        chained = [True, False] if layer.scheme.static else [False]
        held = layer.integers
        if layer.weight.usage == "conv":
            return [cls(*kernel_of(held, layer.weight, constant=not c), c) for c in chained]
        return [cls(*_columns(layer, c).of_weight(held), c) for c in chained]

    def shaped(self, stored: Stored) -> bool:
        """Whether the file's tensor can be this one."""
        return stored.q.shape == self.q.shape and stored.scale.shape == self.scale.shape

    def holds(self, stored: Stored) -> bool:
        """Whether it is."""
        return self.shaped(stored) and torch.equal(stored.q, self.q) and torch.equal(stored.scale, self.scale)


def _quantized(model: Exportable, payload: Payload, constants: set[bytes], seen: Comparison) -> list[str]:
    """Each layer with the file's tensor of the same integers; where there is none, with the nearest of its shape.

    Returns:
        Names of those that are chained.
    """
    used: set[int] = set()
    chained: list[str] = []
    unmatched: list[str] = []
    for name, layer in model.layers.items():
        same = [(i, f) for f in _Form.all_of(layer) for i, s in enumerate(payload.weights) if f.holds(s)]
        if not same:
            unmatched.append(name)
            continue
        used |= {i for i, _ in same}
        chained += [name] * any(form.chained for _, form in same)
        for i, form in same:
            _compare(
                name, layer, payload.weights[i], form.chained, constants, seen if i == same[0][0] else Comparison()
            )
    for name in unmatched:
        layer = model.layers[name]
        forms = _Form.all_of(layer)
        left = [(i, f) for f in forms for i, s in enumerate(payload.weights) if i not in used and f.shaped(s)]
        if not left:
            raise ExportError(f"the file has no INT8 product for {name} ({layer.scheme}): it was not lowered")
        nearest, form = min(left, key=lambda pair: int((payload.weights[pair[0]].q != pair[1].q).sum()))
        used.add(nearest)
        _compare(name, layer, payload.weights[nearest], form.chained, constants, seen)
    if len(used) != len(payload.weights):
        raise ExportError(f"the file has {len(payload.weights) - len(used)} quantized weights that the model has not")
    return chained


def _columns(layer: Layer, chained: bool) -> Columns:
    return Columns.of(layer.scheme, layer.weight.in_features, constant=not chained)


def _compare(name: str, layer: Layer, stored: Stored, chained: bool, constants: set[bytes], seen: Comparison) -> None:
    held = layer.integers
    if layer.weight.usage == "conv":
        channels = layer.weight.logical_shape[1]
        extra, q = stored.q[:, channels:], stored.q[:, :channels].reshape(held.q.shape)
        scale, stray = stored.scale, int(extra.abs().max()) if extra.numel() else 0
    else:
        columns = _columns(layer, chained)
        negative = held.scale.expand(len(held.q), -1) < 0
        signs = columns.signs(held)
        if signs is not None and not _held(signs, constants):
            negative = torch.zeros_like(negative)  # the file cannot tell them
        q, scale, stray = columns.weight_of(stored.q, stored.scale, negative)
    if stray:
        raise ExportError(f"{name}: the file has {stray} where constants must be multiplied by 0")
    if held.scheme.per_tensor:
        scale = scale[:1] if bool((scale == scale[0]).all()) else torch.full_like(scale[:1], float("nan"))
    seen.quantized(name, held, q, scale)
    _check_activation(name, layer, stored, chained, constants)


def _check_activation(name: str, layer: Layer, stored: Stored, chained: bool, constants: set[bytes]) -> None:
    """The calibrated scale: of XNNPACK's own input, or as the number that the input is divided by."""
    wanted = layer.weight.activation_scale
    if wanted is None or not chained:
        there = stored.input == "token" and (wanted is None or _held(wanted.float(), constants))
    else:
        there = stored.input == float(wanted) and stored.zero_point == 0
    if not there:
        wants = "INT8 by token" if wanted is None else f"the calibrated scale {float(wanted):.6g}"
        raise ExportError(f"{name}: the file does not round its input on {wants}")


def _plain(model: Exportable, constants: set[bytes], seen: Comparison) -> int:
    """Float tensors by their bytes, stored or widened to float32; the number of those that are not found."""
    missing = 0
    for name, tensor in model.floats():
        if not tensor.is_floating_point():
            continue
        found = next((t for t in (tensor, tensor.float()) if _held(t, constants)), None)
        if found is None:
            missing += 1
        else:
            seen.plain(name, tensor, found)
    return missing


def _held(tensor: Tensor, constants: set[bytes]) -> bool:
    """Whether a constant of the file has the bytes of a tensor, with the zeros that align the next one."""
    data = tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
    return data in constants or data + bytes(-len(data) % _ALIGNMENT) in constants


def _ran(model: Exportable, path: Path, options: Options) -> list[tuple[Tensor, tuple[Tensor, ...]]]:
    """What the runtime gives, and for which arguments."""
    from executorch.runtime import Runtime

    method = Runtime.get().load_program(path).load_method("forward")
    batch, length = limits(model, options)
    return [
        (torch.cat([method.execute(list(rows))[0].detach().clone().float() for rows in rows_of(given, batch)]), given)
        for given in _calls(model, options, batch, length)
    ]


def _calls(model: Exportable, options: Options, batch: int, length: int) -> Iterable[tuple[Tensor, ...]]:
    """The sample, and a part of it of another shape."""
    given = arguments(model, options)
    if is_language_model(model):
        yield tuple(x[:, :length] for x in given)
        yield tuple(x[:1, : max(1, min(length, x.shape[1]) // 2)] for x in given)
        return
    yield given
    if batch > 1:
        yield tuple(x[:1] for x in given)
