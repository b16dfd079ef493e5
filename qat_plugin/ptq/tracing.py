"""What happens inside a block on one input: which module gave which tensor, in which order."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from qat_plugin.conversion.proof import relative_error
from qat_plugin.qat.layers import first_tensor

# A call of a block: its positional and its named arguments.
Sample = tuple[tuple[Any, ...], Mapping[str, Any]]


@dataclass
class Trace:
    """One forward pass of a block.

    Attributes:
        calls: (module, its first input tensor, its first output tensor) of each call of a module that has parameters of
            its own, in the order in which they returned.
        result: all tensors of the block's output.
    """

    calls: list[tuple[nn.Module, Tensor, Tensor]] = field(default_factory=list)
    result: list[Tensor] = field(default_factory=list)

    def input_of(self, module: nn.Module) -> Tensor | None:
        """The input of a module's first call; ``None`` when it was not called."""
        return next((given for caller, given, _ in self.calls if caller is module), None)

    def before(self, module: nn.Module) -> list[nn.Module]:
        """The modules that returned before a module did, the latest first, each once."""
        earlier: dict[nn.Module, None] = {}
        for caller, _, _ in self.calls:
            if caller is module:
                break
            earlier.pop(caller, None)
            earlier[caller] = None
        return list(reversed(earlier))

    def giver_of(self, tensor: Tensor) -> nn.Module | None:
        """The last module whose output is that tensor: the same memory read the same way."""
        return next((caller for caller, _, out in reversed(self.calls) if _same_memory(out, tensor)), None)


def trace(block: nn.Module, sample: Sample) -> Trace:
    """Run a block on a sample and write down its calls; in the mode it is in, without gradients."""
    seen = Trace()

    def note(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        given, made = first_tensor(args, kwargs), first_tensor(tuple(tree_leaves(output)), {})
        if given is not None and made is not None:
            seen.calls.append((module, given, made))

    handles = [
        module.register_forward_hook(note, with_kwargs=True)
        for module in block.modules()
        if module is not block and any(parameter is not None for parameter in module._parameters.values())
    ]
    try:
        with torch.no_grad():
            args, kwargs = sample
            output = block(*args, **kwargs)
    finally:
        for handle in handles:
            handle.remove()
    seen.result = [leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor)]
    return seen


def largest_change(before: Trace, after: Trace, changing: nn.Module | None) -> tuple[float, nn.Module | None]:
    """The largest relative change between two passes, and where: a module, or ``None`` for the block's own output.

    Args:
        before, after: passes on the same sample.
        changing: a module whose own output may change.
    """
    if [call[0] for call in before.calls] != [call[0] for call in after.calls]:
        return float("inf"), None
    if len(before.result) != len(after.result):
        return float("inf"), None
    changes: list[tuple[float, nn.Module | None]] = [
        (relative_error(now, once), None) for once, now in zip(before.result, after.result, strict=True)
    ]
    for (module, _, once), (_, _, now) in zip(before.calls, after.calls, strict=True):
        if module is not changing:
            changes.append((relative_error(now, once), module))
    return max(changes, key=lambda change: change[0], default=(0.0, None))


def _same_memory(a: Tensor, b: Tensor) -> bool:
    return a.data_ptr() == b.data_ptr() and a.shape == b.shape and a.stride() == b.stride() and a.dtype == b.dtype
