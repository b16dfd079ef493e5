"""Outputs of a runtime that computes in float32, whatever type the model runs in: ONNX Runtime's and ExecuTorch's."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor, nn

from qat_plugin.exporting.agreement import Agreement, agreement, worst
from qat_plugin.exporting.contents import Exportable, outputs_of
from qat_plugin.exporting.counterpart import distance_note

Sample = Mapping[str, Tensor] | tuple[Tensor, ...]


def compared_in_float32(
    model: Exportable, runs: Iterable[tuple[Tensor, Sample]], arithmetic: AbstractContextManager[object] | None = None
) -> tuple[Agreement, tuple[str, ...]]:
    """Outputs of a file against the model's integers in float32.

    Args:
        model: what was written.
        runs: what the runtime gave, and the inputs of that call as the model takes them.
        arithmetic: active while the model runs; may be entered several times.

    Returns:
        The worst agreement, and a note where the model itself computes something else.

    Raises:
        ExportError: when shapes differ.
    """
    network = _in_float32(model.network)
    with arithmetic or nullcontext():
        agreed = [_compared(network, found, _widened(sample)) for found, sample in runs]
        ours = outputs_of(network, _widened(model.sample))
    if network is model.network:
        return worst(agreed), ()
    return worst(agreed), distance_note("the file computes in float32", ours, model.outputs())


def _compared(network: nn.Module, found: Tensor, sample: Sample) -> Agreement:
    return agreement(network, found, lambda: outputs_of(network, sample))


def widened(value: Tensor) -> Tensor:
    """An input as the file takes it: on the CPU, its float numbers float32 whatever the model's are."""
    return value.detach().float().cpu() if value.is_floating_point() else value.detach().cpu()


def _widened(sample: Sample) -> Sample:
    if isinstance(sample, tuple):
        return tuple(widened(value) for value in sample)
    return {name: widened(value) for name, value in sample.items()}


def _in_float32(network: nn.Module) -> nn.Module:
    """The network itself, or a copy where it runs in a narrower type; its integers are the same."""
    if all(tensor.dtype == torch.float32 for tensor in network.parameters() if tensor.is_floating_point()):
        return network
    return copy.deepcopy(network).float()
