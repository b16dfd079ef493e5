"""Several ranks that calibrate together: each has its own batches, and all must do the same to the model.

Statistics are summed up (:meth:`~qat_plugin.ptq.statistics.InputStatistics.synchronize`). What else follows from the
data, which layers it reaches, whether a scale folds, whether it is sound, is agreed on here. Alone, nothing happens.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from qat_plugin.errors import DataError, QatError
from qat_plugin.qat import quantizers

T = TypeVar("T")


def several() -> bool:
    """Whether there are other ranks."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def from_every(value: T) -> list[T]:
    """What each rank gives, in their order; every rank calls it."""
    if not several():
        return [value]
    found: list[T] = [value] * dist.get_world_size()
    dist.all_gather_object(found, value)
    return found


def of_first(value: T) -> T:
    """What rank 0 gives, its tensors on the device of one's own; every rank calls it."""
    if not several():
        return value
    mine = next((leaf.device for leaf in tree_leaves(value) if isinstance(leaf, Tensor)), torch.device("cpu"))
    carried = [tree_map(lambda leaf: leaf.detach().cpu() if isinstance(leaf, Tensor) else leaf, value)]
    dist.broadcast_object_list(carried, src=0)
    there: T = tree_map(lambda leaf: leaf.to(mine) if isinstance(leaf, Tensor) else leaf, carried[0])
    return there


@contextmanager
def failing_together() -> Iterator[None]:
    """What fails inside on one rank fails on all, so that none waits for it; ranks do not talk inside.

    Raises:
        DataError: on the ranks where nothing failed, with the text of the first failure.
    """
    try:
        yield
    except Exception as error:
        from_every(str(error) or type(error).__name__)
        raise
    for rank, message in enumerate(from_every("")):
        if message:
            raise DataError(f"rank {rank}: {message}")


def check_same(model: nn.Module) -> None:
    """Raise unless every rank holds the numbers of rank 0: weights, scales, observers.

    Raises:
        QatError: on every rank, naming the first tensor that differs.
    """
    if not several():
        return
    tensors = dict(model.state_dict())
    for name, quantizer in quantizers(model).items():
        tensors |= {f"{name}: {key}": value for key, value in quantizer.export_state().items()}
    mine = {name: _sum_of(tensor) for name, tensor in tensors.items() if isinstance(tensor, Tensor)}
    first, *others = from_every(mine)
    for rank, theirs in enumerate(others, start=1):
        for name in [*first, *theirs]:
            if first.get(name) != theirs.get(name):
                raise QatError(
                    f"rank {rank} ended with other numbers than rank 0 ({name}): ranks must begin with the same float "
                    "weights, on devices of one kind; broadcast rank 0's weights before calibrating, or calibrate on "
                    "one rank alone"
                )


def _sum_of(tensor: Tensor) -> str:
    values = tensor.detach().cpu().contiguous().reshape(-1)
    return hashlib.sha256(values.view(torch.uint8).numpy().data if values.numel() else b"").hexdigest()
