"""Looking at a model without leaving a trace: modes, gradients and random numbers are as they were afterwards."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from itertools import chain

import torch
from torch import nn


@contextmanager
def evaluating(*models: nn.Module) -> Iterator[None]:
    """Put the models in eval mode without gradients; on exit each submodule is in the mode it was in.

    Gradients are off by ``torch.no_grad`` and not ``inference_mode``: what a forward pass caches in a module (rotary
    frequencies, packed weights) would be an inference tensor there, and training afterwards would fail on it. The
    state of the CPU's random number generator is restored too: iterating over a DataLoader draws from it, and a
    measurement in the midst of a run must not change the run.
    """
    with ExitStack() as stack:
        stack.enter_context(torch.no_grad())
        stack.enter_context(torch.random.fork_rng(devices=[]))
        for model in models:
            stack.enter_context(_eval_mode(model))
        yield


@contextmanager
def _eval_mode(model: nn.Module) -> Iterator[None]:
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        model.train(modes[model])
        for module, training in modes.items():
            module.training = training


def device_of(model: nn.Module) -> torch.device:
    """Device of the first parameter or buffer, where the model takes its input; the CPU for a model with neither."""
    tensor = next(chain(model.parameters(), model.buffers()), None)
    return torch.device("cpu") if tensor is None else tensor.device


def length_of(batches: Iterable[object]) -> int | None:
    """Number of batches, or ``None`` for a stream that does not know."""
    try:
        return len(batches)  # type: ignore[arg-type]
    except TypeError:  # no __len__, or a DataLoader over a dataset that has none
        return None
