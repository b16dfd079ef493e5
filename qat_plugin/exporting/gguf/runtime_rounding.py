"""What llama.cpp's processor kernels round: the input of each product, to the type that goes with its weight's.

============== =====================================================================
weight         input
============== =====================================================================
Q8_0 Q4_0 Q4_1 INT8 per 32 features, ``d = absmax / 127`` kept in fp16
F16, BF16      that type
F32            not rounded
============== =====================================================================

With Q4_1, minima are multiplied by the block's sum, kept in fp16. GELU is looked up in a table of fp16 numbers.
A float copy that rounds in the same places computes what the runtime does up to the order of its sums, so that a
mistake in the file cannot hide behind the rounding.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor, nn

from qat_plugin.exporting.contents import Exportable
from qat_plugin.exporting.gguf.blocks import WEIGHTS, block_scales
from qat_plugin.exporting.gguf.layout import DTYPES, Entry
from qat_plugin.numerics import Quantized


@contextmanager
def rounding_inputs(network: nn.Module, model: Exportable, entries: Sequence[Entry]) -> Iterator[None]:
    """Round inputs of linear layers as llama.cpp does.

    Args:
        network: :func:`~qat_plugin.exporting.gguf.copies.float_copy`'s.
        model: what it is a copy of.
        entries: of the file.
    """
    kinds = {entry.source: entry.kind for entry in entries}
    shared = {id(parameter): kinds[name] for name, parameter in network.named_parameters() if name in kinds}

    unrounded: dict[int, Tensor] = {}

    def rounding(module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        unrounded[id(module)] = args[0]
        return (rounded(args[0], shared[id(module.weight)]),)

    minima = {
        id(parameter): _minima(model.layers[name].integers)
        for name, parameter in network.named_parameters()
        if kinds.get(name) == "Q4_1"
    }

    def correcting(module: nn.Module, args: tuple[Tensor, ...], out: Tensor) -> Tensor:
        m = minima.get(id(module.weight))
        return out if m is None else out + _lost_sums(unrounded[id(module)]) @ m.t()

    linears = [module for module in network.modules() if isinstance(module, nn.Linear)]
    hooks = [module.register_forward_pre_hook(rounding) for module in linears]
    hooks += [module.register_forward_hook(correcting) for module in linears]
    for name, module in network.named_modules():
        if name.endswith(".act_fn") and "gelu" in type(module).__name__.lower():
            hooks.append(module.register_forward_hook(_looked_up))
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _looked_up(gelu: nn.Module, args: tuple[Tensor, ...], out: Tensor) -> Tensor:
    """GELU, which llama.cpp looks up in a table of fp16 numbers between -10 and 10."""
    (x,) = args
    table = gelu.forward(x.half().to(x.dtype)).half().to(x.dtype)
    return torch.where(x <= -10, 0.0, torch.where(x >= 10, x, table))


def rounded(x: Tensor, kind: str) -> Tensor:
    """Inputs [..., features] as a weight of a type sees them."""
    if kind in DTYPES:
        return x.to(DTYPES[kind]).to(x.dtype)
    q, d = _int8(x)
    return (q * d.half().to(x.dtype)).reshape(x.shape)


def _int8(x: Tensor) -> tuple[Tensor, Tensor]:
    """Integers [..., blocks, 32] and scales [..., blocks, 1] before fp16 rounds them."""
    blocks = x.reshape(*x.shape[:-1], -1, WEIGHTS)
    absmax = blocks.abs().amax(-1, keepdim=True)
    return torch.round(blocks * torch.where(absmax == 0, 0.0, 127 / absmax)), absmax / 127


def _lost_sums(x: Tensor) -> Tensor:
    """What the fp16 sum of each block has more than the sum of the rounded inputs, [..., blocks]."""
    q, d = _int8(x)
    return ((q.sum(-1) * d[..., 0]).half() - (q.sum(-1) * d[..., 0].half().to(x.dtype))).to(x.dtype)


def _minima(held: Quantized) -> Tensor:
    """[out_features, blocks], of a layer with zero points."""
    assert held.zero_point is not None
    minima = -held.zero_point.float() * held.scale
    return torch.from_numpy(np.array(block_scales(minima, tuple(held.q.shape))))
