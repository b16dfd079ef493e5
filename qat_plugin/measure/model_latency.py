"""Latency of forward passes: several models on several workloads, in one interleaved run per workload."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import nn

from qat_plugin.measure.evaluating import device_of, evaluating
from qat_plugin.measure.latency import Latency, interleaved_latency
from qat_plugin.measure.progress import Progress

Inputs = torch.Tensor | Mapping[str, torch.Tensor]


def model_latency(
    models: Mapping[str, nn.Module],
    workloads: Mapping[str, Inputs],
    *,
    rounds: int = 30,
    warmup: int = 3,
    budget_s: float | None = None,
    progress: Progress | bool = True,
) -> dict[str, dict[str, Latency]]:
    """Time the forward pass of each model on each workload, the models interleaved.

    Models run in eval mode without gradients. Inputs are moved to each model's device beforehand, and floating-point
    ones are cast to its dtype, so neither is timed.

    Args:
        models: name -> model, for example "float", "bf16" and "converted".
        workloads: label -> one positional input, or keyword inputs; for example
            ``{"decode, batch 1": {"input_ids": ids[:1, :1]}, "prefill, 1 x 128": {"input_ids": ids[:1, :128]}}``.
        rounds, warmup, budget_s, progress: as for ``interleaved_latency``; the budget is for each workload.

    Returns:
        label -> name -> Latency.
    """
    with evaluating(*models.values()):
        return {
            label: interleaved_latency(
                {name: _forward(model, inputs) for name, model in models.items()},
                rounds=rounds,
                warmup=warmup,
                budget_s=budget_s,
                progress=progress,
            )
            for label, inputs in workloads.items()
        }


def _forward(model: nn.Module, inputs: Inputs) -> Callable[[], object]:
    device, dtype = device_of(model), _compute_dtype(model)

    def fit(tensor: torch.Tensor) -> torch.Tensor:
        return tensor.to(device, dtype) if tensor.is_floating_point() else tensor.to(device)

    if isinstance(inputs, torch.Tensor):
        positional = fit(inputs)
        return lambda: model(positional)
    keywords = {name: fit(tensor) for name, tensor in inputs.items()}
    return lambda: model(**keywords)


def _compute_dtype(model: nn.Module) -> torch.dtype:
    return next((tensor.dtype for tensor in model.parameters() if tensor.is_floating_point()), torch.float32)
