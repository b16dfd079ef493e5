"""The converted network once more, in layers that can be lowered: the same modules and float tensors, other layers."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qat_plugin.errors import ExportError
from qat_plugin.exporting.contents import Exportable
from qat_plugin.exporting.executorch.convolution import LoweredConv
from qat_plugin.exporting.executorch.layers import LoweredLinear
from qat_plugin.exporting.executorch.options import Options
from qat_plugin.exporting.executorch.rounding import Rounding
from qat_plugin.kernels.weight import CastWeight, QuantizedWeight
from qat_plugin.qat.folded import FOLD

STATIC = Rounding(chained=True, fed=True)
"""What finds the chains: each static layer by XNNPACK's static operators."""
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_forward_hooks_with_kwargs", "_forward_pre_hooks_with_kwargs")


PREFIX = "network."
"""Of the names of a :class:`Call`."""


class NarrowEmbedding(nn.Module):
    """A float embedding stored in a narrower float type."""

    weight: Tensor

    def __init__(self, weight: Tensor, padding_idx: int | None) -> None:
        super().__init__()
        self.register_buffer("weight", weight)
        self.padding_idx = padding_idx

    def forward(self, ids: Tensor) -> Tensor:
        """float32 [..., features]."""
        return F.embedding(ids, self.weight, self.padding_idx).float()


class Call(nn.Module):
    """The network with positional arguments and one tensor as its output."""

    def __init__(self, network: nn.Module, names: tuple[str, ...] | None) -> None:
        super().__init__()
        self.network, self.names = network, names

    def forward(self, *given: Tensor) -> Tensor:
        """The logits, or the first output."""
        if self.names is None:
            out = self.network(*given)
        else:
            rest: dict[str, Any] = {"use_cache": False} if self.names == ("input_ids",) else {}
            out = self.network(**dict(zip(self.names, given, strict=True)), **rest)
        out = getattr(out, "logits", out)
        first: Tensor = out[0] if isinstance(out, (tuple, list)) else out
        return first


def skeleton(model: Exportable, roundings: Mapping[str, Rounding] | None) -> nn.Module:
    """A network that computes what ``model`` does, with each quantized layer in operators that XNNPACK knows.

    Args:
        model: the converted network.
        roundings: name of a static layer in a :class:`Call` -> how its input is rounded; ``None`` to find that out.

    Float tensors are shared with the model where they are float32 already; narrower ones become float32, but for those
    of embeddings, which are stored as they are.
    """
    shared = [*model.network.parameters(), *model.network.buffers()]
    network: nn.Module = copy.deepcopy(model.network, {id(tensor): tensor for tensor in shared})
    for name, module in list(network.named_modules()):
        weight = module._parameters.get("weight")
        if isinstance(weight, QuantizedWeight):
            rounding = Rounding()
            if weight.activation_scale is not None:
                rounding = STATIC if roundings is None else roundings[f"{PREFIX}{name}"]
            _put(network, name, _lowered(module, weight, rounding))
        elif isinstance(weight, CastWeight) and isinstance(module, nn.Embedding):
            _put(network, name, NarrowEmbedding(weight.data_, module.padding_idx))
        else:
            _widen(module)
    names = None if isinstance(model.sample, tuple) else tuple(model.sample)
    return Call(network, names).eval()


def _lowered(module: nn.Module, weight: QuantizedWeight, rounding: Rounding) -> nn.Module:
    bias = module._parameters.get("bias")
    fold = module.__dict__.get(FOLD)
    if fold is not None and fold.absorbed:
        bias = fold.shift if bias is None else bias + fold.shift
    made: nn.Module
    if weight.usage == "conv":
        made = LoweredConv(module, weight, bias, rounding)
    else:
        made = LoweredLinear(weight, bias, rounding)
    for hooks in _HOOKS:
        setattr(made, hooks, getattr(module, hooks))
    return made


def _put(network: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, child = name.rpartition(".")
    setattr(network.get_submodule(parent), child, module.eval())


def _widen(module: nn.Module) -> None:
    """Float tensors of one module as float32."""
    for name, parameter in module._parameters.items():
        if isinstance(parameter, CastWeight):
            module._parameters[name] = nn.Parameter(parameter.dequantize(torch.float32), requires_grad=False)
        elif parameter is not None and parameter.dtype in (torch.float16, torch.bfloat16):
            module._parameters[name] = nn.Parameter(parameter.detach().float(), requires_grad=False)
    for name, buffer in module._buffers.items():
        if buffer is not None and buffer.dtype in (torch.float16, torch.bfloat16):
            module._buffers[name] = buffer.float()


def is_language_model(model: Exportable) -> bool:
    """Whether a call takes token ids and nothing else."""
    return not isinstance(model.sample, tuple) and tuple(model.sample) == ("input_ids",)


def arguments(model: Exportable, options: Options) -> tuple[Tensor, ...]:
    """The sample as positional arguments on the CPU, floats in float32."""
    given = model.sample if isinstance(model.sample, tuple) else tuple(model.sample.values())
    return tuple(x.detach().cpu().float() if x.is_floating_point() else x.detach().cpu() for x in given)


def limits(model: Exportable, options: Options) -> tuple[int, int]:
    """Most rows and most tokens of a call; 0 tokens of what is no language model.

    Raises:
        ExportError: when the sample's arguments have different numbers of rows.
    """
    rows = {len(x) if x.dim() else 0 for x in arguments(model, options)}
    if len(rows) != 1 or 0 in rows:
        raise ExportError(f"the sample's arguments have {sorted(rows)} rows: one number of rows, 1 or more, is needed")
    if not is_language_model(model):
        return options.max_batch or rows.pop(), 0
    most = getattr(model.config, "max_position_embeddings", None)
    return options.max_batch or 1, options.length(most)


def rows_of(given: tuple[Tensor, ...], batch: int) -> Iterator[tuple[Tensor, ...]]:
    """Calls of at most ``batch`` rows."""
    for start in range(0, len(given[0]), batch):
        yield tuple(x[start : start + batch] for x in given)
