"""Reading torchao's transformers directories, this project's own and those of ``quantize_`` and ``save_pretrained``.

Only safetensors files are opened; what their headers say of a tensor is read as data: no class of it is built.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor

from qat_plugin.errors import CheckpointError
from qat_plugin.exporting.assemble import assemble
from qat_plugin.exporting.directory import tokenizer_of
from qat_plugin.exporting.foreign import Gathered
from qat_plugin.exporting.torchao_tensors import raised
from qat_plugin.qlora.architecture import empty_model, model_names
from qat_plugin.qlora.source import check_shards, read_config, shards
from qat_plugin.scheme import Scheme

_INTX, _INT8 = "IntxUnpackedToInt8Tensor", "Int8Tensor"
_BITS: Final = {"int8": 8, "int4": 4, "int3": 3, "int2": 2}


def read(path: Path, dtype: torch.dtype) -> tuple[Any, Any]:
    """The model and its tokenizer, where the folder has one.

    Args:
        path: a transformers directory whose ``quantization_config`` is torchao's.
        dtype: the float type to run in.

    Raises:
        CheckpointError: when files are missing or corrupt, of another model, or hold tensors that are not read here.
    """
    check_shards(path)
    config = read_config(path)["quantization_config"]
    network = empty_model(path, dtype, quantized=True)
    tensors, described = _opened(path)
    names = model_names(network, described, path)
    if names.converted:
        raise CheckpointError(f"{path}: transformers converts {names.converted[0]} while loading; it is not read here")
    found = Gathered()
    for stored, name in names.model.items():
        entry, parts = described[stored], _parts(stored, described[stored], tensors, path)
        if entry.get("_type") == "Tensor":
            found.floats[name] = parts[""]
        else:
            _add(found, name, entry, parts, grouped=_says_group(config, stored.rpartition(".")[0]))
    found.tell(path)
    return assemble(network, found.quantized, found.floats, dtype, path), tokenizer_of(path)


def _opened(path: Path) -> tuple[dict[str, Tensor], dict[str, dict[str, Any]]]:
    """Every tensor, and what the headers say each parameter is."""
    from safetensors import SafetensorError, safe_open

    tensors: dict[str, Tensor] = {}
    described: dict[str, dict[str, Any]] = {}
    for shard in shards(path):
        try:
            with safe_open(shard, framework="pt") as file:
                metadata = file.metadata() or {}
                tensors |= {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
            described |= {name: json.loads(metadata[name]) for name in json.loads(metadata["tensor_names"])}
        except (SafetensorError, OSError, KeyError, ValueError) as error:
            raise CheckpointError(f"{shard} is no file of torchao's tensors, or corrupt: {error}") from error
    return tensors, described


def _parts(name: str, entry: Mapping[str, Any], tensors: Mapping[str, Tensor], path: Path) -> dict[str, Tensor]:
    stem, _, leaf = name.rpartition(".")
    wanted = {"": name}
    if entry.get("_type") != "Tensor":
        wanted = {part: f"{stem}._{leaf}_{part}" for part in entry.get("_tensor_data_names", ())}
    if missing := [stored for stored in wanted.values() if stored not in tensors]:
        raise CheckpointError(f"{path}: its files lack {missing[0]}")
    return {part: tensors[stored] for part, stored in wanted.items()}


def _says_group(config: Mapping[str, Any], layer: str) -> bool:
    """Whether ``config.json`` calls a layer's scales those of groups: it tells one group a row from a channel."""
    entry = (config.get("quant_type") or {}).get("default") or {}
    named = (entry.get("_data") or {}).get("fqn_to_config")
    data = ((named.get(layer) or {}) if isinstance(named, Mapping) else entry).get("_data") or {}
    granularity = data.get("granularity") or data.get("weight_granularity")
    return isinstance(granularity, Mapping) and granularity.get("_type") == "PerGroup"


def _add(found: Gathered, name: str, entry: Mapping[str, Any], parts: Mapping[str, Tensor], *, grouped: bool) -> None:
    kind, held = entry.get("_type"), entry.get("_data", {})
    unread = sorted(set(parts) - {"qdata", "scale", "zero_point", "act_quant_scale"})
    if kind not in (_INTX, _INT8) or unread:
        what = f"{kind} with {unread[0]}" if unread and kind in (_INTX, _INT8) else str(kind)
        raise CheckpointError(f"{name} is a {what}, which is not read here; read are {_INTX} and {_INT8}")
    bits = 8 if kind == _INT8 else _BITS.get(held.get("target_dtype", {}).get("_data", ""), 0)
    if not bits:
        raise CheckpointError(f"{name} has integers of {held.get('target_dtype')}; read are {', '.join(_BITS)}")
    q, scale, zero_point = parts["qdata"], parts["scale"], parts.get("zero_point")
    if zero_point is not None and zero_point.is_floating_point() and bool((zero_point != zero_point.round()).any()):
        raise CheckpointError(f"{name} has zero points that are no integers, which are not read here")
    symmetric = zero_point is None or not bool(zero_point.any())
    if kind == _INT8 and not symmetric:
        raise CheckpointError(f"{name} is an {_INT8} with zero points, which torchao's own product ignores")
    rows, columns = (int(size) for size in held["block_size"])
    if rows not in (1, q.shape[0]) or (rows != 1 and columns != q.shape[1]):
        raise CheckpointError(f"{name} has a scale per {rows} x {columns} weights; read are groups of one row's")
    scheme = Scheme(
        "integer", weight_bits=bits, activation_bits=16, symmetric=symmetric, per_tensor=rows != 1,
        group_size=columns if columns != q.shape[1] or (rows == 1 and grouped) else None,
    )  # fmt: skip
    scheme = _with_activations(scheme, name, held, parts)
    if not symmetric:
        assert zero_point is not None
        q, zero_point = raised(q, bits), raised(zero_point, bits)
    fixed = parts["act_quant_scale"].float().reshape(()) if "act_quant_scale" in parts else None
    found.add(name, q, scale, None if symmetric else zero_point, scheme, fixed)


def _with_activations(scheme: Scheme, name: str, held: Mapping[str, Any], parts: Mapping[str, Tensor]) -> Scheme:
    """The scheme with what the file says of activations."""
    given = held.get("activation_quantization")
    if given is not None:  # a member of an enum, or the string it is equal to
        spelling = str(given.get("_data") if isinstance(given, Mapping) else given)
        if spelling.lower() != "int8_asym_per_token":
            raise CheckpointError(f"{name} quantizes activations as {spelling!r}; read is int8_asym_per_token")
        return replace(scheme, activation_bits=8)
    kwargs = held.get("act_quant_kwargs")
    if kwargs is None:
        return scheme
    inner = kwargs.get("_data", {})
    granularity, mapping = ((inner.get(key) or {}) for key in ("granularity", "mapping_type"))
    static = "act_quant_scale" in parts
    wanted = "PerTensor" if static else "PerRow"
    if granularity.get("_type") != wanted or mapping.get("_data") != "SYMMETRIC":
        raise CheckpointError(
            f"{name} quantizes activations {granularity.get('_type')}, {mapping.get('_data')}; read are symmetric ones "
            "per token, or per tensor with a fixed scale"
        )
    return replace(scheme, activation_bits=8, static=static)
