"""Chains of blocks: the parts of a model that take each other's output, so that one can be fed at a time."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from qat_plugin.ptq.feeding import feed
from qat_plugin.ptq.ranks import failing_together, from_every
from qat_plugin.qat.layers import FakeQuantized


class Enough(BaseException):  # not an Exception: a forward that catches those must not swallow it
    """Raised in a hook to leave a forward pass whose rest is not needed."""


@dataclass(frozen=True)
class Chain:
    """Blocks of one class that follow each other.

    Attributes:
        name: of their container, such as ``model.layers``.
        blocks: in their order.
    """

    name: str
    blocks: tuple[nn.Module, ...]

    def block_name(self, index: int) -> str:
        """``model.layers.3``."""
        return f"{self.name}.{index}".removeprefix(".")


def find_chains(model: nn.Module) -> list[Chain]:
    """The outermost containers whose members, two at least and all of one class, hold prepared layers."""
    chains: list[Chain] = []
    for name, module in model.named_modules():
        inside = any(not chain.name or name.startswith(f"{chain.name}.") for chain in chains)
        if inside or not isinstance(module, (nn.ModuleList, nn.Sequential)) or len(module) < 2:
            continue
        members = tuple(module)
        if len({type(member) for member in members}) != 1 or len(set(map(id, members))) != len(members):
            continue
        if all(_holds_layers(member) for member in members):
            chains.append(Chain(name, members))
    return chains


def _holds_layers(block: nn.Module) -> bool:
    return any(isinstance(module, FakeQuantized) for module in block.modules() if module is not block)


@dataclass
class ChainInputs:
    """What the blocks of a chain are called with.

    Attributes:
        hidden: the input of the block at hand, batch by batch.
        rest: the other arguments, [block][batch]; blocks mostly share them (masks, positions).
    """

    hidden: list[Tensor] = field(default_factory=list)
    rest: list[list[tuple[tuple[Any, ...], dict[str, Any]]]] = field(default_factory=list)
    slot: int | str = 0

    def arguments(self, index: int, batch: int, hidden: Tensor) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """What a block is called with: an input, and the other arguments of that batch."""
        args, kwargs = self.rest[index][batch]
        if isinstance(self.slot, int):
            return (hidden, *args), kwargs
        return args, {self.slot: hidden, **kwargs}


class _Recorder:
    """Hooks that take down how the blocks of a chain are called in one forward pass."""

    def __init__(self, chain: Chain, inputs: ChainInputs, keep_on: torch.device | None, to_the_end: bool) -> None:
        self.chain, self.inputs, self.keep_on, self.to_the_end = chain, inputs, keep_on, to_the_end
        self.next, self.last, self.broken = 0, None, ""
        self.outputs: list[Tensor] = []

    def before(self, index: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        slot, hidden = _hidden(args, kwargs)
        if index != self.next or hidden is None:
            self.broken = f"{self.chain.block_name(index)} is called out of order or without a tensor"
        elif index and hidden is not self.last:
            self.broken = f"{self.chain.block_name(index)} does not take what the block before it returns"
        rest = (args[1:], dict(kwargs)) if isinstance(slot, int) else (args, _without(kwargs, slot))
        others = tree_leaves(rest)
        if any(hasattr(value, "get_seq_length") for value in others):
            self.broken = f"{self.chain.block_name(index)} is called with a cache"
        if any(value is output for value in others for output in self.outputs):
            self.broken = f"{self.chain.block_name(index)} takes more than one tensor from the block before it"
        if self.broken or hidden is None:
            raise Enough
        if index == 0:
            held = hidden.detach().clone()
            self.inputs.hidden.append(held if self.keep_on is None else held.to(self.keep_on))
            self.inputs.slot = slot
        self.inputs.rest[index].append(rest)

    def after(self, index: int, output: Any) -> None:
        self.last, self.next = first_output(output), index + 1
        self.outputs = [value for value in tree_leaves(output) if isinstance(value, Tensor) and value is not self.last]
        if self.next == len(self.chain.blocks) and not self.to_the_end:
            raise Enough


def record(
    model: nn.Module, chain: Chain, batches: Sequence[Any], keep_on: torch.device | None = None
) -> ChainInputs | str:
    """Run the model up to the chain's end on each batch, and take down its blocks' inputs.

    The first batch goes through the whole model, to see whether the chain is run once. It is a chain when it is one on
    all ranks.

    Args:
        model: the model.
        chain: of its blocks.
        batches: the calibration data.
        keep_on: where hidden states wait; ``None`` for where they are.

    Returns:
        The inputs, or why the blocks are no chain.
    """
    with failing_together():
        inputs = _recorded(model, chain, batches, keep_on)
    broken = next(filter(None, from_every(inputs if isinstance(inputs, str) else "")), "")
    return broken or inputs


def _recorded(
    model: nn.Module, chain: Chain, batches: Sequence[Any], keep_on: torch.device | None
) -> ChainInputs | str:
    inputs = ChainInputs(rest=[[] for _ in chain.blocks])
    for index, batch in enumerate(batches):
        recorder = _Recorder(chain, inputs, keep_on, to_the_end=index == 0)
        handles = []
        for i, block in enumerate(chain.blocks):
            handles.append(block.register_forward_pre_hook(_before(recorder, i), with_kwargs=True, prepend=True))
            handles.append(block.register_forward_hook(_after(recorder, i)))
        try:
            feed(model, batch)
            if recorder.next != len(chain.blocks):
                return f"a batch does not reach the end of {chain.name}"
        except Enough:
            if recorder.broken:
                return recorder.broken
        finally:
            for handle in handles:
                handle.remove()
    return inputs


def _before(recorder: _Recorder, index: int) -> Any:
    def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        recorder.before(index, args, kwargs)

    return hook


def _after(recorder: _Recorder, index: int) -> Any:
    def hook(_: nn.Module, args: Any, output: Any) -> None:
        recorder.after(index, output)

    return hook


def _hidden(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[int | str, Tensor | None]:
    """Where a block takes its input: its first argument, else the first tensor among the named ones."""
    if args and isinstance(args[0], Tensor):
        return 0, args[0]
    return next(_float_tensors(kwargs), ("", None))


def _float_tensors(kwargs: dict[str, Any]) -> Iterator[tuple[str, Tensor]]:
    return ((name, x) for name, x in kwargs.items() if isinstance(x, Tensor) and x.is_floating_point())


def _without(kwargs: dict[str, Any], name: int | str) -> dict[str, Any]:
    return {key: value for key, value in kwargs.items() if key != name}


def first_output(output: Any) -> Any:
    """A block's hidden states: what it returns, or the first of several."""
    return output[0] if isinstance(output, (tuple, list)) else output
