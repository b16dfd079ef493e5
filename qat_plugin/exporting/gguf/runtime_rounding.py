"""What llama.cpp's processor kernels round: the input of each product, to the type that goes with its weight's.

============== =====================================================================
weight         input
============== =====================================================================
Q8_0 Q4_0 Q4_1 INT8 per 32 features, ``d = absmax / 127`` kept in fp16
F16, BF16      that type
F32            not rounded
============== =====================================================================

GELU is looked up in a table of fp16 numbers.
A float copy that rounds in the same places computes what the runtime does up to the order of its sums, so that a
mistake in the file cannot hide behind the rounding.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from qat_plugin.exporting.gguf.layout import DTYPES, Entry

_WEIGHTS = 32


@contextmanager
def rounding_inputs(network: nn.Module, entries: Sequence[Entry]) -> Iterator[None]:
    """Round inputs of linear layers as llama.cpp does.

    Args:
        network: :func:`~qat_plugin.exporting.gguf.copies.float_copy`'s.
        entries: of the file.
    """
    kinds = {entry.source: entry.kind for entry in entries}
    shared = {id(parameter): kinds[name] for name, parameter in network.named_parameters() if name in kinds}

    def rounding(module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return (rounded(args[0], shared[id(module.weight)]),)

    linears = [module for module in network.modules() if isinstance(module, nn.Linear)]
    hooks = [module.register_forward_pre_hook(rounding) for module in linears]
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
    blocks = x.reshape(*x.shape[:-1], -1, _WEIGHTS)
    absmax = blocks.abs().amax(-1, keepdim=True)
    inverse = torch.where(absmax == 0, 0.0, 127 / absmax)
    d = (absmax / 127).half().to(x.dtype)
    return (torch.round(blocks * inverse) * d).reshape(x.shape)
