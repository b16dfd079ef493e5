"""Reading transformers directories in compressed-tensors' format, this project's own and those of llm-compressor.

Needs safetensors alone: integers are unpacked here, and ``quantization_config`` is read as data.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor, nn

from qat_plugin.errors import CheckpointError
from qat_plugin.exporting.assemble import assemble
from qat_plugin.exporting.directory import tokenizer_of
from qat_plugin.exporting.foreign import Gathered
from qat_plugin.exporting.torchao_tensors import raised
from qat_plugin.kernels.packing import unpack
from qat_plugin.qlora.architecture import empty_model, model_names
from qat_plugin.qlora.source import check_shards, read_config, shards
from qat_plugin.scheme import Scheme

_PARTS: Final = ("weight_packed", "weight_shape", "weight_scale", "weight_zero_point", "input_scale")
_UNREAD: Final = (
    "weight_g_idx", "weight_global_scale", "input_global_scale", "input_zero_point", "output_scale", "k_scale",
    "v_scale",
)  # fmt: skip


def read(path: Path, dtype: torch.dtype) -> tuple[Any, Any]:
    """The model and its tokenizer, where the folder has one.

    Args:
        path: a transformers directory whose ``quantization_config`` is compressed-tensors'.
        dtype: the float type to run in.

    Raises:
        CheckpointError: when files are missing or corrupt, of another model, or hold what is not read here.
    """
    check_shards(path)
    config = read_config(path)["quantization_config"]
    _check_whole(config, path)
    network = empty_model(path, dtype, quantized=True)
    layers, plain = _sorted(_opened(path))
    names = model_names(network, [*plain, *(f"{stem}.weight" for stem in layers)], path)
    if names.converted:
        raise CheckpointError(f"{path}: transformers converts {names.converted[0]} while loading; it is not read here")
    found = Gathered()
    for stored, name in names.model.items():
        stem = stored.removesuffix(".weight")
        if stored in plain:
            found.floats[name] = plain[stored]
        else:
            module = network.get_submodule(name.removesuffix(".weight"))
            _add(found, name, _group(config, stem, module, path), layers[stem])
    found.tell(path)
    return assemble(network, found.quantized, found.floats, dtype, path), tokenizer_of(path)


def _check_whole(config: Mapping[str, Any], path: Path) -> None:
    """Raise for what changes outputs beyond the layers' own integers."""
    for part, what in (
        ("transform_config", "rotates weights and activations"),
        ("sparsity_config", "stores sparse weights"),
        ("kv_cache_scheme", "quantizes the cache of keys and values"),
    ):
        given = config.get(part)
        if given and (not isinstance(given, Mapping) or any(given.values())):
            raise CheckpointError(f"{path} {what} ({part} of config.json's quantization_config): not read here")


