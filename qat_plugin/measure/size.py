"""True sizes: bytes a model occupies in memory, bytes a file or folder occupies on disk."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import nn
from torch.nn.parameter import is_lazy

from qat_plugin.errors import CheckpointError, QatError

StorageKey = tuple[str, int]


def model_bytes(model: nn.Module, *, non_persistent: bool = True) -> int:
    """Bytes that the parameters and buffers of ``model`` occupy in memory.

    Each distinct storage is counted once, at its full length: tied weights once, a view of a larger tensor as the
    whole tensor it keeps alive. Tensor subclasses (quantized weights, DTensors) are opened recursively through
    ``__tensor_flatten__``, so it is the packed integers, scales and zero points that count and not the shape that the
    subclass shows. Gradients, optimizer states and activations are not part of it.

    Args:
        model: any module; on the ``meta`` device the result is what it would occupy.
        non_persistent: count the buffers that are not in ``state_dict()`` too (rotary frequencies, masks).

    Raises:
        QatError: when a parameter of a lazy module has no shape yet.
    """
    storages: dict[StorageKey, int] = {}
    for name, tensor in _named_tensors(model, non_persistent):
        if is_lazy(tensor):
            raise QatError(
                f"the size of {name!r} is not known: it belongs to a lazy module that has seen no input yet; "
                "run one batch through the model first"
            )
        for key, length in _storages(tensor):
            storages[key] = max(storages.get(key, 0), length)
    return sum(storages.values())


def parameter_count(model: nn.Module) -> int:
    """Number of distinct weights: elements of the parameters as the model shows them, tied ones once.

    Take it from the float model: ``8 * model_bytes(small) / parameter_count(float_model)`` is bits per weight.
    """
    return sum(parameter.numel() for parameter in model.parameters())


def file_bytes(path: str | os.PathLike[str]) -> int:
    """Bytes of a file, or the sum over the regular files below a directory.

    A file that is reachable by several hard links counts once. Symbolic links inside a directory are not followed;
    ``path`` itself may be one.

    Raises:
        CheckpointError: when nothing is there.
    """
    root = Path(path)
    if root.is_file():
        return root.stat().st_size
    if not root.is_dir():
        raise CheckpointError(f"cannot measure {str(root)!r}: there is no such file or directory")
    sizes: dict[tuple[int, int], int] = {}
    for folder, _, names in os.walk(root):
        for name in names:
            file = Path(folder, name)
            if file.is_file() and not file.is_symlink():
                status = file.stat()
                sizes[status.st_dev, status.st_ino] = status.st_size
    return sum(sizes.values())


def _named_tensors(model: nn.Module, non_persistent: bool) -> Iterator[tuple[str, torch.Tensor]]:
    """Parameters, then buffers, by full name; a tensor under two names may come twice."""
    yield from model.named_parameters()
    for prefix, module in model.named_modules():
        skipped = set() if non_persistent else module._non_persistent_buffers_set
        for name, buffer in module.named_buffers(recurse=False, remove_duplicate=False):
            if name not in skipped:
                yield f"{prefix}.{name}".lstrip("."), buffer


def _storages(tensor: torch.Tensor) -> Iterator[tuple[StorageKey, int]]:
    """The (identity, bytes) of each piece of memory that holds ``tensor``."""
    parts = _parts(tensor)
    if parts:
        for part in parts:
            yield from _storages(part)
    elif tensor.is_mkldnn:  # oneDNN's blocked layouts are opaque: no storage, and padding that the shape does not show
        yield ("mkldnn", torch.ops.mkldnn.data_ptr(tensor)), torch.ops.mkldnn._nbytes(tensor)
    else:
        storage = tensor.untyped_storage()
        if storage.device.type == "meta":  # every meta tensor has address 0
            yield ("meta", storage._cdata), storage.nbytes()
        else:
            yield (str(storage.device), storage.data_ptr()), storage.nbytes()


def _parts(tensor: torch.Tensor) -> list[torch.Tensor]:
    """The plain tensors that a composite tensor is made of; empty for one that has a storage of its own."""
    if hasattr(tensor, "__tensor_flatten__"):
        names, _ = tensor.__tensor_flatten__()
        return [getattr(tensor, name) for name in names]
    if tensor.layout is torch.sparse_coo:
        return [tensor._indices(), tensor._values()]
    if tensor.layout in (torch.sparse_csr, torch.sparse_bsr):
        return [tensor.crow_indices(), tensor.col_indices(), tensor.values()]
    if tensor.layout in (torch.sparse_csc, torch.sparse_bsc):
        return [tensor.ccol_indices(), tensor.row_indices(), tensor.values()]
    return []
