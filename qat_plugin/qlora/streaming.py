"""Loading a quantized base tensor by tensor: the float model is never whole in memory.

::

    config.json -> model on meta -> plan -> empty NF4 layers
    shards (mapped) -> one tensor -> device -> content sum -> cast -> NF4 -> its layer; then the next one

At any moment the host holds what is quantized so far and a few copies of one tensor.
"""

from __future__ import annotations

import os
import sys
import time
from typing import Any

import torch
from torch import nn

from qat_plugin.cache import cache_directory
from qat_plugin.errors import ConfigError
from qat_plugin.measure import Progress, progressing
from qat_plugin.measure.host_memory import AnonymousMemory, return_freed_memory
from qat_plugin.policy import Plan, PolicyLike
from qat_plugin.qlora.architecture import empty_model, not_streamable
from qat_plugin.qlora.base import cast_layers, quantize_layers
from qat_plugin.qlora.cached import Cache
from qat_plugin.qlora.contents import Contents
from qat_plugin.qlora.fingerprint import tensor_sum
from qat_plugin.qlora.nf4 import Backend, guard, is_nf4, state_tensors
from qat_plugin.qlora.prepare import base_plan
from qat_plugin.qlora.record import LOADED, BaseRecord
from qat_plugin.qlora.shell import Shell
from qat_plugin.qlora.source import (
    Source,
    check_vocabulary,
    find_source,
    load_tokenizer,
    load_whole,
)
from qat_plugin.scheme import FLOAT_DTYPES

__all__ = ["BaseRecord", "load_base"]

_LARGE = 1 << 20


def load_base(
    path: str | os.PathLike[str],
    base: PolicyLike | None = "nf4-dq",
    *,
    backend: Backend = "bitsandbytes",
    dtype: torch.dtype = torch.bfloat16,
    device: torch.device | str = "cpu",
    cache: str | os.PathLike[str] | bool | None = None,
    revision: str | None = None,
    progress: Progress | bool = True,
) -> tuple[Any, Any, BaseRecord]:
    """Load a causal language model with its linear layers in NF4, and its tokenizer.

    Weights are cast to ``dtype`` and then quantized, as transformers does with ``BitsAndBytesConfig``; the result is
    equal to its to the bit. Layers with an integer scheme stay in ``dtype``: ``prepare`` fake-quantizes them.

    Args:
        path: local transformers directory, or a hub name ("org/name") when there is no such directory.
        base: policy of the base; ``None`` leaves every layer in ``dtype``.
        backend: who holds the NF4 weights: ``"bitsandbytes"`` or ``"torchao"``.
        dtype: float type of everything that is not NF4, and the one that NF4 layers multiply in.
        device: where to quantize and where the model stays.
        cache: a directory that keeps quantized models for the next time; ``True`` for the user's cache directory. A
            model without an NF4 layer is not kept.
        revision: branch, tag or commit of a hub name.
        progress: shown while tensors are read, as in :func:`~qat_plugin.measure.progressing`.

    Returns:
        ``(model, tokenizer, record)``: a transformers model in eval mode, its tokenizer, where it came from.

    Raises:
        DataError: when there is no such directory and the hub does not give it.
        CheckpointError: when something in it is missing, truncated, or does not belong together; raised before any
            weight is read.
        PolicyError, PrepareError: when the policy does not fit the model.
        ConfigError: for an argument that is not allowed, or a missing package.
    """
    _check_arguments(backend, dtype)
    started, target = time.perf_counter(), torch.device(device)
    source = find_source(path, revision=revision)
    model = empty_model(source.folder, dtype)
    contents = Contents(model, source.folder)
    tokenizer = load_tokenizer(source.folder)
    check_vocabulary(source.folder, model, tokenizer)
    plan, why = base_plan(model, base), not_streamable(model, contents.names, dtype)
    shell = Shell(model, plan, backend=backend, dtype=dtype, device=target)
    place = cache_directory() / "quantized" if cache is True else cache
    kept = Cache.of(source, plan, backend, dtype, place) if place and shell.nf4 else None
    with AnonymousMemory() as memory:  # from here on: what was imported so far is no memory of this model
        sums, damage = kept.restore(shell) if kept else (None, "")
        cached = sums is not None
        if damage:
            print(damage, file=sys.stderr)
        if sums is None and why:
            model, sums = _whole(source, plan, backend, dtype, target), {}
        elif sums is None:
            sums = _stream(shell, contents, progress)
        if kept and not cached:
            kept.store(model, sums)
        guard(model)
        cast_layers(model, plan)
    record = BaseRecord(
        path=source.name, revision=source.revision, backend=backend, dtype=str(dtype).removeprefix("torch."),
        plan=tuple(plan.to_list()), sums=sums, cached=cached, streamed=not why,
        note="; ".join(filter(None, (why, damage))), seconds=time.perf_counter() - started,
        peak_host_bytes=memory.growth, largest_tensor_bytes=contents.largest_bytes,
        quantized_bytes=base_bytes(model),
    )  # fmt: skip
    model.__dict__[LOADED] = record
    return model, tokenizer, record


def base_bytes(model: nn.Module) -> int:
    """Bytes of parameters and buffers, the scales of NF4 weights included; shared ones once."""
    found: dict[int, int] = {}
    for module in model.modules():
        quantized = is_nf4(module)
        if quantized:
            found[id(module.weight)] = sum(part.nbytes for part in state_tensors(module).values())
        for name, tensor in (*module._parameters.items(), *module._buffers.items()):
            if tensor is not None and not (quantized and name == "weight"):
                found[id(tensor)] = tensor.nbytes
    return sum(found.values())


def _check_arguments(backend: str, dtype: torch.dtype) -> None:
    if backend not in ("bitsandbytes", "torchao"):
        raise ConfigError(f"backend={backend!r} is not one of bitsandbytes, torchao")
    if dtype not in FLOAT_DTYPES.values():
        raise ConfigError(f"dtype={dtype} is not one of {', '.join(map(str, FLOAT_DTYPES.values()))}")


def _stream(shell: Shell, contents: Contents, progress: Progress | bool) -> dict[str, str]:
    """Fill the shell from the files, one tensor after another; returns the content sums of what was read."""
    sums = {}
    with progressing(progress, "quantizing the base", len(contents)) as advance:
        for stored, name, tensor in contents.tensors():
            tensor = tensor.to(shell.device)
            sums[stored] = tensor_sum(tensor)
            size = tensor.nbytes
            shell.put(name, tensor)
            del tensor
            if size >= _LARGE:
                return_freed_memory()
            advance(len(sums))
    shell.finish(contents.missing)
    return sums


def _whole(source: Source, plan: Plan, backend: Backend, dtype: torch.dtype, device: torch.device) -> Any:
    """For a model that cannot be streamed: load it whole, then quantize layer by layer, each float weight let go."""
    model = load_whole(source.folder, dtype)
    quantize_layers(model, plan, backend=backend, compute_dtype=dtype, device=device)
    return model.to(device)