def _opened(path: Path) -> dict[str, Tensor]:
    from safetensors import SafetensorError, safe_open

    tensors: dict[str, Tensor] = {}
    for shard in shards(path):
        try:
            with safe_open(shard, framework="pt") as file:
                tensors |= {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
        except (SafetensorError, OSError, ValueError) as error:
            raise CheckpointError(f"{shard} is truncated or corrupt: {error}") from error
    return tensors


def _sorted(tensors: Mapping[str, Tensor]) -> tuple[dict[str, dict[str, Tensor]], dict[str, Tensor]]:
    """Parts of each quantized layer by its name, and every other tensor."""
    stems = {name.removesuffix(".weight_scale") for name in tensors if name.endswith(".weight_scale")}
    layers: dict[str, dict[str, Tensor]] = {stem: {} for stem in stems}
    plain = {}
    for name, tensor in tensors.items():
        stem, _, part = name.rpartition(".")
        if part in _UNREAD:
            raise CheckpointError(f"{name}: tensors of this kind are not read here")
        if stem in stems and part in (*_PARTS, "weight"):
            layers[stem][part] = tensor
        else:
            plain[name] = tensor
    return dict(sorted(layers.items())), plain


def _group(config: Mapping[str, Any], name: str, module: nn.Module, path: Path) -> Mapping[str, Any]:
    """The group of ``config_groups`` that a layer belongs to: by its name, a pattern, or its class."""
    groups = list(config.get("config_groups", {}).values())
    kinds = [kind.__name__ for kind in type(module).__mro__]
    for fits in (
        lambda target: target == name,
        lambda target: target.startswith("re:") and re.match(target[3:], name) is not None,
        lambda target: target in kinds,
    ):
        for group in groups:
            if isinstance(group, Mapping) and any(fits(str(target)) for target in group.get("targets", ())):
                return group
    raise CheckpointError(f"{path}: {name} has scales, and no group of config.json's quantization_config names it")


def _add(found: Gathered, name: str, group: Mapping[str, Any], parts: Mapping[str, Tensor]) -> None:
    scheme = _scheme(name, group)
    bits = scheme.weight_bits
    unsigned, zero_point = _integers(name, parts, scheme)
    q = unsigned if not scheme.symmetric else _lowered(unsigned, bits)
    scale = parts["weight_scale"]
    if scheme.per_tensor:
        scale, zero_point = scale.reshape(1, 1), None if zero_point is None else zero_point.reshape(1, 1)
    if scheme.static and "input_scale" not in parts:
        raise CheckpointError(f"{name} has static activations, and the files lack its input_scale")
    fixed = parts["input_scale"].float().reshape(()) if scheme.static else None
    found.add(name, q, scale, None if scheme.symmetric else zero_point, scheme, fixed)


def _scheme(name: str, group: Mapping[str, Any]) -> Scheme:
    weights, inputs = group.get("weights") or {}, group.get("input_activations")
    bits, strategy = weights.get("num_bits"), weights.get("strategy")
    if weights.get("type") != "int" or bits not in (8, 4, 3, 2) or strategy not in ("tensor", "channel", "group"):
        raise CheckpointError(
            f"{name} has {bits}-bit {weights.get('type')} weights per {strategy}; read are 8, 4, 3 and 2-bit int per "
            "tensor, channel or group"
        )
    if group.get("output_activations"):
        raise CheckpointError(f"{name} quantizes its outputs, which is not read here")
    static = False
    if inputs:
        static = not inputs.get("dynamic")
        spelt = inputs.get("type"), inputs.get("num_bits"), inputs.get("symmetric", True), inputs.get("strategy")
        if spelt != ("int", 8, True, "tensor" if static else "token"):
            raise CheckpointError(
                f"{name} quantizes activations as {dict(inputs)}; read are symmetric INT8 ones per token, or "
                "per tensor with a fixed scale"
            )
    return Scheme(
        "integer", weight_bits=bits, activation_bits=8 if inputs else 16, static=static,
        symmetric=bool(weights.get("symmetric", True)), per_tensor=strategy == "tensor",
        group_size=weights["group_size"] if strategy == "group" else None,
    )  # fmt: skip


def _integers(name: str, parts: Mapping[str, Tensor], scheme: Scheme) -> tuple[Tensor, Tensor | None]:
    """Unsigned integers [out_features, in_features], and zero points like the scales."""
    bits, zero_point = scheme.weight_bits, parts.get("weight_zero_point")
    if not scheme.symmetric and zero_point is None:
        raise CheckpointError(f"{name} is asymmetric, and the files lack its weight_zero_point")
    if "weight_packed" not in parts:
        if parts.get("weight", torch.empty(0)).dtype is not torch.int8:
            raise CheckpointError(f"{name} has scales, and neither int8 weights nor packed ones")
        return raised(parts["weight"], bits), None if zero_point is None else raised(zero_point, bits)
    if "weight_shape" not in parts:
        raise CheckpointError(f"{name} is packed, and the files lack its weight_shape")
    rows, columns = (int(size) for size in parts["weight_shape"])
    if zero_point is not None:
        zero_point = _unpacked(zero_point.t(), bits, rows).t().contiguous()
    return _unpacked(parts["weight_packed"], bits, columns), zero_point


def _unpacked(words: Tensor, bits: int, columns: int) -> Tensor:
    """int32 [rows, words], fields of ``bits`` bits from the lowest on, as uint8 [rows, columns]."""
    data = words.contiguous().view(torch.uint8)
    if data.shape[-1] * 8 < columns * bits:
        raise CheckpointError(f"{data.shape[-1]} packed bytes do not hold {columns} integers of {bits} bits")
    whole = -(-data.shape[-1] // bits) * bits  # unpacking takes whole packs of eight integers
    data = torch.nn.functional.pad(data, (0, whole - data.shape[-1]))
    return unpack(data, bits, columns, signed=False)[:, :columns].contiguous()


def _lowered(unsigned: Tensor, bits: int) -> Tensor:
    return (unsigned.to(torch.int16) - (1 << (bits - 1))).to(torch.int8)
