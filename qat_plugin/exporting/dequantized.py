"""Quantized models as the float models they stand for: in memory, or as a transformers directory that is kept.

Every integer becomes (q - zero point) x scale, computed in float32, tensor by tensor, and nothing else changes: what is
trained, calibrated or taken as the base of adapters then begins at exactly the numbers that the file holds.
"""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor, nn

from qat_plugin.atomic import replacing_folder
from qat_plugin.cache import cache_directory
from qat_plugin.conversion.convert import is_converted
from qat_plugin.errors import ConfigError
from qat_plugin.exporting.reading import load
from qat_plugin.exporting.sharded import Part, write_shards
from qat_plugin.kernels.weight import is_converted_weight
from qat_plugin.qlora.architecture import empty_from_config

__all__ = ["as_float", "float_folder"]

_ORIGIN: Final = "origin.json"
_SHARD_SIZE: Final = "5GB"


def as_float(model: Any, dtype: torch.dtype = torch.float32) -> Any:
    """A float model of the same class with the numbers that a quantized one stands for.

    Args:
        model: a transformers model, converted (:func:`~qat_plugin.exporting.reading.load`); it is left as it is.
        dtype: of the result; float32 holds every number exactly, narrower types round.

    Returns:
        A new model in eval mode on the CPU, whose parameters can be trained; ``model`` itself where nothing in it is
        quantized. What conversion untied stays untied.
    """
    if not is_converted(model):
        return model
    network = empty_from_config(_float_config(model), dtype)
    made: dict[int, nn.Parameter] = {}  # tied parameters stay one
    state: dict[str, Tensor] = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        if not isinstance(tensor, nn.Parameter):
            state[name] = tensor.detach().cpu().clone()
            continue
        if id(tensor) not in made:
            made[id(tensor)] = nn.Parameter(_numbers(tensor, dtype))
        state[name] = made[id(tensor)]
    network.load_state_dict(state, assign=True)
    if (generation := getattr(model, "generation_config", None)) is not None:
        network.generation_config = copy.deepcopy(generation)
    network.name_or_path = getattr(model, "name_or_path", "")
    return network


def float_folder(path: Path, *, checksums: bool = True) -> Path:
    """The same as a transformers directory in float32, with the tokenizer: for all that reads such a directory.

    It is kept in the user's cache, one for each path, and made anew when the files there have changed. Beside the
    integers, memory holds one float tensor at a time; on disk it takes 4 bytes a weight.

    Args:
        path: a quantized file or folder that :func:`~qat_plugin.exporting.reading.load` reads.
        checksums: as ``load`` takes it.

    Raises:
        CheckpointError: when it cannot be read.
        ConfigError: when the cache cannot be written.
    """
    origin = {"path": str(path.resolve()), "checksums": checksums, "files": dict(_signatures(path))}
    key = hashlib.sha256(str(path.resolve()).encode()).hexdigest()[:16]
    place = cache_directory() / "dequantized" / f"{path.name[:40]}-{key}"
    if _origin(place) == origin:
        return place
    model, tokenizer = load(path, checksums=checksums)
    try:
        with replacing_folder(place) as building:
            _write(model, tokenizer, building)
            (building / _ORIGIN).write_text(json.dumps(origin, indent=1), encoding="utf-8")
    except OSError as error:
        raise ConfigError(
            f"the float numbers of {path} cannot be kept in {place} ({error.strerror or error}): they take 4 bytes a "
            "weight; set QAT_PLUGIN_CACHE to a directory that has room"
        ) from error
    return place


def _numbers(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """What a parameter stands for, on the CPU and in memory of its own."""
    if is_converted_weight(tensor):
        weight: Any = tensor
        found: Tensor = weight.dequantize(dtype)
        return found.detach().cpu().contiguous()
    return tensor.detach().to("cpu", dtype if tensor.is_floating_point() else tensor.dtype, copy=True)


def _float_config(model: Any) -> Any:
    config = copy.deepcopy(model.config)
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    if head is not None and head.weight is not embedding.weight:
        config.tie_word_embeddings = False  # conversion unties what takes two schemes
    return config


def _write(model: Any, tokenizer: Any, folder: Path) -> None:
    config = _float_config(model)
    config.dtype, config.architectures = torch.float32, [type(model).__name__]
    config.save_pretrained(folder)
    if getattr(model, "generation_config", None) is not None:
        model.generation_config.save_pretrained(folder)
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)
    write_shards(folder, list(_parts(model)), {"format": "pt"}, _SHARD_SIZE, lambda _: None)


def _parts(model: nn.Module) -> Iterator[Part]:
    """Each distinct tensor of the state as it is stored, made when its turn comes."""
    seen: set[int] = set()
    for name, tensor in model.state_dict(keep_vars=True).items():
        if id(tensor) in seen:
            continue
        seen.add(id(tensor))
        dtype = torch.float32 if tensor.is_floating_point() else tensor.dtype
        planned = torch.empty(tensor.shape, dtype=dtype, device="meta")
        yield Part({name: planned}, lambda name=name, tensor=tensor, dtype=dtype: {  # type: ignore[misc]
            name: _numbers(tensor, dtype)
        })  # fmt: skip


def _signatures(path: Path) -> Iterator[tuple[str, list[int]]]:
    """Size and time of change of the file, or of the files in a folder."""
    for file in sorted(path.iterdir()) if path.is_dir() else [path]:
        if file.is_file():
            found = file.stat()
            yield file.name, [found.st_size, found.st_mtime_ns]


def _origin(place: Path) -> Any:
    try:
        return json.loads((place / _ORIGIN).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
