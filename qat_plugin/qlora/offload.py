"""What is saved for the backward pass waits in host memory, and comes back when its turn comes.

With gradient checkpointing only the blocks' inputs are saved outside of the blocks: those are what moves, once in each
direction a step. Parameters never move (a frozen head is saved for the backward pass too), nor do small tensors.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor, nn

_LEAST: Final = 1 << 20


@dataclass
class Offloaded:
    """What a pass moved.

    Attributes:
        tensors, moved_bytes: moved to the host since the block was entered.
    """

    tensors: int = 0
    moved_bytes: int = 0


@dataclass(frozen=True)
class _OnHost:
    tensor: Tensor
    device: torch.device


@contextmanager
def offloading(model: nn.Module, *, minimum_bytes: int = _LEAST, force: bool = False) -> Iterator[Offloaded]:
    """Inside, activations on CUDA that are saved for the backward pass are kept in pinned host memory.

    Forward and backward both belong inside. Values and gradients are unchanged, to the bit.

    Args:
        model: its parameters and buffers stay where they are.
        minimum_bytes: smaller tensors stay too.
        force: copy CPU tensors as well, which saves nothing; for tests.

    Yields:
        A count of what was moved.
    """
    resident = {_storage(tensor) for tensor in (*model.parameters(), *model.buffers()) if not tensor.is_meta}
    count = Offloaded()

    def pack(tensor: Tensor) -> Tensor | _OnHost:
        moves = (tensor.is_cuda or force) and type(tensor) is Tensor and tensor.nbytes >= minimum_bytes
        if not moves or _storage(tensor) in resident:
            return tensor
        count.tensors += 1
        count.moved_bytes += tensor.nbytes
        host = torch.empty_like(tensor, device="cpu", pin_memory=tensor.is_cuda)
        # Both copies run on the current stream, after what made the tensor and before what reuses its memory; the
        # host's caching allocator does not hand out pinned memory again while a copy of that stream still reads it.
        host.copy_(tensor, non_blocking=tensor.is_cuda)
        return _OnHost(host, tensor.device)

    def unpack(saved: Tensor | _OnHost) -> Tensor:
        if isinstance(saved, Tensor):
            return saved
        return saved.tensor.to(saved.device, non_blocking=saved.device.type == "cuda")

    with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
        yield count


def _storage(tensor: Tensor) -> tuple[str, int]:
    try:
        return str(tensor.device), tensor.untyped_storage().data_ptr()
    except (NotImplementedError, RuntimeError):  # a subclass without a storage of its own
        return "", id(tensor)
