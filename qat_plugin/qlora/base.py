"""The frozen base: layers that become NF4, layers stored in a narrower float type."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from qat_plugin.errors import PrepareError
from qat_plugin.policy import Candidate, LayerPlan, Plan, candidates
from qat_plugin.qlora.nf4 import Backend, is_nf4, nf4_bytes, nf4_linear
from qat_plugin.scheme import Scheme


def existing_scheme(layer: nn.Module) -> tuple[Scheme, tuple[int, int]]:
    """Scheme and [out_features, in_features] of a layer that is NF4 already."""
    state = getattr(layer.weight, "quant_state", None)
    double = state.nested if state is not None else True  # torchao's NF4 always quantizes its scales
    return Scheme.parse("nf4-dq" if double else "nf4"), (int(layer.out_features), int(layer.in_features))  # type: ignore[arg-type]


def nf4_plan(entry: LayerPlan, candidate: Candidate) -> LayerPlan:
    """The plan of a layer in NF4, with its bytes.

    Raises:
        PrepareError: for what cannot be NF4.
    """
    assert entry.scheme is not None
    if candidate.kind not in ("linear", "conv1d"):
        raise PrepareError(
            f"{entry.name} ({entry.type}) cannot be {entry.scheme}: only linear layers can. Keep it, or give it bf16"
        )
    if entry.tied_to:
        raise PrepareError(
            f"{entry.name} shares its weight with {entry.tied_to}, and NF4 layers cannot share: keep it (the default "
            "leaves embeddings and heads alone)"
        )
    return replace(entry, kernel="nf4", note="frozen", bytes_after=nf4_bytes(entry.shape, entry.scheme))


def quantize_layers(
    model: nn.Module,
    plan: Plan,
    *,
    backend: Backend,
    compute_dtype: torch.dtype | None,
    device: torch.device | str | None,
) -> None:
    """Put NF4 layers in place of the float ones that the plan names; each float weight is let go at once.

    Raises:
        PrepareError: naming a layer that cannot be quantized.
    """
    modules = {candidate.name: candidate.module for candidate in candidates(model)}
    planned = [layer for layer in plan if layer.scheme is not None and layer.scheme.kind == "nf4"]
    places: dict[int, list[tuple[nn.Module, str]]] = {}
    for parent in model.modules():
        for name, child in parent._modules.items():
            if child is not None:
                places.setdefault(id(child), []).append((parent, name))
    for layer in planned:
        module = modules.pop(layer.name)
        if is_nf4(module):
            continue
        assert layer.scheme is not None
        if module is model:
            raise PrepareError(f"{type(model).__name__} is itself the layer to quantize: wrap it, nn.Sequential(layer)")
        try:
            quantized = nf4_linear(module, layer.scheme, backend=backend, compute_dtype=compute_dtype, device=device)
        except PrepareError as error:
            raise PrepareError(f"{layer.name}: {error}") from error
        for parent, name in places[id(module)]:
            parent._modules[name] = quantized


def cast_layers(model: nn.Module, plan: Plan) -> None:
    """Store the layers that the plan gives a float scheme in that type; their inputs and outputs keep theirs."""
    modules = {candidate.name: candidate.module for candidate in candidates(model)}
    cast = [(modules[layer.name], layer.scheme) for layer in plan if layer.scheme is not None and layer.scheme.is_float]
    given = [_float_type(layer) for layer, _ in cast]  # before any: tied layers are cast together
    for (layer, scheme), dtype in zip(cast, given, strict=True):
        for parameter in layer.parameters(recurse=False):
            if parameter.is_floating_point():
                parameter.data = parameter.data.to(scheme.float_dtype)
        layer._qlora_types = (dtype, scheme.float_dtype)  # type: ignore[assignment]
        layer.register_forward_pre_hook(_inputs_to_stored_type)
        layer.register_forward_hook(_output_to_given_type)


def _float_type(layer: nn.Module) -> torch.dtype:
    return next(p.dtype for p in layer.parameters(recurse=False) if p.is_floating_point())


def _inputs_to_stored_type(layer: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
    _, stored = layer.__dict__["_qlora_types"]
    return tuple(a.to(stored) if isinstance(a, Tensor) and a.is_floating_point() else a for a in args)


def _output_to_given_type(layer: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
    given, _ = layer.__dict__["_qlora_types"]
    return output.to(given) if isinstance(output, Tensor) and output.is_floating_point() else output
