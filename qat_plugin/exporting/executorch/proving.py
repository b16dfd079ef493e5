"""A ``.pte`` against the model: its constants, read back, and what ExecuTorch's runtime computes with them."""

from __future__ import annotations

from collections.abc import Iterable
from importlib.metadata import version
from pathlib import Path

import torch
from torch import Tensor

from qat_plugin.errors import ExportError
from qat_plugin.exporting.contents import Exportable, Layer, outputs_of
from qat_plugin.exporting.executorch.columns import Columns
from qat_plugin.exporting.executorch.options import Options
from qat_plugin.exporting.executorch.payload import Payload, Stored, read
from qat_plugin.exporting.executorch.skeleton import arguments, is_language_model, limits, rows_of
from qat_plugin.exporting.verification import Comparison, Verification, relative_difference

_TOLERANCE = {torch.float32: 5e-3}
_NARROW_TOLERANCE = 5e-2
_REASON = "sums in another order: an INT8 activation on a rounding boundary may fall to its other side"


def verify(model: Exportable, path: Path, options: Options) -> Verification:
    """Read the file by ExecuTorch's parser and run it by its Python runtime.

    Raises:
        ExportError: when the file cannot be read, lacks a layer or holds one that the model has not.
    """
    payload = read(path)
    seen = Comparison()
    bytes_of = set(payload.constants)
    _quantized(model, payload, bytes_of, seen)
    merged = _plain(model, bytes_of, seen)
    dtype = next(p.dtype for p in model.network.parameters() if p.is_floating_point())
    notes = [f"each quantized layer is an INT8 product of XNNPACK, {payload.float_products} products are float"]
    if merged:
        notes.append(f"{merged} float tensors are not in the file as such (merged into others, or not used)")
    shapes, error = _ran(model, path, options)
    notes.append(f"ran at shapes {shapes}")
    return seen.verification(
        f"executorch {version('executorch')}", error=error, tolerance=_TOLERANCE.get(dtype, _NARROW_TOLERANCE),
        reason=_REASON, notes=tuple(notes),
    )  # fmt: skip


def _quantized(model: Exportable, payload: Payload, constants: set[bytes], seen: Comparison) -> None:
    """Each layer with the file's tensor of the same integers; where there is none, with the nearest of its shape."""
    used: set[int] = set()
    unmatched: list[str] = []
    for name, layer in model.layers.items():
        q, scale = _columns(layer).of_weight(layer.integers)
        same = [
            i for i, s in enumerate(payload.weights)
            if s.q.shape == q.shape and torch.equal(s.q, q) and torch.equal(s.scale, scale)
        ]  # fmt: skip
        if not same:
            unmatched.append(name)
            continue
        used.add(same[0])
        _compare(name, layer, payload.weights[same[0]], constants, seen)
    for name in unmatched:
        layer = model.layers[name]
        q, _ = _columns(layer).of_weight(layer.integers)
        left = [i for i, s in enumerate(payload.weights) if i not in used and s.q.shape == q.shape]
        if not left:
            raise ExportError(f"the file has no INT8 product for {name} ({layer.scheme}): it was not lowered")
        nearest = min(left, key=lambda i: int((payload.weights[i].q != q).sum()))
        used.add(nearest)
        _compare(name, layer, payload.weights[nearest], constants, seen)
    if len(used) != len(payload.weights):
        raise ExportError(f"the file has {len(payload.weights) - len(used)} quantized weights that the model has not")


def _columns(layer: Layer) -> Columns:
    return Columns.of(layer.scheme, layer.weight.in_features)


def _compare(name: str, layer: Layer, stored: Stored, constants: set[bytes], seen: Comparison) -> None:
    held, columns = layer.integers, _columns(layer)
    negative = held.scale.expand(len(held.q), -1) < 0
    signs = columns.signs(held)
    if signs is not None and _bytes(signs) not in constants:
        negative = torch.zeros_like(negative)  # the file cannot tell them
    q, scale, stray = columns.weight_of(stored.q, stored.scale, negative)
    if stray:
        raise ExportError(f"{name}: the file has {stray} where the columns of constants must be multiplied by 0")
    if held.scheme.per_tensor:
        scale = scale[:1] if bool((scale == scale[0]).all()) else torch.full_like(scale[:1], float("nan"))
    seen.quantized(name, held, q, scale)


def _plain(model: Exportable, constants: set[bytes], seen: Comparison) -> int:
    """Float tensors by their bytes, stored or widened to float32; the number of those that are not found."""
    missing = 0
    for name, tensor in model.floats():
        if not tensor.is_floating_point():
            continue
        found = next((t for t in (tensor, tensor.float()) if _bytes(t) in constants), None)
        if found is None:
            missing += 1
        else:
            seen.plain(name, tensor, found)
    return missing


def _bytes(tensor: Tensor) -> bytes:
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def _ran(model: Exportable, path: Path, options: Options) -> tuple[str, float]:
    """The shapes that the runtime ran, and the largest relative difference of outputs."""
    from executorch.runtime import Runtime

    method = Runtime.get().load_program(path).load_method("forward")
    batch, length = limits(model, options)
    shapes, worst = [], 0.0
    for given in _calls(model, options, batch, length):
        pairs = [
            (method.execute(list(rows))[0].detach().clone().float(), _reference(model, rows))
            for rows in rows_of(given, batch)
        ]
        worst = max(worst, relative_difference(*(torch.cat(side) for side in zip(*pairs, strict=True))))
        shapes.append("x".join(map(str, given[0].shape)))
    return ", ".join(shapes), worst


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


def _reference(model: Exportable, rows: tuple[Tensor, ...]) -> Tensor:
    dtype = next(p.dtype for p in model.network.parameters() if p.is_floating_point())
    cast = tuple(x.to(dtype) if x.is_floating_point() else x for x in rows)
    return outputs_of(model.network, cast if isinstance(model.sample, tuple) else dict(zip(model.sample, cast, strict=True)))
