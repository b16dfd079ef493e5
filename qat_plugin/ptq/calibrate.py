"""``calibrate(model, plan, batches)``: post-training quantization of a model on the user's own data."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterable
from contextlib import nullcontext
from typing import Any

import torch
from torch import nn

from qat_plugin.errors import DataError
from qat_plugin.measure.evaluating import evaluating
from qat_plugin.measure.progress import Progress, progressing
from qat_plugin.observers.spelling import DEFAULT_FOR_CALIBRATION
from qat_plugin.policy import Plan, PolicyLike
from qat_plugin.ptq.feeding import feed, without_caches
from qat_plugin.ptq.gptq import GptqOptions
from qat_plugin.ptq.methods import method_named
from qat_plugin.ptq.ranks import check_same, failing_together
from qat_plugin.ptq.results import Calibration, remember
from qat_plugin.ptq.resume import open_store
from qat_plugin.ptq.telling import teller
from qat_plugin.ptq.walker import Walker
from qat_plugin.qat import (
    Phase,
    calibrating,
    check_observed,
    is_prepared,
    observe_with,
    observing,
    plan_of,
    prepare,
    quantizers,
    set_phase,
    synchronize_observers,
    unprepare,
)
from qat_plugin.qat.folding import Unfolded, fold_norms
from qat_plugin.qat.layers import ATTRIBUTE, current_weight


def calibrate(
    model: nn.Module,
    plan: Plan | PolicyLike | None,
    batches: Iterable[Any],
    *,
    method: str = "rtn",
    observer: str | None = None,
    gptq: GptqOptions | None = None,
    resume: str | os.PathLike[str] | None = None,
    offload: torch.device | str | None = None,
    progress: Progress | bool = True,
) -> nn.Module:
    """Find the integers of a model without training it, in place; :func:`convert` then makes them real.

    Under ``torch.distributed`` each rank calls it with batches of its own (their numbers may differ), and all end with
    the same integers; only ``"rtn"`` without static schemes, which looks at no data, asks nothing of other ranks.

    Layers are taken in the order they run, each on what the quantized ones before it give. Weights become the numbers
    that their integers stand for, with their scales fixed; a model prepared with learned scales starts from them.

    Args:
        model: any module, float or prepared.
        plan: a Plan or a policy; ``None`` for a model that is prepared.
        batches: the user's own; see :func:`qat_plugin.ptq.feeding.feed` for their form. They are used in their order.
        method: how weights become integers, one of :data:`qat_plugin.ptq.METHODS`.
        observer: what static activation scales are calibrated with: ``minmax``, ``moving-average`` (``:momentum``),
            ``percentile`` (``:99.99``), ``mse`` or ``entropy``. By default a float model takes
            :data:`~qat_plugin.observers.spelling.DEFAULT_FOR_CALIBRATION`, and a prepared one goes on with its own;
            given, a prepared model begins anew.
        gptq: GPTQ's options.
        resume: a folder for finished blocks: a run that was killed goes on after the last of them, to the same
            integers. It belongs to one model, data and settings, and is refused for others.
        offload: a device (``"cpu"``) on which the hidden states between blocks wait.
        progress: a line on stderr for each layer of work that takes time, nothing, or a callback(done, total) in
            blocks.

    Returns:
        ``model``, prepared, its scales frozen. :func:`qat_plugin.ptq.calibration_of` tells what was done.

    Raises:
        ConfigError: for an unknown method or observer.
        DataError: for no batches where the method or a static scheme needs some, batches that the model does not take,
            or activations that are not finite; it says in which batch. A model that was float is float again then; if
            some of its weights are quantized already, a warning says so.
        PrepareError: for layers with a static scheme that no batch reached; it names all of them.
        CheckpointError: when ``resume`` belongs to something else or is damaged.

    Example::

        calibrate(model, "w4a16-g32-asym", loader, method="gptq")
        convert(model)
    """
    chosen, options = method_named(method), gptq or GptqOptions()
    data = list(batches)
    fresh = not is_prepared(model)
    unfolded = Unfolded(model) if fresh else None
    if fresh:
        prepare(model, plan, observer=observer or DEFAULT_FOR_CALIBRATION)  # type: ignore[arg-type]
    elif observer is not None:
        observe_with(model, observer)
    before = [] if fresh else [(q, q.phase, q.frozen_scale, q.frozen_zero_point) for q in quantizers(model).values()]
    folded: list[nn.Module] = []
    settings = {"method": method, "gptq": options, "observer": observer, "plan": plan_of(model).without_kernels()}
    walker = Walker(model, data, chosen, options, None if offload is None else torch.device(offload))
    together = failing_together if chosen.looks or observing(model) else nullcontext
    try:
        with together():
            if not data and (chosen.looks or observing(model)):
                raise DataError("there is no calibration data: the batches are empty; give at least one")
        set_phase(model, Phase.FLOAT)  # releases the scales of weights that folding changes
        folded = [fold.layer for fold in fold_norms(model)]
        with evaluating(model), without_caches(model):
            with together():
                walker.store = open_store(resume, model, data, settings)
            walker.told = teller(method, progress)
            if observing(model) and not chosen.looks:
                _observe(model, data, progress)
            results = walker.walk()
        check_observed(model)
        if chosen.looks or observing(model):
            check_same(model)
    except BaseException:
        if walker.touched:
            warnings.warn(f"{type(model).__name__} is partly quantized: load its weights anew", stacklevel=2)
        if fresh:
            unprepare(model)
        if unfolded is not None and not walker.touched:
            unfolded.restore()
        for quantizer, phase, scale, zero_point in before:
            quantizer.phase, quantizer.frozen_scale, quantizer.frozen_zero_point = phase, scale, zero_point
        for layer in () if fresh else folded:  # scales are those of its new weight
            quantizer = getattr(layer, ATTRIBUTE)
            quantizer.frozen_scale = quantizer.frozen_zero_point = None
            quantizer.enter(quantizer.phase, current_weight(layer))
        raise
    set_phase(model, Phase.FROZEN)
    remember(model, Calibration(method, results))
    return model


def _observe(model: nn.Module, batches: list[Any], progress: Progress | bool) -> None:
    """Calibrate the activations of static schemes in the float model, on all ranks alike."""
    bar = progressing(progress, "calibrating", len(batches))
    with failing_together(), calibrating(model), bar as advance:
        for index, batch in enumerate(batches):
            try:
                feed(model, batch)
            except DataError as error:
                raise DataError(f"calibration batch {index}: {error}") from error
            advance(index + 1)
    synchronize_observers(model)
    check_observed(model)
