"""The float model that a file stands for: every weight dequantized, or rounded as the file rounds it."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from qat_plugin.errors import ExportError
from qat_plugin.exporting.contents import Exportable
from qat_plugin.exporting.gguf.layout import DTYPES, Entry, state
from qat_plugin.kernels.weight import QuantizedWeight
from qat_plugin.qlora.architecture import empty_from_config


def float_copy(model: Exportable, entries: Sequence[Entry]) -> nn.Module:
    """The model in float32 with the numbers of the file, computing weight-only: activations are never rounded.

    Args:
        model: converted.
        entries: of the file; where they hold a float tensor in a narrower type, the copy has its rounded numbers.
    """
    config: Any = copy.deepcopy(model.config)
    config.tie_word_embeddings = any(name.startswith("lm_head") for name in model.ties)
    kinds = {entry.source: entry.kind for entry in entries}
    tensors = {name: _numbers(tensor, kinds.get(name, "F32")) for name, tensor in state(model).items()}
    ties = {name: tensors[leader] for name, leader in model.ties.items()}
    network = empty_from_config(config, torch.float32)
    network.load_state_dict({**tensors, **ties}, assign=True)
    network.tie_weights()  # assigned to each name, they are parameters of their own
    copied: nn.Module = network.eval()
    return copied


def check_described(model: Exportable) -> None:
    """Raise unless the configuration, which the file's keys are of, describes the network.

    Raises:
        ExportError: for layers that were removed or added, or matrices of another size, without a word in it.
    """
    kept = model.network.state_dict(keep_vars=True)
    own = {name: tuple(tensor.shape) for name, tensor in kept.items()}
    described = {
        name: tuple(tensor.shape)
        for name, tensor in empty_from_config(copy.deepcopy(model.config), torch.float32).state_dict().items()
    }
    other = sorted(name for name in own.keys() | described.keys() if own.get(name) != described.get(name))
    if other:
        shown = ", ".join(
            f"{name} ({_shape(own.get(name))}, by the configuration {_shape(described.get(name))})"
            for name in other[:3]
        )
        raise ExportError(
            f"the model is not what its configuration describes: {shown}"
            + (f" and {len(other) - 3} more" if len(other) > 3 else "")
            + ". Runtimes build it from that: make model.config say what the model is (vocab_size, num_hidden_layers)"
        )


def _shape(shape: tuple[int, ...] | None) -> str:
    return "not there" if shape is None else str(list(shape))


def _numbers(tensor: Tensor, kind: str) -> Tensor:
    if isinstance(tensor, QuantizedWeight):
        return tensor.dequantize(torch.float32).cpu()
    narrow = tensor.dim() > 1 and kind in DTYPES
    return (tensor.to(DTYPES[kind]) if narrow else tensor).to("cpu", torch.float32)
