"""Latency of alternatives, taken in turn so that a busy moment of the machine hits all of them alike."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch

from qat_plugin.errors import ConfigError
from qat_plugin.measure.progress import Progress, progressing


@dataclass(frozen=True)
class Latency:
    """What the rounds of one alternative took.

    Attributes:
        p50: median, in seconds.
        p95: 95th percentile, in seconds (linear between neighbouring rounds).
        rounds: how many calls were timed; fewer than asked for when the time budget ended first.
    """

    p50: float
    p95: float
    rounds: int


def interleaved_latency(
    alternatives: Mapping[str, Callable[[], object]],
    *,
    rounds: int = 30,
    warmup: int = 3,
    budget_s: float | None = None,
    progress: Progress | bool = True,
) -> dict[str, Latency]:
    """Time each alternative ``rounds`` times in the order A B C A B C ..., after ``warmup`` untimed rounds.

    Interleaving makes the ratios robust: a neighbour that slows the machine for a second slows every alternative for
    that second. Each call is timed until its work is done, CUDA and MPS kernels included. Whether gradients are
    recorded is up to the callables; wrap inference in ``torch.no_grad()``.

    Args:
        alternatives: name -> call without arguments.
        rounds: timed calls of each alternative, at least 1.
        warmup: untimed calls of each before that (lazy compilation, packing, caches).
        budget_s: stop after the first timed round that ends later than this many seconds from the start. Every
            alternative is timed at least once and all of them equally often.
        progress: a bar on stderr once two seconds have passed, nothing, or a callback(done, total) in rounds.

    Raises:
        ConfigError: for no alternatives or numbers out of range.
    """
    if not alternatives:
        raise ConfigError("there is nothing to time: alternatives is empty; give at least one name -> callable")
    if rounds < 1 or warmup < 0:
        raise ConfigError(f"rounds={rounds}, warmup={warmup} is not allowed: at least 1 timed and 0 warm-up rounds")
    if budget_s is not None and not budget_s > 0:
        raise ConfigError(f"budget_s={budget_s} is not allowed: give a positive number of seconds, or None")

    deadline = math.inf if budget_s is None else time.perf_counter() + budget_s
    samples: dict[str, list[float]] = {name: [] for name in alternatives}
    with progressing(progress, "timing " + ", ".join(alternatives), warmup + rounds) as advance:
        for turn in range(warmup + rounds):
            for name, call in alternatives.items():
                seconds = _time_once(call)
                if turn >= warmup:
                    samples[name].append(seconds)
            advance(turn + 1)
            if turn >= warmup and time.perf_counter() >= deadline:
                break
    return {name: Latency(_quantile(taken, 0.5), _quantile(taken, 0.95), len(taken)) for name, taken in samples.items()}


def _time_once(call: Callable[[], object]) -> float:
    _wait_for_device()
    start = time.perf_counter()
    call()
    _wait_for_device()
    return time.perf_counter() - start


def _wait_for_device() -> None:
    """Wait until every accelerator that this process has used is idle; nothing to do on a CPU."""
    if torch.cuda.is_initialized():
        for index in range(torch.cuda.device_count()):
            torch.cuda.synchronize(index)
    elif torch.backends.mps.is_available():
        torch.mps.synchronize()


def _quantile(samples: Sequence[float], share: float) -> float:
    """Quantile with linear interpolation between the two nearest order statistics (numpy's default)."""
    ordered = sorted(samples)
    position = share * (len(ordered) - 1)
    below = math.floor(position)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (ordered[above] - ordered[below]) * (position - below)
