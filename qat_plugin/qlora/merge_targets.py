"""Which tensor of a base directory each adapter belongs to.

The tensors' names in the files, the modules' names in the model and the names that an adapter was trained under differ
by prefixes (GPT-2's files have no ``transformer.``, a network inside a LightningModule has one more). transformers' own
rules map the first to the second; one prefix, the same for all layers of an adapter, maps the third.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qat_plugin.errors import CheckpointError, did_you_mean
from qat_plugin.policy import PolicyLike
from qat_plugin.policy.roles import is_conv1d
from qat_plugin.qlora.adapter_file import AdapterFile, read_adapter
from qat_plugin.qlora.architecture import empty_model
from qat_plugin.qlora.contents import Contents
from qat_plugin.qlora.prepare import base_plan
from qat_plugin.qlora.source import shards, some
from qat_plugin.qlora.updates import Update
from qat_plugin.scheme import Scheme

# starts of an adapter that change the base itself, so that B A belongs to another weight than the files'
_CHANGE_THE_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")


@dataclass(frozen=True)
class Target:
    """A tensor that merging changes.

    Attributes:
        layer: the layer's name in the model that the directory holds.
        update: its adapter; ``None`` for a layer that was only quantized in training.
        scheme: what it was in training, when that is to be kept (NF4, or a float type); else ``None``.
        transposed: whether the file stores it as [in, out].
        sum: content sum of the weight in training, in the type that it had then; empty where it is not known.
    """

    layer: str
    update: Update | None
    scheme: Scheme | None
    transposed: bool
    sum: str = ""


def find_targets(
    base: Path, adapter: AdapterFile, *, trained_base: bool, scheme: PolicyLike | None
) -> dict[str, Target]:
    """Tensor name in the files -> what to do with it.

    Args:
        base: a transformers directory.
        adapter: as read.
        trained_base: keep what training quantized: its NF4 values are the base, of layers without an adapter too.
        scheme: policy of the base in training; by default what the adapter's files say, else ``"nf4-dq"``.

    Raises:
        CheckpointError: when the directory is damaged or is no causal language model, when it lacks a target, a target
            has another shape or is tied, or the adapter started from a changed base.
    """
    start = str(adapter.config.get("init_lora_weights")).lower()
    if start.startswith(_CHANGE_THE_BASE):
        raise CheckpointError(
            f"{adapter.folder}: init_lora_weights={start!r} changes the base weights before training, so that the "
            f"adapter does not belong to the weights in {base}: merge it in memory, with the model that was trained"
        )
    model = empty_model(base, torch.float32)
    contents = Contents(model, base)
    stored = {own: name for name, own in contents.names.model.items()}
    layer_of = _prefixed(adapter, model, base)
    targets: dict[str, Target] = {}
    for name, update in adapter.updates.items():
        layer = layer_of(name)
        targets[_stored_name(layer, stored, model, base)] = Target(
            layer, update, None, is_conv1d(model.get_submodule(layer))
        )
    if trained_base:
        targets |= _quantized_in_training(model, adapter, scheme, stored, targets, layer_of)
    _check_shapes(base, model, targets)
    sums = {layer_of(str(name)): str(total) for name, total in (adapter.base.get("weights") or {}).items()}
    return {name: replace(target, sum=sums.get(target.layer, "")) for name, target in targets.items()}


def updated_weights(
    base: Path, adapter: AdapterFile | Path, *, layers: int | None = None
) -> Iterator[tuple[str, Tensor, Update]]:
    """(layer, original weight [out, in], adapter) of each target, one at a time, for tables of survival.

    Args:
        base: a transformers directory.
        adapter: its folder, or the folder as read.
        layers: at most so many, evenly spread over the model.

    Raises:
        CheckpointError: as :func:`find_targets`.
    """
    from safetensors import safe_open

    file = adapter if isinstance(adapter, AdapterFile) else read_adapter(adapter)
    targets = find_targets(base, file, trained_base=False, scheme=None)
    chosen = set(_spread(list(targets), layers))
    for shard in shards(base):
        with safe_open(shard, framework="pt") as opened:
            for name in opened.offset_keys():
                if name in chosen and (target := targets[name]).update is not None:
                    weight = opened.get_tensor(name)
                    yield target.layer, weight.t().contiguous() if target.transposed else weight, target.update


def _spread(names: Sequence[str], count: int | None) -> Sequence[str]:
    if count is None or count >= len(names):
        return names
    return [names[round(i * (len(names) - 1) / max(count - 1, 1))] for i in range(count)]


def _prefixed(adapter: AdapterFile, model: Any, base: Path) -> Any:
    """Name in the adapter -> name in the model, by the one prefix that has to be taken off or put before."""
    modules = {name for name, _ in model.named_modules()}
    names = list(adapter.updates)
    parts = names[0].split(".")
    takes = [".".join(parts[:i]) + "." for i in range(1, len(parts))]
    adds = sorted({name[: -len(names[0])] for name in modules if name.endswith(f".{names[0]}")}, key=len)
    rules = [("", ""), *((take, "") for take in takes), *(("", add) for add in adds)]

    def renamed(name: str, rule: tuple[str, str]) -> str:
        return rule[1] + name.removeprefix(rule[0])

    for rule in rules:
        if all(name.startswith(rule[0]) and renamed(name, rule) in modules for name in names):
            return lambda name: renamed(name, rule)
    best = max(rules, key=lambda rule: sum(renamed(name, rule) in modules for name in names))
    absent = [name for name in names if renamed(name, best) not in modules]
    raise CheckpointError(
        f"the adapter in {adapter.folder} has {len(absent)} target{'s' * (len(absent) != 1)} that the "
        f"{type(model).__name__} in {base} lacks: {some(absent)}."
        f"{did_you_mean(absent[0], modules)} It was trained on another model"
    )


def _stored_name(layer: str, stored: dict[str, str], model: Any, base: Path) -> str:
    parameter = f"{layer}.weight"
    tied = model.all_tied_weights_keys
    if parameter in tied or parameter in tied.values():
        raise CheckpointError(
            f"the adapter targets {layer}, whose weight is tied to another layer's in {base}: both would change. "
            "Merge in memory (qat_plugin.qlora.merge), which unties them"
        )
    if parameter not in stored:
        raise CheckpointError(
            f"the shards in {base} lack {parameter}, which the adapter targets.{did_you_mean(parameter, stored)} "
            "Merge in memory (qat_plugin.qlora.merge) when transformers makes it of other tensors"
        )
    return stored[parameter]


def _quantized_in_training(
    model: Any, adapter: AdapterFile, scheme: PolicyLike | None, stored: dict[str, str],
    targets: dict[str, Target], layer_of: Any,
) -> dict[str, Target]:  # fmt: skip
    """Targets with the scheme that they had in training, and the layers that had one but no adapter."""
    if scheme is None and adapter.plan:
        schemes = {layer_of(str(layer["name"])): layer["scheme"] for layer in adapter.plan}
    else:
        plan = base_plan(model, "nf4-dq" if scheme is None else scheme)
        schemes = {layer.name: layer.scheme for layer in plan}
    found: dict[str, Target] = {}
    for layer, spelling in schemes.items():
        name = stored.get(f"{layer}.weight")
        if spelling is None or name is None or Scheme.parse(spelling).is_integer:
            continue
        update = targets[name].update if name in targets else None
        found[name] = Target(layer, update, Scheme.parse(spelling), is_conv1d(model.get_submodule(layer)))
    return found


def _check_shapes(base: Path, model: Any, targets: dict[str, Target]) -> None:
    for target in targets.values():
        shape = tuple(model.get_submodule(target.layer).weight.shape)
        own = shape[::-1] if target.transposed else shape
        if target.update is not None and own != target.update.shape:
            raise CheckpointError(
                f"the adapter of {target.layer} is for a weight {list(target.update.shape)}, {base} has {list(own)}: "
                "it was trained on another model"
            )
