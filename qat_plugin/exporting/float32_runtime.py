"""Outputs of a runtime that computes in float32, whatever type the model runs in: ONNX Runtime's and ExecuTorch's."""

from __future__ import annotations

import copy
from collections.abc import Collection, Iterable, Mapping

import torch
from torch import Tensor, nn

from qat_plugin.exporting.agreement import Agreement, agreement, worst
from qat_plugin.exporting.contents import Exportable, outputs_of
from qat_plugin.exporting.counterpart import Arithmetic, distance_note
from qat_plugin.kernels.weight import QuantizedWeight

Sample = Mapping[str, Tensor] | tuple[Tensor, ...]


def compared_in_float32(
    model: Exportable, runs: Iterable[tuple[Tensor, Sample]], integer_biases: Collection[str] = ()
) -> tuple[Agreement, tuple[str, ...]]:
    """Outputs of a file against the model's integers in float32.

    Args:
        model: what was written.
        runs: what the runtime gave, and the inputs of that call as the model takes them.
        integer_biases: names of weights whose layer adds its bias as INT32, in units of the integer products.

    Returns:
        The worst agreement, and a note where the model itself computes something else.

    Raises:
        ExportError: when shapes differ.
    """
    network = _in_float32(model.network)
    rounded = [network.get_parameter(name) for name in integer_biases]

    def change(x: Tensor, weight: QuantizedWeight, bias: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
        if bias is None or not any(weight is held for held in rounded):
            return x, weight, bias
        unit = bias_unit(weight).to(bias.device)
        return x, weight, (integer_bias(bias, unit) * unit).to(bias.dtype)

    with Arithmetic(change):
        agreed = [_compared(network, found, _widened(sample)) for found, sample in runs]
        ours = outputs_of(network, _widened(model.sample))
    told = [] if network is model.network else ["the file computes in float32"]
    told += ["biases between layers that hand on INT8 are INT32"] if rounded else []
    return worst(agreed), distance_note(" and ".join(told), ours, model.outputs()) if told else ()


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


def bias_unit(weight: QuantizedWeight) -> Tensor:
    """What one step of the integer products is worth, float32 [out]."""
    assert weight.activation_scale is not None
    scale = weight.integers().scale.cpu().reshape(-1).expand(weight.out_features)
    return weight.activation_scale.cpu().float().reshape(1) * scale


def integer_bias(bias: Tensor, unit: Tensor) -> Tensor:
    """A bias [out] in those units, float64 integers that INT32 holds."""
    limit = torch.iinfo(torch.int32)
    return torch.round(bias.double().cpu() / unit.double()).clamp(limit.min, limit.max)
