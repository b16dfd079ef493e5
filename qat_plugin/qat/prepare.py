"""``prepare(model, plan)``: fake quantization in place, and the state that goes with it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from qat_plugin.errors import CheckpointError, PrepareError, did_you_mean
from qat_plugin.policy import Plan, Policy, PolicyLike, candidates, unknown_layers
from qat_plugin.policy.roles import is_quantized
from qat_plugin.qat.layers import ATTRIBUTE, FakeQuantized, extend, first_tensor, restore, transposed
from qat_plugin.qat.quantizer import LayerQuantizer, Phase

STATE_VERSION = 1
_ROWS_KEPT = 64


def prepare(
    model: nn.Module,
    plan: Plan | PolicyLike,
    *,
    learn_scales: bool = False,
    phase: Phase = Phase.FAKE_QUANTIZED,
) -> nn.Module:
    """Insert fake quantization into a model, in place.

    Parameter objects, names, dtypes, hooks, ties and train/eval mode survive; ``state_dict()`` stays the float model's.
    Call it before the optimizer is built, and before sharding or DDP wraps the model.

    Args:
        model: any module; its layers are extended in place.
        plan: a Plan for this model, or whatever :class:`~qat_plugin.policy.Policy` takes.
        learn_scales: make the scales Parameters (LSQ, arXiv:1902.08153) of ``model``.
        phase: the phase to start in.

    Returns:
        ``model``.

    Raises:
        PrepareError: when the model is already prepared or converted, when the plan is another model's or changes
            nothing, when a weight holds NaN or infinity, when the plan holds a scheme that cannot be trained.
        PolicyError: when a policy does not fit the model.

    Example::

        prepare(model, Policy({"attention": "w8a8", "ffn": "w4a16-g32"}))
        ...  # train as ever
        convert(model)
    """
    _check_untouched(model)
    if not isinstance(plan, Plan):
        plan = Policy.coerce(plan).plan(model)
    layers = _planned(model, plan)
    quantizers: dict[str, LayerQuantizer] = {}
    for entry in plan.quantized:
        module = layers[entry.name]
        quantizers[entry.name] = LayerQuantizer(
            entry, plan, module.weight,  # type: ignore[arg-type]
            transposed=transposed(module), learn_scales=learn_scales, share=quantizers.get(entry.tied_to or ""),
        )  # fmt: skip
    for name, quantizer in quantizers.items():
        weight = layers[name].weight
        quantizer.to(weight.device)  # type: ignore[arg-type]
        extend(layers[name], quantizer)
    set_phase(model, phase)
    return model


def _check_untouched(model: nn.Module) -> None:
    if is_prepared(model):
        raise PrepareError(
            f"{type(model).__name__} is already prepared for quantization-aware training; call "
            "unprepare(model) first to "
            "change its plan"
        )
    if any(_is_ours(parameter) for parameter in model.parameters()):
        raise PrepareError(
            f"{type(model).__name__} is already converted to integers: it cannot be trained. Load its float checkpoint "
            "into a fresh model"
        )


def _is_ours(parameter: Tensor) -> bool:
    return is_quantized(parameter) and type(parameter.data).__module__.startswith("qat_plugin.")


def _planned(model: nn.Module, plan: Plan) -> dict[str, nn.Module]:
    if message := unknown_layers(plan, model):
        raise PrepareError(message)
    if not plan.quantized:
        reasons = "; ".join(f"{layer.name}: {layer.reason or 'kept'}" for layer in plan.kept[:5])
        raise PrepareError(f"the plan changes no layer of {type(model).__name__} ({reasons})")
    layers = {candidate.name: candidate for candidate in candidates(model)}
    for entry in plan.quantized:
        candidate, scheme = layers[entry.name], entry.scheme
        if candidate.blocked:
            raise PrepareError(f"{entry.name} cannot take {scheme}: {candidate.blocked}")
        if scheme is not None and scheme.kind == "nf4":
            raise PrepareError(
                f"{entry.name}: {scheme} is a frozen base for QLoRA fine-tuning, not a scheme to train in"
            )
        check_finite(entry.name, candidate.module.weight)  # type: ignore[arg-type]
    return {name: candidate.module for name, candidate in layers.items()}


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


def prepared_layers(model: nn.Module) -> dict[str, nn.Module]:
    """Plan name -> prepared layer, in plan order."""
    layers = [module for module in model.modules() if isinstance(module, FakeQuantized)]
    return {layer.fake_quantizer.layer.name: layer for layer in layers}


def quantizers(model: nn.Module) -> dict[str, LayerQuantizer]:
    """Plan name -> quantizer of each prepared layer."""
    return {name: getattr(layer, ATTRIBUTE) for name, layer in prepared_layers(model).items()}


def is_prepared(model: nn.Module) -> bool:
    """Whether any layer of the model fake-quantizes (in whatever phase)."""
    return any(isinstance(module, FakeQuantized) for module in model.modules())


def unprepare(model: nn.Module) -> nn.Module:
    """Take fake quantization out again, in place: classes are the user's own, weights are untouched.

    Raises:
        PrepareError: when the model is not prepared.
    """
    for layer in _required(model).values():
        restore(layer)
    return model


def _required(model: nn.Module) -> dict[str, nn.Module]:
    layers = prepared_layers(model)
    if not layers:
        raise PrepareError(f"{type(model).__name__} is not prepared: call prepare(model, plan) first")
    return layers


def plan_of(model: nn.Module) -> Plan:
    """The plan a model was prepared with.

    Raises:
        PrepareError: when the model is not prepared.
    """
    plan: Plan = next(iter(_required(model).values())).fake_quantizer.plan  # type: ignore[union-attr, assignment]
    return plan


def set_phase(model: nn.Module, phase: Phase) -> None:
    """Move every prepared layer to a phase.

    Raises:
        PrepareError: when the model is not prepared.
    """
    for layer in _required(model).values():
        getattr(layer, ATTRIBUTE).enter(Phase(phase), layer._parameters["weight"])


def get_phase(model: nn.Module) -> Phase:
    """The phase the prepared layers are in.

    Raises:
        PrepareError: when the model is not prepared.
    """
    phase: Phase = getattr(next(iter(_required(model).values())), ATTRIBUTE).phase
    return phase


def quantizer_state(model: nn.Module) -> dict[str, Any]:
    """Phase, plan, scales and observers, as primitives and CPU tensors that ``torch.load(weights_only=True)`` reads.

    It belongs beside the model's (float) state_dict in a checkpoint.

    Raises:
        PrepareError: when the model is not prepared.
    """
    return {
        "version": STATE_VERSION,
        "phase": get_phase(model).value,
        "plan": plan_of(model).without_kernels().to_list(),
        "layers": {name: quantizer.export_state() for name, quantizer in quantizers(model).items()},
    }


def load_quantizer_state(model: nn.Module, state: Mapping[str, Any]) -> None:
    """Restore what :func:`quantizer_state` saved, into a model prepared with the same plan.

    Raises:
        PrepareError: when the model is not prepared.
        CheckpointError: when the state's version, layers or schemes differ; nothing is changed then.
    """
    mine = quantizers(model)
    if not mine:
        raise PrepareError(
            f"{type(model).__name__} is not prepared: call prepare(model, plan) before loading its state"
        )
    if state.get("version") != STATE_VERSION:
        raise CheckpointError(
            f"quantizer state of version {state.get('version')!r}; this package reads {STATE_VERSION}"
        )
    theirs = {entry["name"]: entry["scheme"] for entry in state["plan"] if entry["scheme"] is not None}
    here = {name: str(quantizer.scheme) for name, quantizer in mine.items()}
    for name in sorted(theirs.keys() | here.keys()):
        if theirs.get(name) != here.get(name):
            raise CheckpointError(
                f"the checkpoint's plan differs from this model's at {name}: "
                f"{theirs.get(name, 'not quantized')} there, "
                f"{here.get(name, 'not quantized')} here.{did_you_mean(name, theirs.keys() - {name})} Resume with the "
                "policy the checkpoint was made with"
            )
    phase, layers = Phase(state["phase"]), prepared_layers(model)
    for name, quantizer in mine.items():
        quantizer.import_state(dict(state["layers"].get(name, {})), phase, layers[name]._parameters["weight"].device)  # type: ignore[union-attr]


@contextmanager
def calibrating(model: nn.Module) -> Iterator[None]:
    """Let static schemes observe every forward pass inside, in eval mode too; layers compute in float meanwhile.

    Raises:
        PrepareError: when the model is not prepared.
    """
    before = get_phase(model)
    set_phase(model, Phase.OBSERVING)
    for quantizer in quantizers(model).values():
        quantizer.observe_always = True
    try:
        yield
    finally:
        for quantizer in quantizers(model).values():
            quantizer.observe_always = False
        set_phase(model, before)


@contextmanager
def capture_inputs(model: nn.Module) -> Iterator[dict[str, Tensor]]:
    """Collect a few rows of real input of each prepared layer from the forward passes inside.

    Yields:
        A dict that fills up: plan name -> [at most 64, in_features] (or token ids [at most 64] for an embedding),
        from the last pass, detached.
    """
    captured: dict[str, Tensor] = {}
    handles = [
        layer.register_forward_pre_hook(_keep_rows(name, captured), with_kwargs=True)
        for name, layer in prepared_layers(model).items()
    ]
    try:
        yield captured
    finally:
        for handle in handles:
            handle.remove()


def _keep_rows(name: str, captured: dict[str, Tensor]) -> Any:
    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        x = first_tensor(args, kwargs)
        if x is None or x.numel() == 0:
            return
        rows = x.detach().reshape(-1, x.shape[-1]) if x.is_floating_point() else x.detach().reshape(-1)
        captured[name] = rows[:: max(1, rows.shape[0] // _ROWS_KEPT)][:_ROWS_KEPT].clone()

    return hook
