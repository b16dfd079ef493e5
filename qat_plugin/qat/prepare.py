"""``prepare(model, plan)``: fake quantization in place, the phases, and the way back."""

from __future__ import annotations

from torch import nn

from qat_plugin.errors import ConfigError, PrepareError
from qat_plugin.observers.spelling import DEFAULT_FOR_TRAINING, ObserverSpec
from qat_plugin.policy import Plan, Policy, PolicyLike
from qat_plugin.qat.checks import check_materialised, check_untouched, planned_layers
from qat_plugin.qat.folded import folds, unmark
from qat_plugin.qat.folding import fold_norms
from qat_plugin.qat.initial import Initial, check_initial
from qat_plugin.qat.layers import (
    ATTRIBUTE,
    FakeQuantized,
    check_restorable,
    current_weight,
    extend,
    restore,
    transposed,
)
from qat_plugin.qat.quantizer import LayerQuantizer, Phase


def prepare(
    model: nn.Module,
    plan: Plan | PolicyLike,
    *,
    learn_scales: bool = False,
    learn_zero_points: bool = False,
    initial: Initial = "minmax",
    phase: Phase = Phase.FAKE_QUANTIZED,
    observer: str | ObserverSpec = DEFAULT_FOR_TRAINING,
) -> nn.Module:
    """Insert fake quantization into a model, in place.

    Parameter objects, names, dtypes, hooks, ties and train/eval mode survive; ``state_dict()`` stays the float model's.
    Call it before the optimizer is built, and before sharding or DDP wraps the model. A BatchNorm behind a layer of a
    static scheme is folded into it when fake quantization begins (:func:`set_phase`), which is now unless ``phase`` is
    an earlier one; prepare a network that is to be trained from scratch in ``Phase.OBSERVING``.

    Args:
        model: any module; its layers are extended in place.
        plan: a Plan for this model, or whatever :class:`~qat_plugin.policy.Policy` takes.
        learn_scales: learn the scales (LSQ, arXiv:1902.08153): Parameters of ``model``, relative to where they begin,
            so that the weights' learning rate suits them. :func:`~qat_plugin.qat.grid_parameters` tells them from the
            others, for a rate of their own; they should have no weight decay.
        learn_zero_points: with them, learn the zero points of asymmetric schemes (LSQ+, arXiv:2004.09576). A zero point
            jumps by whole integers: on a small Llama, where it was measured, that cost quality at 3 and 2 bits.
        initial: where learned scales begin: ``"minmax"``, the weights' range, or ``"mse"``, the grid with the least
            squared error, which matters below 4 bits.
        phase: the phase to start in.
        observer: what static schemes calibrate their activations with: ``minmax``, ``moving-average`` (``:momentum``),
            ``percentile`` (``:99.99``), ``mse`` or ``entropy``.

    Returns:
        ``model``.

    Raises:
        ConfigError: for another ``initial``, or one without ``learn_scales``.
        PrepareError: when the model is already prepared or converted, when the plan is another model's or changes
            nothing, when a weight holds NaN or infinity, when the plan holds a scheme that cannot be trained.
        PolicyError: when a policy does not fit the model.
        ConfigError: for an unknown observer.

    Example::

        prepare(model, Policy({"attention": "w8a8", "ffn": "w4a16-g32"}))
        ...  # train as ever
        convert(model)
    """
    phase, observer = as_phase(phase), ObserverSpec.parse(observer)
    check_initial(initial)
    if (initial != "minmax" or learn_zero_points) and not learn_scales:
        raise ConfigError(f"initial={initial!r} and learn_zero_points are of learned scales: add learn_scales=True")
    check_untouched(model)
    if not isinstance(plan, Plan):
        plan = Policy.coerce(plan).plan(model)
    layers = planned_layers(model, plan)
    if learn_scales or phase is Phase.FROZEN:
        check_materialised(plan, layers)
    quantizers: dict[str, LayerQuantizer] = {}
    for entry in plan.quantized:
        module = layers[entry.name]
        quantizers[entry.name] = LayerQuantizer(
            entry, plan, module.weight,  # type: ignore[arg-type]
            transposed=transposed(module), learn_scales=learn_scales, learn_zero_points=learn_zero_points,
            initial=initial, share=quantizers.get(entry.tied_to or ""), observer=observer,
        )  # fmt: skip
    for name, quantizer in quantizers.items():
        weight = layers[name].weight
        quantizer.to(weight.device)  # type: ignore[arg-type]
        extend(layers[name], quantizer)
    set_phase(model, phase)
    return model


def as_phase(phase: Phase | str) -> Phase:
    """A phase from itself or its value.

    Raises:
        PrepareError: listing the phases.
    """
    try:
        return Phase(phase)
    except ValueError as error:
        raise PrepareError(f"phase {phase!r} is not one of {', '.join(repr(p.value) for p in Phase)}") from error


