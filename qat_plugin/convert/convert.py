"""``convert(model, plan)``: from fake quantization to integers and the kernels that run them.

For each planned layer, in order: the integers in force are packed for the best kernel here, and the layer is proven:
its dequantized weight equals the fake-quantized one exactly, and its output lies within the kernel's rounding contract.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from qat_plugin.convert.proof import LayerProof, Proof, relative_error
from qat_plugin.convert.reload import requantize_on_load
from qat_plugin.errors import ConversionError, PrepareError
from qat_plugin.kernels import LayerSpec, choose, kernel_named
from qat_plugin.kernels.table import ROUNDING
from qat_plugin.kernels.weight import CastWeight, QuantizedWeight, is_converted_weight
from qat_plugin.policy import Plan, PolicyLike, plan_for
from qat_plugin.qat import LayerQuantizer, Phase, is_prepared, plan_of, prepare, prepared_layers, set_phase, unprepare
from qat_plugin.qat.layers import ATTRIBUTE, restore
from qat_plugin.qat.prepare import check_finite
from qat_plugin.scheme import Scheme

logger = logging.getLogger(__name__)
_RANDOM_ROWS = 16


@dataclass(frozen=True)
class Conversion:
    """What a converted model remembers: its plan and its proof."""

    plan: Plan
    proof: Proof


def convert(
    model: nn.Module,
    plan: Plan | PolicyLike | None = None,
    *,
    inputs: Mapping[str, Tensor] | None = None,
    dtype: torch.dtype | None = None,
) -> nn.Module:
    """Give a model real integer storage and real integer kernels, in place.

    A prepared model is converted with the scales training ended with; any other model is quantized by rounding to
    nearest with min-max scales. The result is for inference: its parameters no longer require gradients, and a backward
    pass through an integer layer raises.

    Args:
        model: any module, prepared or not.
        plan: a plan or policy; needed when the model is not prepared, and not allowed to differ when it is.
        inputs: real inputs of the layers for the proof, as :func:`~qat_plugin.qat.capture_inputs` collects them;
            layers without any are proven on random rows.
        dtype: the float type to run in (for example ``torch.bfloat16``, in which the INT4 kernels are fast): what is
            not quantized is cast, the integers stay those of training.

    Returns:
        ``model``. :func:`proof_of` tells what was checked.

    Raises:
        ConversionError: when the model is already converted, when a layer has no kernel here, or when a layer fails its
            proof (that layer stays as it was; the ones before it are converted).
        PrepareError: for NaN weights, or a static scheme without calibration.

    Example::

        small = convert(model, "w8a8")
    """
    if is_converted(model):
        raise ConversionError(
            f"{type(model).__name__} is already converted; convert a float model, or reload its checkpoint"
        )
    fresh = not is_prepared(model)
    if fresh:
        if plan is None:
            raise ConversionError("convert(model) needs a plan or a policy for a model that was not prepared")
        prepare(model, plan)
    try:
        if not fresh and plan is not None:
            _check_same_plan(model, plan)
        layers = _ready(model, dtype)
    except Exception:
        if fresh:
            unprepare(model)
        raise
    agreed = plan_of(model)
    proof = _convert_layers(layers, dict(inputs or {}), dtype)
    model.requires_grad_(False)
    if dtype is not None:
        _cast_parameters(model, dtype)
    model._qat_conversion = Conversion(_with_kernels(agreed, layers, dtype), proof)  # type: ignore[assignment]
    return model


def is_converted(model: nn.Module) -> bool:
    """Whether any parameter of the model is an integer or cast weight of this package."""
    return any(is_converted_weight(parameter) for parameter in model.parameters())


def proof_of(model: nn.Module) -> Proof:
    """What was checked when the model was converted (or loaded).

    Raises:
        ConversionError: when it is not converted.
    """
    return conversion_of(model).proof


def conversion_of(model: nn.Module) -> Conversion:
    """Plan and proof of a converted model.

    Raises:
        ConversionError: when it is not converted.
    """
    conversion = getattr(model, "_qat_conversion", None)
    if not isinstance(conversion, Conversion):
        raise ConversionError(f"{type(model).__name__} was not converted by convert() or load_converted()")
    return conversion


def _check_same_plan(model: nn.Module, plan: Plan | PolicyLike) -> None:
    """Raise when a plan given beside a prepared model says something else."""
    trained = {layer.name: layer.scheme for layer in plan_of(model).quantized}
    wanted = {
        layer.name: layer.scheme for layer in (plan if isinstance(plan, Plan) else plan_for(model, plan)).quantized
    }
    for name in trained.keys() | wanted.keys():
        if trained.get(name) != wanted.get(name):
            raise ConversionError(
                f"{name} was trained as {trained.get(name, 'float')} and the plan given to convert() says "
                f"{wanted.get(name, 'float')}: what is trained is what ships. Leave the plan out, or "
                "unprepare(model) first"
            )


def _ready(model: nn.Module, dtype: torch.dtype | None) -> dict[str, nn.Module]:
    """Check all that can be checked before anything changes; the layers by name."""
    layers = prepared_layers(model)
    for name, layer in layers.items():
        quantizer: LayerQuantizer = getattr(layer, ATTRIBUTE)
        weight = layer._parameters["weight"]
        assert weight is not None
        if weight.device.type == "meta":
            raise ConversionError(f"{name} is on the meta device: load its weights before converting")
        check_finite(name, weight)
        quantizer.activation_scale()
        if quantizer.scheme.is_integer:
            choice = choose(_spec(quantizer, weight, dtype))
            if choice.refusal is not None:
                raise ConversionError(
                    f"{name}: no kernel runs {quantizer.scheme} on {weight.device.type}: {choice.refusal}"
                )
    if any(not getattr(layer, ATTRIBUTE).active for layer in layers.values()):
        set_phase(model, Phase.FAKE_QUANTIZED)
    return layers


def _spec(quantizer: LayerQuantizer, weight: Tensor, dtype: torch.dtype | None) -> LayerSpec:
    rows, columns = quantizer.rows(weight).shape
    usage: Any = quantizer.layer.usage
    return LayerSpec(quantizer.scheme, rows, columns, weight.device, dtype or weight.dtype, usage)


def _convert_layers(layers: Mapping[str, nn.Module], inputs: dict[str, Tensor], dtype: torch.dtype | None) -> Proof:
    """Convert and prove each layer; layers tied in one format go on sharing one Parameter."""
    shared: dict[tuple[int, Scheme], nn.Parameter] = {}
    followed = {getattr(layer, ATTRIBUTE).layer.tied_to: name for name, layer in layers.items()}
    tied = {name for pair in followed.items() if pair[0] is not None for name in pair}
    originals = [layers[name]._parameters["weight"] for name in tied if name in layers]  # keeps their ids unique
    proofs = [
        _convert_layer(layer, inputs.get(name), dtype, shared if name in tied else {}) for name, layer in layers.items()
    ]
    del originals
    return Proof(tuple(proofs))


@torch.no_grad()
def _convert_layer(
    layer: nn.Module, rows: Tensor | None, dtype: torch.dtype | None, shared: dict[tuple[int, Scheme], nn.Parameter]
) -> LayerProof:
    quantizer: LayerQuantizer = getattr(layer, ATTRIBUTE)
    weight = layer._parameters["weight"]
    assert weight is not None
    x = _random_input(layer, quantizer, weight) if rows is None else rows.to(weight.device)
    if x.is_floating_point():
        x = x.to(weight.dtype)
    training = layer.training
    layer.eval()
    reference, expected = layer(x), quantizer.rows(quantizer.fake_weight(quantizer.rows(weight)))
    key = (id(weight), quantizer.scheme.weight_format)
    if key not in shared:
        shared[key] = nn.Parameter(_converted_weight(quantizer, weight), requires_grad=False)
    converted = shared[key]
    restore(layer)
    layer._parameters["weight"] = converted
    try:
        difference = (converted.dequantize() - expected).abs().max().item() if expected.numel() else 0.0
        kernel = getattr(converted, "kernel_name", "cast")
        tolerance = (
            ROUNDING.get(weight.dtype, 1e-2) if kernel == "cast" else kernel_named(kernel).tolerance(weight.dtype)
        )
        error = relative_error(layer(x), reference)
        name, scheme = quantizer.layer.name, str(quantizer.scheme)
        proof = LayerProof(
            name, scheme, kernel, difference, error, tolerance, "random" if rows is None else "real"
        ).check()
        if dtype is not None and dtype != weight.dtype:
            layer._parameters["weight"] = shared[key] = nn.Parameter(converted.to(dtype), requires_grad=False)
    except Exception as failure:
        layer._parameters["weight"] = weight
        from qat_plugin.qat.layers import extend

        extend(layer, quantizer)
        if isinstance(failure, (ConversionError, PrepareError)):
            raise
        raise ConversionError(
            f"{quantizer.layer.name} ({type(layer).__name__}): its forward does something with the weight that has no "
            f"integer form ({type(failure).__name__}: {failure}). Keep this layer in the policy"
        ) from failure
    finally:
        layer.train(training)
    layer.register_load_state_dict_pre_hook(requantize_on_load)
    return proof


def _converted_weight(quantizer: LayerQuantizer, weight: Tensor) -> Tensor:
    if quantizer.scheme.is_float:
        return CastWeight(weight.detach().to(quantizer.scheme.float_dtype), weight.dtype)
    return QuantizedWeight.from_integers(
        quantizer.integers(weight.detach()),
        weight.dtype,
        transposed=quantizer.transposed,
        usage=quantizer.layer.usage,  # type: ignore[arg-type]
        activation_scale=quantizer.activation_scale(),
    )


def _random_input(layer: nn.Module, quantizer: LayerQuantizer, weight: Tensor) -> Tensor:
    """Rows from a generator of its own: conversion leaves the global random state alone."""
    generator = torch.Generator().manual_seed(0)
    count, features = quantizer.rows(weight).shape
    if isinstance(layer, nn.Embedding):
        return torch.randint(count, (_RANDOM_ROWS,), generator=generator).to(weight.device)
    return torch.randn(_RANDOM_ROWS, features, generator=generator).to(weight.device, weight.dtype)


def _cast_parameters(model: nn.Module, dtype: torch.dtype) -> None:
    """Cast the parameters that stay float; buffers keep their type (rotary frequencies need theirs)."""
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None and parameter.is_floating_point() and parameter.dtype != dtype:
                module._parameters[name] = nn.Parameter(parameter.to(dtype), requires_grad=False)


def _with_kernels(plan: Plan, layers: Mapping[str, nn.Module], dtype: torch.dtype | None) -> Plan:
    """The plan with the kernels that run now."""
    entries = []
    for entry in plan:
        weight = layers[entry.name]._parameters["weight"] if entry.name in layers else None
        if isinstance(weight, QuantizedWeight) and entry.scheme is not None:
            spec = LayerSpec(
                entry.scheme, weight.out_features, weight.in_features, weight.device, weight.dtype, weight.usage
            )
            kernel = kernel_named(weight.kernel_name)
            size = 0 if entry.tied_to and not entry.untied_bytes else kernel.nbytes(spec)
            entry = replace(entry, kernel=kernel.name, note=choose(spec).note, bytes_after=size)
        entries.append(entry)
    return Plan(tuple(entries), plan.model)
