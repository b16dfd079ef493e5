"""A model in bf16 as it would be deployed."""

from __future__ import annotations

import torch
from torch import nn


def in_bf16(network: nn.Module) -> nn.Module:
    """Cast a network's parameters and saved buffers to bf16, in place; integers stay the integers they are.

    Buffers that are not saved stay as they are: they are computed ones, such as rotary frequencies, which lose their
    meaning in eight bits of mantissa; transformers leaves them in float32 too.
    """
    cast: dict[int, nn.Parameter] = {}  # tied parameters stay one
    originals = list(network.parameters())  # keeps their ids unique meanwhile
    for module in network.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None and parameter.is_floating_point():
                if id(parameter) not in cast:
                    cast[id(parameter)] = nn.Parameter(parameter.detach().to(torch.bfloat16), requires_grad=False)
                module._parameters[name] = cast[id(parameter)]
        for name, buffer in module._buffers.items():
            if buffer is not None and buffer.is_floating_point() and name not in module._non_persistent_buffers_set:
                module._buffers[name] = buffer.to(torch.bfloat16)
    del originals
    return network
