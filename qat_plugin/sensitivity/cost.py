"""What a layer costs in the file of a converted model: packed rows, scales, zero points, padding, ties counted once."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final

import torch
from torch import nn

from qat_plugin.kernels.packing import packed_columns
from qat_plugin.policy import LayerPlan, Plan, candidates

_SCALE_BYTES: Final = 2  # bf16
_ZERO_POINT_BYTES: Final = 1
_STATIC_BYTES: Final = 4  # one float32 activation scale
_TENSOR_ENTRY: Final = 96  # of safetensors' own header, beside the tensor's name: type, shape, offsets
_PROOF_ENTRY: Final = 320  # of one layer's proof in the header, beside its name
_HEADER: Final = 1024  # checksums, the model's name, the frame of it all


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


def ledger_of(model: nn.Module, names: Iterable[str], plans: Iterable[Plan]) -> Ledger:
    """The ledger of a model; it may be on the meta device.

    Args:
        model: the float model.
        names: the layers whose schemes are chosen.
        plans: plans that the file's header may have to hold; the longest counts.
    """
    chosen = set(names)
    modules = {c.name: c.module for c in candidates(model) if c.name in chosen}
    mine = [module._parameters["weight"] for module in modules.values()]
    holders: dict[int, int] = {}
    sizes: dict[int | str, int] = {}
    for _, parameter in model.named_parameters(remove_duplicate=False):
        holders[id(parameter)] = holders.get(id(parameter), 0) + 1
    for name, tensor in model.state_dict(keep_vars=True).items():
        if isinstance(tensor, torch.Tensor):
            sizes[id(tensor) if id(tensor) in holders else name] = tensor.numel() * tensor.element_size()
    moving = {id(weight): weight for weight in mine if weight is not None}
    held_by_me = {key: sum(other is weight for other in mine) for key, weight in moving.items()}
    leaving = sum(sizes.get(key, 0) for key, count in held_by_me.items() if count == holders.get(key))
    floats = sum(sizes.values())
    header = max((_header_bytes(plan, len(sizes)) for plan in plans), default=0)
    return Ledger(floats - leaving + header, floats, sum(weight.numel() for weight in moving.values()))


def _header_bytes(plan: Plan, tensors: int) -> int:
    """An upper bound for the header: the plan, what puts each weight together again, and its proof."""
    text = len(json.dumps(json.dumps(plan.to_list())))  # the header is JSON within JSON
    parts = 4  # q, scale, zero_point, activation_scale
    each = sum(3 * len(layer.name) + _PROOF_ENTRY + parts * (len(layer.name) + _TENSOR_ENTRY) for layer in plan)
    longest = max((len(layer.name) for layer in plan), default=0)
    return _HEADER + text + each + tensors * (_TENSOR_ENTRY + longest)