def prepared_layers(model: nn.Module) -> dict[str, nn.Module]:
    """Plan name -> prepared layer, in module order.

    Raises:
        PrepareError: when two have one name, as in a model that holds a deep copy of a prepared part of itself.
    """
    layers: dict[str, nn.Module] = {}
    for module in _fake_quantized(model):
        name = getattr(module, ATTRIBUTE).layer.name
        if name in layers:
            raise PrepareError(
                f"{type(model).__name__} holds two prepared layers called {name}, one perhaps in a copy of the other's "
                "model: call unprepare() on the copy, or treat each part by itself"
            )
        layers[name] = module
    return layers


def _fake_quantized(model: nn.Module) -> list[nn.Module]:
    return [module for module in model.modules() if isinstance(module, FakeQuantized)]


def quantizers(model: nn.Module) -> dict[str, LayerQuantizer]:
    """Plan name -> quantizer of each prepared layer."""
    return {name: getattr(layer, ATTRIBUTE) for name, layer in prepared_layers(model).items()}


def grid_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Name -> Parameter of the learned scales and zero points of a model; empty where none are learned."""
    return {name: parameter for name, parameter in model.named_parameters() if f".{ATTRIBUTE}." in f".{name}"}


def begin_scales(model: nn.Module) -> None:
    """Let learned scales begin from the weights as they are now, which may have been trained in float meanwhile.

    Raises:
        PrepareError: when the model is not prepared.
    """
    for layer in required_layers(model).values():
        getattr(layer, ATTRIBUTE).begin(current_weight(layer))


def is_prepared(model: nn.Module) -> bool:
    """Whether any layer of the model fake-quantizes (in whatever phase)."""
    return any(isinstance(module, FakeQuantized) for module in model.modules())


def unprepare(model: nn.Module) -> nn.Module:
    """Take fake quantization out again, in place: classes are the user's own, weights are untouched.

    A BatchNorm that was folded stays folded in its numbers, and computes the same in evaluation mode.

    Raises:
        ConfigError: for another ``initial``, or one without ``learn_scales``.
        PrepareError: when the model is not prepared, or a layer was parametrized since; nothing is changed then.
    """
    layers = _fake_quantized(model)
    if not layers:
        raise _not_prepared(model)
    for layer in layers:
        check_restorable(layer)
    for fold in folds(model):
        unmark(fold)
    for layer in layers:
        restore(layer)
    return model


def _not_prepared(model: nn.Module) -> PrepareError:
    return PrepareError(f"{type(model).__name__} is not prepared: call prepare(model, plan) first")


def required_layers(model: nn.Module) -> dict[str, nn.Module]:
    """As :func:`prepared_layers`, and there must be one.

    Raises:
        ConfigError: for another ``initial``, or one without ``learn_scales``.
        PrepareError: when the model is not prepared.
    """
    layers = prepared_layers(model)
    if not layers:
        raise _not_prepared(model)
    return layers


def plan_of(model: nn.Module) -> Plan:
    """The plan a model was prepared with.

    Raises:
        ConfigError: for another ``initial``, or one without ``learn_scales``.
        PrepareError: when the model is not prepared.
    """
    plan: Plan = next(iter(required_layers(model).values())).fake_quantizer.plan  # type: ignore[union-attr, assignment]
    return plan


def set_phase(model: nn.Module, phase: Phase) -> None:
    """Move every prepared layer to a phase.

    Where fake quantization begins, each BatchNorm behind a layer of a static scheme is folded into it (see
    :mod:`qat_plugin.qat.folding`), which changes weights and statistics and not what the model computes in evaluation.

    Raises:
        ConfigError: for another ``initial``, or one without ``learn_scales``.
        PrepareError: when the model is not prepared.
    """
    _enter(model, list(required_layers(model).values()), as_phase(phase))


def fake_quantize_all(model: nn.Module) -> None:
    """Let the layers that compute in float fake-quantize; those that do so already, held ones among them, stay.

    Raises:
        PrepareError: as :func:`set_phase`.
    """
    waiting = [layer for layer in required_layers(model).values() if not getattr(layer, ATTRIBUTE).active]
    if waiting:
        _enter(model, waiting, Phase.FAKE_QUANTIZED)


def _enter(model: nn.Module, layers: list[nn.Module], phase: Phase) -> None:
    """Move layers to a phase, folding norms where fake quantization begins: before scales are fixed, after releases."""
    if phase is Phase.FROZEN:
        fold_norms(model)
    for layer in layers:
        getattr(layer, ATTRIBUTE).enter(phase, current_weight(layer))
    if phase is Phase.FAKE_QUANTIZED:
        fold_norms(model)


def get_phase(model: nn.Module) -> Phase:
    """The phase of the prepared layers; the earliest, where some are ahead (:func:`~qat_plugin.qat.hold`).

    Raises:
        ConfigError: for another ``initial``, or one without ``learn_scales``.
        PrepareError: when the model is not prepared.
    """
    order = list(Phase)
    phases: list[Phase] = [getattr(layer, ATTRIBUTE).phase for layer in required_layers(model).values()]
    return min(phases, key=order.index)
