"""``calibrate(model, plan, batches)``: post-training quantization of a model on the user's own data."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn

from qat_plugin.errors import DataError
from qat_plugin.measure.evaluating import evaluating
from qat_plugin.measure.progress import QUIET_S, Progress, is_rank_zero, progressing
from qat_plugin.policy import Plan, PolicyLike
from qat_plugin.ptq.feeding import feed
from qat_plugin.ptq.gptq import GptqOptions
from qat_plugin.ptq.methods import method_named
from qat_plugin.ptq.results import Calibration, remember
from qat_plugin.ptq.resume import open_store
from qat_plugin.ptq.walker import Part, Walker
from qat_plugin.qat import Phase, calibrating, is_prepared, plan_of, prepare, set_phase


def calibrate(
    model: nn.Module,
    plan: Plan | PolicyLike | None,
    batches: Iterable[Any],
    *,
    method: str = "rtn",
    gptq: GptqOptions | None = None,
    resume: str | os.PathLike[str] | None = None,
    offload: torch.device | str | None = None,
    progress: Progress | bool = True,
) -> nn.Module:
    """Find the integers of a model without training it, in place; :func:`convert` then makes them real.

    Layers are taken in the order they run, each on what the quantized ones before it give. Weights become the numbers
    that their integers stand for, with their scales fixed; a model prepared with learned scales starts from them.

    Args:
        model: any module, float or prepared.
        plan: a Plan or a policy; ``None`` for a model that is prepared.
        batches: the user's own; see :func:`qat_plugin.ptq.feeding.feed` for their form. They are used in their order.
        method: how weights become integers, one of :data:`qat_plugin.ptq.METHODS`.
        gptq: GPTQ's options.
        resume: a folder for finished blocks: a run that was killed goes on after the last of them, to the same
            integers. It belongs to one model, data and settings, and is refused for others.
        offload: a device (``"cpu"``) on which the hidden states between blocks wait.
        progress: lines on stderr for work that takes time, nothing, or a callback(done, total) in blocks.

    Returns:
        ``model``, prepared, its scales frozen. :func:`qat_plugin.ptq.calibration_of` tells what was done.

    Raises:
        ConfigError: for an unknown method.
        DataError: for no batches, batches that the model does not take, NaN or infinite activations.
        CheckpointError: when ``resume`` belongs to something else or is damaged.

    Example::

        calibrate(model, "w4a16-g32-asym", loader, method="gptq")
        convert(model)
    """
    chosen, options = method_named(method), gptq or GptqOptions()
    data = list(batches)
    if not data:
        raise DataError("there is no calibration data: the batches are empty; give at least one")
    if not is_prepared(model):
        prepare(model, plan)  # type: ignore[arg-type]
    set_phase(model, Phase.FLOAT)
    with evaluating(model):
        store = open_store(resume, model, data, {"method": method, "gptq": options, "plan": plan_of(model)})
        if not chosen.looks:
            _observe(model, data, progress)
        told = _teller(method, progress)
        keep_on = None if offload is None else torch.device(offload)
        results = Walker(model, data, chosen, options, store, told, keep_on).walk()
    set_phase(model, Phase.FROZEN)
    remember(model, Calibration(method, results))
    return model


def _observe(model: nn.Module, batches: list[Any], progress: Progress | bool) -> None:
    """One pass of the float model, in which all static schemes watch."""
    if not any(layer.scheme is not None and layer.scheme.static for layer in plan_of(model).quantized):
        return
    with calibrating(model), progressing(progress, "calibrating", len(batches)) as advance:
        for index, batch in enumerate(batches):
            feed(model, batch)
            advance(index + 1)


def _teller(method: str, progress: Progress | bool) -> Callable[[Part], None]:
    """What is told after each block: a line on stderr with the time that is left, or the user's own callback."""
    if callable(progress):
        return lambda part: progress(part.index + 1, part.count)
    if not progress or not is_rank_zero():
        return lambda part: None
    started = time.monotonic()
    spent: list[float] = []

    def tell(part: Part) -> None:
        if not part.resumed:
            spent.append(part.seconds)
        if time.monotonic() - started < QUIET_S:
            return
        left = (sum(spent) / len(spent)) * (part.count - part.index - 1) if spent else 0.0
        done = Calibration(method, part.layers).summary().partition("; ")[2] or f"{len(part.layers)} layers"
        how = "read from an earlier session" if part.resumed else f"{part.seconds:.1f} s"
        print(
            f"{method}: {part.name} ({part.index + 1}/{part.count}): {done}; {how}, about {left:.0f} s left",
            file=sys.stderr, flush=True,
        )  # fmt: skip

    return tell
