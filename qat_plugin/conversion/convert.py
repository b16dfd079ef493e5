"""``convert(model, plan)``: from fake quantization to integers and the kernels that run them.

For each planned layer, in order: the integers in force are packed for the best kernel here, and the layer is proven:
its dequantized weight equals the fake-quantized one exactly, and its output lies within the kernel's rounding contract.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from qat_plugin.conversion.absorb import absorb_norms, release_norms
from qat_plugin.conversion.frozen import refuse_training
from qat_plugin.conversion.layer import (
    LayerConversion,
    cast_parameters,
    conv_shape,
    converted_weight,
    sharing_keys,
)
from qat_plugin.conversion.proof import Proof
from qat_plugin.errors import ConversionError, did_you_mean
from qat_plugin.kernels import LayerSpec, choose, kernel_named
from qat_plugin.kernels.scales import scale_dtype
from qat_plugin.kernels.weight import QuantizedWeight, is_converted_weight
from qat_plugin.policy import Plan, PolicyLike, clean_name, plan_for
from qat_plugin.qat import (
    LayerQuantizer,
    check_observed,
    is_prepared,
    plan_of,
    prepare,
    prepared_layers,
    quantizers,
    unprepare,
)
from qat_plugin.qat.checks import check_finite
from qat_plugin.qat.folding import Unfolded
from qat_plugin.qat.layers import ATTRIBUTE, current_weight
from qat_plugin.qat.prepare import fake_quantize_all


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
    reversible: bool = True,
) -> nn.Module:
    """Give a model real integer storage and real integer kernels, in place.

    A prepared model is converted with the scales training ended with; any other model is quantized by rounding to
    nearest with min-max scales. The result is for inference: its parameters no longer require gradients, and a backward
    pass raises.

    Args:
        model: any module, prepared or not.
        plan: a plan or policy; needed when the model is not prepared, and not allowed to differ when it is.
        inputs: real inputs of the layers for the proof, as :func:`~qat_plugin.qat.capture_inputs` collects them;
            layers without any are proven on random rows.
        dtype: the float type to run in (for example ``torch.bfloat16``, in which the INT4 kernels are fast): what is
            not quantized is cast, the integers stay those of training.
        reversible: keep the float weights until the last layer is proven, so that a failure leaves the model as it was;
            memory peaks at both. Without it each float weight is let go with its layer, memory peaks at the float model
            and less than three times its largest layer, and a model that fails halfway must be loaded anew.

    Returns:
        ``model``. :func:`proof_of` tells what was checked.

    Raises:
        ConversionError: when the model is already converted, when a layer has no kernel here, or when a layer fails its
            proof; the model is then what it was (or, with ``reversible=False``, partly converted: the message says so).
        PrepareError: for NaN weights, or static schemes without calibration; it names all of these.

    Example::

        small = convert(model, "w8a8")
    """
    if is_converted(model):
        raise ConversionError(
            f"{type(model).__name__} is already converted; convert a float model, or reload its checkpoint"
        )
    fresh = not is_prepared(model)
    unfolded = Unfolded(model) if fresh else None
    if fresh:
        if plan is None:
            raise ConversionError("convert(model) needs a plan or a policy for a model that was not prepared")
        prepare(model, plan)
    phases, agreed = [(quantizer, quantizer.phase) for quantizer in quantizers(model).values()], plan_of(model)
    layers: dict[str, nn.Module] = {}
    done: list[LayerConversion] = []
    casts: dict[int, nn.Parameter] = {}
    try:
        if not fresh and plan is not None:
            _check_same_plan(model, plan)
        layers = _ready(model, dtype)
        with torch.inference_mode(False):  # what is made here outlives it
            proof = _convert_layers(layers, _checked(inputs or {}, layers), dtype, done, casts, reversible, unfolded)
            absorb_norms(model)
    except BaseException as failure:
        if gone := sum(conversion.gone for conversion in done):
            left = (
                f"{type(model).__name__} is partly converted ({gone} of {len(layers)} layers) and their float weights "
                "are gone, as reversible=False allows: load it anew."
            )
            if isinstance(failure, Exception):
                raise ConversionError(f"{left} {failure}") from failure
            warnings.warn(left, stacklevel=2)
            raise
        release_norms(model)
        for conversion in reversed(done):
            conversion.take_back()
        if fresh:
            unprepare(model)
            if unfolded is not None:
                unfolded.restore()
        for quantizer, phase in phases if not fresh else ():
            quantizer.phase = phase
        raise
    model.requires_grad_(False)
    refuse_training(next(iter(layers.values())))
    if dtype is not None:
        cast_parameters(model, dtype, casts)
        _cast_buffers(model, dtype)
    remember(model, Conversion(with_kernels(agreed, layers), proof))
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


def remember(model: nn.Module, conversion: Conversion) -> None:
    """Let a converted model know its plan and proof, and the module inside that holds all of its layers, if any.

    What a LightningModule trains can be taken out of it and saved or exported on its own.
    """
    model._qat_conversion = conversion  # type: ignore[assignment]
    for name, child in model.named_children():
        prefix = f"{cleaned}." if (cleaned := clean_name(name)) else ""
        if len(conversion.plan) and all(entry.name.startswith(prefix) for entry in conversion.plan):
            remember(child, _below(conversion, prefix, type(child).__name__))


def _below(conversion: Conversion, prefix: str, model: str) -> Conversion:
    """The same by the names of a module inside."""

    def inside(name: str) -> str:
        return name.removeprefix(prefix)

    plan = (
        replace(entry, name=inside(entry.name), tied_to=None if entry.tied_to is None else inside(entry.tied_to))
        for entry in conversion.plan
    )
    proof = (replace(entry, name=inside(entry.name)) for entry in conversion.proof.layers)
    return Conversion(Plan(tuple(plan), model), Proof(tuple(proof)))


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
    check_observed(model)
    for name, layer in layers.items():
        quantizer: LayerQuantizer = getattr(layer, ATTRIBUTE)
        weight = layer._parameters.get("weight")
        if weight is None:
            raise ConversionError(
                f"{name}: its weight is computed by pruning or a parametrization; make that permanent first "
                "(torch.nn.utils.prune.remove)"
            )
        if weight.device.type == "meta":
            raise ConversionError(f"{name} is on the meta device: load its weights before converting")
        check_finite(name, weight)
        if quantizer.scheme.is_integer:
            choice = choose(_spec(layer, quantizer, weight, dtype))
            if choice.refusal is not None:
                raise ConversionError(
                    f"{name}: no kernel runs {quantizer.scheme} on {weight.device.type}: {choice.refusal}"
                )
    fake_quantize_all(model)
    return layers


def _spec(layer: nn.Module, quantizer: LayerQuantizer, weight: Tensor, dtype: torch.dtype | None) -> LayerSpec:
    rows, columns = quantizer.rows(weight).shape
    usage: Any = quantizer.layer.usage
    conv = conv_shape(layer, weight)
    return LayerSpec(quantizer.scheme, rows, columns, weight.device, dtype or weight.dtype, usage, conv)


def _checked(inputs: Mapping[str, Tensor], layers: Mapping[str, nn.Module]) -> Mapping[str, Tensor]:
    if unknown := sorted(inputs.keys() - layers.keys()):
        raise ConversionError(
            f"inputs were given for {', '.join(unknown[:5])}, which the plan does not convert."
            f"{did_you_mean(unknown[0], layers)}"
        )
    return inputs


def _convert_layers(
    layers: Mapping[str, nn.Module],
    inputs: Mapping[str, Tensor],
    dtype: torch.dtype | None,
    done: list[LayerConversion],
    casts: dict[int, nn.Parameter],
    reversible: bool,
    unfolded: Unfolded | None,
) -> Proof:
    """Convert and prove each layer; layers tied in one format go on sharing one Parameter.

    Args:
        layers, inputs, dtype: what to convert, on what to prove it, the float type to run in.
        done: collects the layers begun, for taking them back.
        casts: collects the float parameters cast.
        reversible: keep what it takes to undo each conversion.
        unfolded: the numbers of before the fold, which go with the first weight that is let go.
    """
    keys = sharing_keys(layers)
    multiplying = {keys[name]: name for name in reversed(list(layers)) if not isinstance(layers[name], nn.Embedding)}
    made: dict[tuple[object, ...], nn.Parameter] = {}
    proofs = []
    for name, layer in layers.items():
        done.append(LayerConversion(layer, dtype or current_weight(layer).dtype))
        if keys[name] not in made:  # an embedding takes the scheme of the layer that multiplies by the same weight
            source: LayerQuantizer = getattr(layers[multiplying.get(keys[name], name)], ATTRIBUTE)
            made[keys[name]] = converted_weight(layer, source, done[-1].weight, done[-1].dtype)
        proofs.append(done[-1].run(inputs.get(name), made[keys[name]], casts))
        if not reversible:
            done[-1].let_go()
            if unfolded is not None:
                unfolded.forget()
    return Proof(tuple(proofs))


def _cast_buffers(model: nn.Module, dtype: torch.dtype) -> None:
    """Cast the buffers that a state_dict holds (batch statistics); others (rotary frequencies) keep their type."""
    for module in model.modules():
        for name, buffer in module._buffers.items():
            if buffer is not None and buffer.is_floating_point() and name not in module._non_persistent_buffers_set:
                module._buffers[name] = buffer.to(dtype)


def with_kernels(plan: Plan, layers: Mapping[str, nn.Module]) -> Plan:
    """The plan with the kernels that run now.

    Args:
        plan: that the layers were converted by.
        layers: name in the plan -> module.
    """
    entries = []
    for entry in plan:
        weight = layers[entry.name]._parameters.get("weight") if entry.name in layers else None
        if isinstance(weight, QuantizedWeight) and entry.scheme is not None:
            spec = LayerSpec(
                *(entry.scheme, weight.out_features, weight.in_features, weight.device, weight.dtype),
                *(weight.usage, weight.conv, scale_dtype(weight.scale.float())),
            )
            kernel, leader = kernel_named(weight.kernel_name), layers.get(entry.tied_to or "")
            shared = leader is not None and leader._parameters.get("weight") is weight
            scaled = 0 if weight.input_scale is None else weight.input_scale.nbytes
            size = 0 if shared else kernel.nbytes(spec) + scaled
            entry = replace(entry, kernel=kernel.name, note=choose(spec).note, bytes_after=size)
        entries.append(entry)
    return Plan(tuple(entries), plan.model)
