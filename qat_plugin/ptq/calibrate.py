"""``calibrate(model, plan, batches)``: post-training quantization of a model on the user's own data."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Final, Literal, get_args

from torch import nn

from qat_plugin.errors import ConfigError, DataError
from qat_plugin.measure.evaluating import evaluating, length_of
from qat_plugin.measure.progress import Progress, progressing
from qat_plugin.observers.spelling import DEFAULT_FOR_CALIBRATION
from qat_plugin.policy import Plan, PolicyLike
from qat_plugin.ptq.feeding import checked, feed
from qat_plugin.qat import (
    Phase,
    calibrating,
    check_observed,
    is_prepared,
    observe_with,
    observing,
    prepare,
    set_phase,
    synchronize_observers,
    unprepare,
)

Method = Literal["rtn"]
METHODS: Final[tuple[str, ...]] = get_args(Method)


def calibrate(
    model: nn.Module,
    plan: Plan | PolicyLike | None,
    batches: Iterable[Any],
    *,
    method: str = "rtn",
    observer: str | None = None,
    progress: Progress | bool = True,
) -> nn.Module:
    """Find the integers of a model without training it, in place; :func:`convert` then makes them real.

    Args:
        model: any module, float or prepared.
        plan: a Plan or a policy; ``None`` for a model that is prepared.
        batches: the user's own; see :func:`qat_plugin.ptq.feeding.feed` for their form. They are used in their order.
        method: how weights become integers.
        observer: what static activation scales are calibrated with: ``minmax``, ``moving-average`` (``:momentum``),
            ``percentile`` (``:99.99``), ``mse`` or ``entropy``. By default a float model takes
            :data:`~qat_plugin.observers.spelling.DEFAULT_FOR_CALIBRATION`, and a prepared one goes on with its own;
            given, a prepared model begins anew.
        progress: a bar on stderr, nothing, or a callback(done, total).

    Returns:
        ``model``, prepared, its scales frozen.

    Raises:
        ConfigError: for an unknown method or observer.
        DataError: for no batches, batches that the model does not take, or activations that are not finite; it says in
            which batch. A model that was float is float again then.
        PrepareError: for layers with a static scheme that no batch reached; it names all of them.
    """
    if method not in METHODS:
        raise ConfigError(f"method={method!r} is not one of {', '.join(METHODS)}")
    fresh = not is_prepared(model)
    if fresh:
        prepare(model, plan, observer=observer or DEFAULT_FOR_CALIBRATION)  # type: ignore[arg-type]
    elif observer is not None:
        observe_with(model, observer)
    try:
        if observing(model):
            _observe(model, batches, progress)
    except BaseException:
        if fresh:
            unprepare(model)
        raise
    set_phase(model, Phase.FROZEN)
    return model


def _observe(model: nn.Module, batches: Iterable[Any], progress: Progress | bool) -> None:
    """Calibrate the activations of static schemes, on all ranks alike."""
    with evaluating(model), calibrating(model), progressing(progress, "calibrating", length_of(batches)) as advance:
        for index, batch in enumerate(checked(batches)):
            try:
                feed(model, batch)
            except DataError as error:
                raise DataError(f"calibration batch {index}: {error}") from error
            advance(index + 1)
    synchronize_observers(model)
    check_observed(model)
