"""``calibrate(model, plan, batches)``: post-training quantization of a model on the user's own data."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Final, Literal, get_args

from torch import nn

from qat_plugin.errors import ConfigError
from qat_plugin.measure.evaluating import evaluating, length_of
from qat_plugin.measure.progress import Progress, progressing
from qat_plugin.policy import Plan, PolicyLike
from qat_plugin.ptq.feeding import checked, feed
from qat_plugin.qat import Phase, calibrating, is_prepared, plan_of, prepare, set_phase
from qat_plugin.qat.folding import fold_norms

Method = Literal["rtn"]
METHODS: Final[tuple[str, ...]] = get_args(Method)


def calibrate(
    model: nn.Module,
    plan: Plan | PolicyLike | None,
    batches: Iterable[Any],
    *,
    method: str = "rtn",
    progress: Progress | bool = True,
) -> nn.Module:
    """Find the integers of a model without training it, in place; :func:`convert` then makes them real.

    Args:
        model: any module, float or prepared.
        plan: a Plan or a policy; ``None`` for a model that is prepared.
        batches: the user's own; see :func:`qat_plugin.ptq.feeding.feed` for their form. They are used in their order.
        method: how weights become integers.
        progress: a bar on stderr, nothing, or a callback(done, total).

    Returns:
        ``model``, prepared, its scales frozen.

    Raises:
        ConfigError: for an unknown method.
        DataError: for no batches, or batches that the model does not take.
    """
    if method not in METHODS:
        raise ConfigError(f"method={method!r} is not one of {', '.join(METHODS)}")
    if not is_prepared(model):
        prepare(model, plan)  # type: ignore[arg-type]
    fold_norms(model)
    static = any(layer.scheme is not None and layer.scheme.static for layer in plan_of(model).quantized)
    if static:
        with evaluating(model), calibrating(model), progressing(progress, "calibrating", length_of(batches)) as advance:
            for index, batch in enumerate(checked(batches)):
                feed(model, batch)
                advance(index + 1)
    set_phase(model, Phase.FROZEN)
    return model
