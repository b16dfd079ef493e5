"""What a layer costs in the file of a converted model: packed rows, scales, zero points, padding, ties counted once."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Final

import torch
from torch import nn

from qat_plugin.kernels.packing import packed_columns
from qat_plugin.policy import LayerPlan, Plan, candidates
from qat_plugin.scheme import Scheme
from qat_plugin.sensitivity.rules import exactly

_SCALE_BYTES: Final = 2  # bf16
_ZERO_POINT_BYTES: Final = 1
_STATIC_BYTES: Final = 4  # one float32 activation scale
_CHECKSUMS: Final = 160
_ALIGNMENT: Final = 64


def layer_bytes(layer: LayerPlan) -> int:
    """Bytes of one layer's weight in a file, as :func:`~qat_plugin.save_converted` writes it.

    Args:
        layer: its plan; a layer whose Parameter another one holds in the same format costs nothing.
    """
    if layer.tied_to is not None:
        return layer.untied_bytes
    scheme = layer.scheme
    if scheme is None:
        return layer.bytes_before
    rows, columns = layer.shape
    if scheme.is_float:
        return rows * columns * scheme.float_dtype.itemsize
    scales = 1 if scheme.per_tensor else rows * (columns // (scheme.group_size or columns))
    each = _SCALE_BYTES + (0 if scheme.symmetric else _ZERO_POINT_BYTES)
    return rows * packed_columns(columns, scheme.weight_bits) + scales * each + (_STATIC_BYTES if scheme.static else 0)


@dataclass(frozen=True)
class Ledger:
    """What a model's file holds beside the layers whose schemes are chosen.

    Attributes:
        fixed: bytes of all other tensors, which stay as they are, and of the header (an upper bound).
        floats: bytes of all tensors of the float model as it is now; tied ones once.
        weights: number of distinct weights in the layers whose schemes are chosen.
    """

    fixed: int
    floats: int
    weights: int


def ledger_of(model: nn.Module, names: Iterable[str], plans: Sequence[Plan]) -> Ledger:
    """The ledger of a model; it may be on the meta device.

    Args:
        model: the float model.
        names: the layers whose schemes are chosen.
        plans: at least one; the file's header holds of each layer what one of them says.
    """
    chosen = set(names)
    modules = {c.name: c.module for c in candidates(model) if c.name in chosen}
    mine = [module._parameters["weight"] for module in modules.values()]
    holders: dict[int, int] = {}
    sizes: dict[int | str, int] = {}
    for _, parameter in model.named_parameters(remove_duplicate=False):
        holders[id(parameter)] = holders.get(id(parameter), 0) + 1
    named = {n: t for n, t in model.state_dict(keep_vars=True).items() if isinstance(t, torch.Tensor)}
    for name, tensor in named.items():
        sizes[id(tensor) if id(tensor) in holders else name] = tensor.numel() * tensor.element_size()
    moving = {id(weight): weight for weight in mine if weight is not None}
    held_by_me = {key: sum(other is weight for other in mine) for key, weight in moving.items()}
    leaving = {key for key, count in held_by_me.items() if count == holders.get(key)}
    floats, gone = sum(sizes.values()), sum(sizes.get(key, 0) for key in leaving)
    header = _header_bytes(plans, {name: tensor for name, tensor in named.items() if id(tensor) not in leaving})
    return Ledger(floats - gone + header, floats, sum(weight.numel() for weight in moving.values()))


def _header_bytes(plans: Sequence[Plan], tensors: Mapping[str, torch.Tensor]) -> int:
    """An upper bound for the header: of each layer the longest that any plan makes of it, in JSON within JSON."""
    layers: dict[str, int] = {}
    for layer in (layer for plan in plans for layer in plan):
        layers[layer.name] = max(layers.get(layer.name, 0), _layer_header(layer))
    frame = _escaped({"version": 1, "entries": {}, "ties": {}, "plan": [], "model": plans[0].model, "proof": []})
    stay = sum(_tensor_header(name, tuple(tensor.shape)) for name, tensor in tensors.items())
    ties = sum(2 * (len(name) + 6) for name in tensors)
    return frame + _CHECKSUMS + sum(layers.values()) + stay + ties + _ALIGNMENT


def _layer_header(layer: LayerPlan) -> int:
    """What the header holds of one layer: its plan (under a rule of its own), its proof, its entry, its parts."""
    scheme, name = str(layer.scheme), f"{layer.name}.weight"
    [plan] = Plan((replace(layer, rule=exactly(layer.name)),)).to_list()
    if layer.scheme is None:
        return _escaped(plan)
    number = 1.2345678901234567e-05  # as long as a float is written
    proof = {
        "name": layer.name, "scheme": scheme, "kernel": layer.kernel, "weight_difference": number,
        "output_error": number, "tolerance": number, "inputs": "random",
    }  # fmt: skip
    entry = {name: {"scheme": scheme, "shape": list(layer.shape), "dtype": "bfloat16", "transposed": False,
                    "usage": "embedding"}}  # fmt: skip
    parts = sum(_tensor_header(f"{name}.{part}", layer.shape) for part in _parts(layer.scheme))
    return _escaped(plan) + _escaped(proof) + _escaped(entry) + parts


def _parts(scheme: Scheme) -> list[str]:
    if scheme.is_float:
        return [""]
    zero_point, activation_scale = ["zero_point"] * (not scheme.symmetric), ["activation_scale"] * scheme.static
    return ["q", "scale", *zero_point, *activation_scale]


def _tensor_header(name: str, shape: tuple[int, ...]) -> int:
    """Of one tensor, as safetensors writes it."""
    offset = 10**11
    return len(json.dumps({name: {"dtype": "BF16", "shape": list(shape), "data_offsets": [offset, offset]}}))


def _escaped(value: object) -> int:
    return len(json.dumps(json.dumps(value)))
