"""What must hold before a model is prepared: it is untouched, the plan is its own, its weights are sound."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from qat_plugin.errors import PrepareError, QatError
from qat_plugin.numerics import check_group_size
from qat_plugin.policy import Candidate, LayerPlan, Plan, candidates, runs_convolutions, unknown_layers
from qat_plugin.policy.roles import is_quantized
from qat_plugin.qat.layers import FakeQuantized


def check_untouched(model: nn.Module) -> None:
    """Raise when a model is prepared or converted already.

    Raises:
        PrepareError: saying which.
    """
    if any(isinstance(module, FakeQuantized) for module in model.modules()):
        raise PrepareError(
            f"{type(model).__name__} is already prepared for quantization-aware training; call unprepare(model) first "
            "to change its plan"
        )
    if any(_is_ours(parameter) for parameter in model.parameters()):
        raise PrepareError(
            f"{type(model).__name__} is already converted to integers: it cannot be trained. Load its float checkpoint "
            "into a fresh model, or the file it came from by qat_plugin.load(path, dequantize=True)"
        )


def _is_ours(parameter: Tensor) -> bool:
    return is_quantized(parameter) and type(parameter.data).__module__.startswith("qat_plugin.")


def check_materialised(plan: Plan, layers: Mapping[str, nn.Module]) -> None:
    """Raise when the scales of a planned layer cannot be computed yet.

    Raises:
        PrepareError: naming the layer.
    """
    for entry in plan.quantized:
        if layers[entry.name].weight.device.type == "meta":
            raise PrepareError(
                f"{entry.name} is on the meta device: learned or frozen scales start from its weights. Load them "
                "before prepare()"
            )


def planned_layers(model: nn.Module, plan: Plan) -> dict[str, nn.Module]:
    """Name -> layer of a model that a plan fits.

    Raises:
        PrepareError: when the plan is another model's or changes nothing, when one of its layers cannot be prepared.
    """
    if message := unknown_layers(plan, model):
        raise PrepareError(message)
    if not plan.quantized:
        reasons = "; ".join(f"{layer.name}: {layer.reason or 'kept'}" for layer in plan.kept[:5])
        raise PrepareError(f"the plan changes no layer of {type(model).__name__} ({reasons})")
    layers = {candidate.name: candidate for candidate in candidates(model)}
    sharing: dict[int, str] = {}
    for entry in plan.quantized:
        candidate, scheme = layers[entry.name], entry.scheme
        if candidate.blocked:
            raise PrepareError(f"{entry.name} cannot take {scheme}: {candidate.blocked}")
        _check_same_layer(entry, candidate, layers, sharing)
        if candidate.kind == "conv" and scheme is not None and not runs_convolutions(scheme):
            raise PrepareError(f"{entry.name} is a convolution, which cannot take {scheme}: give it w8a8-static")
        if scheme is not None and scheme.kind == "nf4":
            raise PrepareError(
                f"{entry.name}: {scheme} is a frozen base for QLoRA fine-tuning, not a scheme to train in"
            )
        check_finite(entry.name, candidate.module.weight)  # type: ignore[arg-type]
    return {name: candidate.module for name, candidate in layers.items()}


def _check_same_layer(
    entry: LayerPlan, candidate: Candidate, layers: Mapping[str, Candidate], sharing: dict[int, str]
) -> None:
    """Raise when a layer is not the one that its plan was made for."""
    name = entry.name
    weight: Tensor = candidate.module.weight  # type: ignore[assignment]
    shape = tuple(weight.shape) if candidate.kind == "norm" else candidate.out_in
    if entry.shape != shape:
        raise PrepareError(
            f"the plan was made for another model: {name} has a weight of {list(entry.shape)} [out, in] there, "
            f"{list(shape)} here"
        )
    leader = entry.tied_to or sharing.setdefault(id(weight), name)
    if leader not in layers or (
        leader != name and (entry.tied_to is None or layers[leader].module.weight is not weight)
    ):
        raise PrepareError(
            f"{name} {'is tied to ' + leader if entry.tied_to else 'is not tied'} in the plan and "
            f"{'is not' if entry.tied_to else 'shares the weight of ' + leader} in this model: tie weights before "
            "planning"
        )
    if entry.scheme is not None and entry.scheme.is_integer:
        try:
            check_group_size(candidate.out_in[1], entry.scheme)
        except QatError as error:
            raise PrepareError(f"{name}: {error}") from error
    if "forward" in candidate.module.__dict__:
        raise PrepareError(
            f"{name}: its forward was replaced on the instance (an accelerate hook, a patch), which bypasses fake "
            "quantization; prepare the model before that, or keep this layer"
        )


def check_finite(name: str, weight: Tensor) -> None:
    """Raise when a weight holds NaN or infinity; weights on the meta device pass.

    Raises:
        PrepareError: naming the layer and how many weights are not finite.
    """
    if weight.device.type == "meta":
        return
    low, high = torch.aminmax(weight.detach())
    if torch.isfinite(low) and torch.isfinite(high):
        return
    bad = int((~torch.isfinite(weight.detach())).sum())
    raise PrepareError(
        f"{name}: {bad} of its {weight.numel()} weights are NaN or infinite; quantizing would spread them over their "
        "groups. Load a sound checkpoint"
    )
