"""A converted model takes a float state_dict and stays converted.

``trainer.test()`` after a fit reloads the best (float) checkpoint into the model that is there. Each converted layer
quantizes the float weight that arrives, instead of failing on it or turning float again (Lightning #12896).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from qat_plugin.errors import CheckpointError, ConversionError
from qat_plugin.kernels.weight import CastWeight, QuantizedWeight, is_converted_weight
from qat_plugin.learned import learned_scale
from qat_plugin.numerics import quantize
from qat_plugin.observers.factory import observed_scale
from qat_plugin.observers.spelling import DEFAULT_FOR_TRAINING
from qat_plugin.policy import Candidate, candidates
from qat_plugin.qat.folded import fold_state_dict, folds
from qat_plugin.qat.initial import Initial, initial_scales
from qat_plugin.qat.quantizer import Phase
from qat_plugin.qat.state import initial_in, observer_in, phase_in
from qat_plugin.scheme import Scheme


def requantize_on_load(module: nn.Module, state_dict: dict[str, Any], prefix: str, *_: Any) -> None:
    """A load_state_dict pre-hook: quantize the float weight that arrives for a converted layer, by min-max scales."""
    current, incoming = module._parameters.get("weight"), state_dict.get(f"{prefix}weight")
    if current is None or not isinstance(incoming, Tensor) or is_converted_weight(incoming):
        return
    if is_converted_weight(current):
        if incoming.shape != current.shape:
            return  # torch reports the sizes
        state_dict[f"{prefix}weight"] = like(current, incoming, {})


@torch.no_grad()
def like(
    current: Tensor,
    weight: Tensor,
    state: Mapping[str, Tensor],
    observer: str = DEFAULT_FOR_TRAINING,
    begins: Initial = "minmax",
) -> Tensor:
    """A float weight in the representation of a converted one.

    Args:
        current: the converted weight it takes the place of.
        weight: float, of the same logical shape.
        state: that layer's entry of a quantizer state; its learned or frozen scales are used when it has any.
        observer: what observed the activations of that state.
        begins: where its scales begin, when the state has none.
    """
    weight = weight.detach().to(current.device)
    if isinstance(current, CastWeight):
        return CastWeight(weight.to(current.data_.dtype), current.logical_dtype)
    assert isinstance(current, QuantizedWeight)
    rows, scheme = current.rows_of(weight), current.scheme
    input_scale = current.input_scale
    if input_scale is not None:
        input_scale = state.get("input_scale", input_scale).to(rows.device)
        rows = rows * input_scale
    if "frozen_scale" in state:
        integers = quantize(rows, *_on(rows, state["frozen_scale"], state.get("frozen_zero_point")), scheme)
    elif "scale" in state:
        integers = quantize(rows, *_on(rows, learned_scale(state["scale"], scheme), state.get("zero_point")), scheme)
    else:
        integers = quantize(rows, *initial_scales(rows, scheme, begins), scheme)
    activation_scale = current.activation_scale
    if "absmax" in state and activation_scale is not None:
        activation_scale = observed_scale(observer, state).to(activation_scale.device)
    return QuantizedWeight.from_integers(
        integers,
        current.logical_dtype,
        transposed=current.transposed,
        usage=current.usage,
        conv=current.conv,
        activation_scale=activation_scale,
        input_scale=input_scale,
        kernel=current.kernel_name,
    )


def _on(rows: Tensor, scale: Tensor, zero_point: Tensor | None) -> tuple[Tensor, Tensor | None]:
    return scale.to(rows.device), None if zero_point is None else zero_point.to(rows.device)


def dequantized_state_dict(model: nn.Module) -> dict[str, Tensor]:
    """The float state_dict of a converted model: its integers as the numbers they stand for.

    It loads into the user's own float model, without this package; quantizing it again gives the same integers where
    the scales are min-max ones and no layer has an input scale (by which its numbers are divided here).
    """
    return {
        name: tensor.dequantize() if is_converted_weight(tensor) else tensor
        for name, tensor in model.state_dict().items()
    }


def reload_float(
    model: nn.Module, state_dict: Mapping[str, Tensor], quantizer_state: Mapping[str, Any] | None = None
) -> None:
    """Load a float state_dict into a converted model, with the scales of the checkpoint it comes from.

    Args:
        model: converted; its integer layers stay integer.
        state_dict: the float model's.
        quantizer_state: what :func:`~qat_plugin.qat.quantizer_state` saved beside it; needed when scales were learned
            or frozen, since min-max scales of the weights would be others.

    Raises:
        ConversionError: when the model is not converted.
        CheckpointError: when names, shapes or schemes do not match; nothing is changed then.
    """
    layers = {c.name: c for c in candidates(model) if is_converted_weight(c.module._parameters.get("weight"))}
    if not layers:
        raise ConversionError(f"{type(model).__name__} is not converted: use load_state_dict")
    own = model.state_dict()
    wrong = sorted(own.keys() ^ state_dict.keys()) or [
        name for name, value in own.items() if _shape(value) != _shape(state_dict[name])
    ]
    if wrong:
        raise CheckpointError(
            f"the state_dict does not fit {type(model).__name__}: {', '.join(wrong[:5])} missing, unknown or "
            "of another shape"
        )
    states, begins = _states(quantizer_state, layers)
    observer = DEFAULT_FOR_TRAINING if quantizer_state is None else observer_in(quantizer_state)
    merged: dict[str, Tensor] = dict(state_dict)
    paths = {module: path for path, module in model.named_modules()}
    for fold in folds(model):  # of before the fold, it may be
        fold_state_dict(fold, merged, f"{paths[fold.layer]}.", f"{paths[fold.norm]}.")
    for name, candidate in layers.items():
        key = f"{candidate.path}.weight" if candidate.path else "weight"
        current = candidate.module._parameters["weight"]
        assert current is not None
        if not is_converted_weight(merged[key]):
            merged[key] = like(current, merged[key], states.get(name, {}), observer, begins.get(name, "minmax"))
    model.load_state_dict(merged)


def _shape(value: object) -> tuple[int, ...] | None:
    return tuple(value.shape) if isinstance(value, Tensor) else None


def _states(
    state: Mapping[str, Any] | None, layers: Mapping[str, Candidate]
) -> tuple[dict[str, dict[str, Tensor]], dict[str, Initial]]:
    """Each layer's entry of a quantizer state that fits the converted layers; where scales begin that had not."""
    if state is None:
        return {}, {}
    try:
        entries = {name: dict(state["layers"][name]) for name in layers}
        waiting = [name for name in layers if phase_in(state, name) in (Phase.FLOAT, Phase.OBSERVING)]
        initial = initial_in(state) or "minmax"
        schemes = {entry["name"]: entry["scheme"] for entry in state["plan"]}
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(
            f"the quantizer state is not one of this model ({type(error).__name__}: {error})"
        ) from error
    for name, candidate in layers.items():
        weight = candidate.module._parameters["weight"]
        if not isinstance(weight, QuantizedWeight):
            continue
        if Scheme.parse(schemes[name] or "fp32").weight_format != weight.scheme.weight_format:
            raise CheckpointError(f"{name} is {weight.scheme} here, {schemes[name]} in the quantizer state")
        if ("input_scale" in entries[name]) != (weight.input_scale is not None):
            there_or_not = "has" if "input_scale" in entries[name] else "lacks"
            raise CheckpointError(
                f"{name}: the quantizer state {there_or_not} an input scale, the converted layer does the opposite; "
                "convert a model prepared from that checkpoint"
            )
        here = tuple(weight.integers().scale.shape)
        for key in ("scale", "frozen_scale"):
            there = _shape(entries[name].get(key))
            if there not in (None, here):
                raise CheckpointError(f"{name}: the quantizer state's {key} has shape {there}, not {here}")
    begins: dict[str, Initial] = {}
    for name in waiting:  # learned scales begin with fake quantization: until then they are of other weights
        entries[name].pop("zero_point", None)
        if entries[name].pop("scale", None) is not None:
            begins[name] = initial
    return entries, begins
