"""Which BatchNorm normalises the output of which layer, and of nothing else: read from torch.fx graphs.

The model is traced in training and in evaluation mode; where tracing fails (a forward pass that depends on its data),
its children are traced instead. A pair counts when each call of the layer feeds that norm alone, and each call of the
norm follows that layer.
"""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Iterator
from typing import Any

from torch import fx, nn

from qat_plugin.qat.layers import FakeQuantized

logger = logging.getLogger(__name__)
NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.SyncBatchNorm)


class _Tracer(fx.Tracer):
    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        """Layers stay whole, prepared ones and subclasses included."""
        return isinstance(m, (*_LAYERS, *NORMS, FakeQuantized)) or super().is_leaf_module(m, module_qualified_name)


_LAYERS = (nn.Conv1d, nn.Conv2d, nn.Linear)


def norm_pairs(model: nn.Module) -> dict[nn.Module, nn.Module]:
    """Layer (nn.Conv1d, nn.Conv2d or nn.Linear) -> the BatchNorm that alone reads its output.

    Modes are afterwards what they were.
    """
    if not any(isinstance(module, NORMS) for module in model.modules()):
        return {}
    followers: dict[nn.Module, set[nn.Module | None]] = defaultdict(set)
    feeders: dict[nn.Module, set[nn.Module | None]] = defaultdict(set)
    modes = {module: module.training for module in model.modules()}
    try:
        for mode in (True, False):
            for module in modes:
                module.training = mode
            for part, graph in _graphs(model):
                _read(part, graph, followers, feeders)
    finally:
        for module, mode in modes.items():
            module.training = mode
    return {
        layer: norm
        for layer, (*norms,) in followers.items()
        for norm in norms[:1]
        if norm is not None and len(norms) == 1 and feeders[norm] == {layer}
    }


def _graphs(module: nn.Module) -> Iterator[tuple[nn.Module, fx.Graph]]:
    """The module's own graph, or those of its children."""
    if isinstance(module, (*_LAYERS, *NORMS)) or not any(isinstance(part, NORMS) for part in module.modules()):
        return
    try:
        yield module, _Tracer().trace(module)
    except Exception as reason:  # whatever a forward pass raises when it meets a proxy
        logger.debug("%s cannot be traced as a whole: %s", type(module).__name__, reason)
        for child in module.children():
            yield from _graphs(child)


def _read(
    part: nn.Module,
    graph: fx.Graph,
    followers: dict[nn.Module, set[nn.Module | None]],
    feeders: dict[nn.Module, set[nn.Module | None]],
) -> None:
    called = {node: part.get_submodule(str(node.target)) for node in graph.nodes if node.op == "call_module"}
    for node, module in called.items():
        if isinstance(module, _LAYERS):
            users = list(node.users)
            after = called.get(users[0]) if len(users) == 1 else None
            followers[module].add(after if isinstance(after, NORMS) else None)
        elif isinstance(module, NORMS):
            before = called.get(_only(node.args)) if not node.kwargs else None
            feeders[module].add(before)


def _only(args: tuple[Any, ...]) -> Any:
    return args[0] if len(args) == 1 else None
