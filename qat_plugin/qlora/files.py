"""Adapters to disk and back into a model: the files that peft, transformers and vLLM read.

:mod:`qat_plugin.qlora.adapter_file` says what is in them. ``modules_to_save`` is never written: vLLM refuses it.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from qat_plugin.errors import CheckpointError, ConfigError, did_you_mean
from qat_plugin.policy import clean_name
from qat_plugin.qlora.adapter_file import (
    CONFIG,
    FORMAT_VERSION,
    MORE_THAN_LORA,
    PARTS,
    PREFIX,
    SIDECAR,
    WEIGHTS,
    AdapterFile,
    digest,
    read_adapter,
)
from qat_plugin.qlora.identity import base_fingerprint
from qat_plugin.qlora.layers import ADAPTER
from qat_plugin.qlora.prepare import prepared_of
from qat_plugin.qlora.source import some
from qat_plugin.qlora.updates import Update, adapter_layers, adapter_root, unwrapped_name, update_of

__all__ = ["AdapterFile", "load_adapter", "read_adapter", "save_adapter"]


def save_adapter(
    model: nn.Module, folder: str | os.PathLike[str], *, base: str | os.PathLike[str] | None = None
) -> Path:
    """Write the adapters of a model, so that ``PeftModel.from_pretrained(base_model, folder)`` loads them.

    The files are replaced together once all are written.

    Args:
        model: prepared, or with adapters that peft injected under the name "default"; a LightningModule or a wrapper
            around it. Names in the files are relative to the network that was prepared.
        folder: created when missing; other files in it are left alone.
        base: path or hub name of the base, for the files; by default what the model was loaded from.

    Returns:
        The folder.

    Raises:
        ConfigError: when there is no adapter, or one that these files cannot hold.
        CheckpointError: when the folder cannot be written.
    """
    from safetensors import SafetensorError

    root, target = adapter_root(model), Path(folder)
    layers = adapter_layers(root)
    tensors: dict[str, Tensor] = {}
    for name, layer in layers.items():
        update = update_of(layer)
        update.check_finite(name)
        tensors |= {key: part.to("cpu").contiguous() for key, part in _named(name, update).items()}
    record = _base_of(root)
    if base is not None:
        record["path"] = os.fspath(base)
    plan = _plan_of(root)
    config = _config_for(root, layers, record.get("path"), plan)
    sidecar = {"version": FORMAT_VERSION, "base": record, "plan": plan, "sha256": digest(tensors)}
    texts = {CONFIG: json.dumps(config, indent=2, sort_keys=True), SIDECAR: json.dumps(sidecar, indent=1)}
    try:
        _write(target, tensors, texts)
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or error
        raise CheckpointError(f"cannot save the adapter in {target}: {reason}") from error
    return target


def load_adapter(model: nn.Module, folder: str | os.PathLike[str]) -> nn.Module:
    """Fill the adapters of a prepared model from a folder, in place; nothing is changed when something does not fit.

    Args:
        model: prepared with the options that the adapter was trained with.
        folder: written by :func:`save_adapter` or by peft.

    Returns:
        ``model``.

    Raises:
        ConfigError: when the model has no adapters.
        CheckpointError: when the files are damaged, or belong to another model, rank, scaling or base.
    """
    root = adapter_root(model)
    layers, file = adapter_layers(root), read_adapter(folder)
    own = {name: update_of(layer) for name, layer in layers.items()}
    _check_base(file, _base_of(root))
    _check_keys(file, own)
    for name, update in own.items():
        _check_fits(name, update, file)
    with torch.no_grad():
        for name, update in own.items():
            for part in PARTS:
                if (target := getattr(update, part)) is not None:
                    target.copy_(getattr(file.updates[name], part))
    return model


def _named(name: str, update: Update) -> dict[str, Tensor]:
    parts = {part: getattr(update, part) for part in PARTS}
    return {f"{PREFIX}{name}.{PARTS[part]}": value for part, value in parts.items() if value is not None}


def _config_for(
    root: nn.Module, layers: Mapping[str, Any], base: str | None, plan: list[dict[str, Any]]
) -> dict[str, Any]:
    """peft's own configuration of the model, with targets that match exactly the layers that have adapters."""
    if not hasattr(root, "peft_config"):
        raise ConfigError(
            f"this {type(root).__name__} is a part of the network that was prepared, and names in adapter files are "
            "relative to the whole: pass what qlora.prepare was given, or the LightningModule that was trained"
        )
    config: dict[str, Any] = root.peft_config[ADAPTER].to_dict()  # type: ignore[union-attr, index]
    if beyond := [name for name in MORE_THAN_LORA if config.get(name)] + (
        ["bias"] if config.get("bias", "none") != "none" else []
    ):
        raise ConfigError(
            f"the adapter uses {', '.join(beyond)} of peft's LoraConfig, which adapter files of this package do not "
            "hold (nor does vLLM take modules_to_save): train adapters on linear layers alone"
        )
    conv1d = {entry["name"] for entry in plan if entry["type"] == "Conv1D"}
    name = base or config["base_model_name_or_path"] or root.__dict__.get("name_or_path")
    if config["task_type"] is None:  # as PeftModel.save_pretrained does
        config["auto_mapping"] = {"base_model_class": type(root).__name__, "parent_library": type(root).__module__}
    config |= {
        "inference_mode": True,
        "target_modules": _exact_targets(root, layers),
        "exclude_modules": None,
        "layers_to_transform": None,
        "layers_pattern": None,
        "fan_in_fan_out": bool(config["fan_in_fan_out"]) or any(clean_name(name) in conv1d for name in layers),
        "base_model_name_or_path": name or None,
    }
    return {name: sorted(value) if isinstance(value, set) else value for name, value in config.items()}


def _exact_targets(root: nn.Module, layers: Mapping[str, Any]) -> list[str] | str:
    """``target_modules`` by which peft finds these layers and no other: last names, full names, or an expression.

    peft takes a module for a target when its name is one of the list or ends in "." and one of the list.
    """
    names = sorted(layers)
    inside = {id(module) for layer in layers.values() for module in layer.modules()}
    others = [unwrapped_name(root, path) for path, module in root.named_modules() if id(module) not in inside]
    for targets in (sorted({name.rpartition(".")[2] for name in names}), names):
        if not any(other in targets or other.endswith(tuple(f".{t}" for t in targets)) for other in others):
            return targets
    return "|".join(re.escape(name) for name in names)  # peft's full match


def _base_of(root: nn.Module) -> dict[str, Any]:
    """What is known of the base, plain values; nothing when :func:`~qat_plugin.qlora.prepare` did not make it."""
    if "_qlora" not in root.__dict__:
        return {}
    prepared = prepared_of(root)
    known: dict[str, Any] = dict(prepared.source) if prepared.base is None else prepared.base.to_dict()
    known.pop("plan", None)  # the model's own plan is written beside it
    return known | {"fingerprint": base_fingerprint(root)}


def _plan_of(root: nn.Module) -> list[dict[str, Any]]:
    return prepared_of(root).plan.to_list() if "_qlora" in root.__dict__ else []


def _write(folder: Path, tensors: dict[str, Tensor], texts: Mapping[str, str]) -> None:
    """All files beside their places first, then into them: a kill while writing leaves the old adapter."""
    from safetensors.torch import save_file

    temporaries = {name: folder / f".{name}.{os.getpid()}.tmp" for name in (WEIGHTS, *texts)}
    try:
        folder.mkdir(parents=True, exist_ok=True)
        save_file(tensors, temporaries[WEIGHTS], metadata={"format": "pt"})
        for name, text in texts.items():
            temporaries[name].write_text(text + "\n", encoding="utf-8")
        for name, temporary in temporaries.items():
            os.replace(temporary, folder / name)
    finally:
        for temporary in temporaries.values():
            temporary.unlink(missing_ok=True)


def _check_base(file: AdapterFile, own: Mapping[str, Any]) -> None:
    theirs, ours = file.base.get("fingerprint"), own.get("fingerprint")
    if theirs and ours and theirs != ours:
        raise CheckpointError(
            f"the adapter was trained on another base: {file.folder} says {file.base.get('path') or 'a base'} with "
            f"fingerprint {theirs[:12]}, and this model is {own.get('path') or 'one'} with {ours[:12]}"
        )


def _check_keys(file: AdapterFile, own: Iterable[str]) -> None:
    names = set(own)
    if unknown := sorted(file.updates.keys() - names):
        raise CheckpointError(
            f"{file.folder} has adapters for {len(unknown)} layers that have none in this model: {some(unknown)}."
            f"{did_you_mean(unknown[0], names)} Prepare with the same targets"
        )
    if missing := sorted(names - file.updates.keys()):
        raise CheckpointError(
            f"{file.folder} lacks the adapters of {len(missing)} layers of this model: {some(missing)}. Prepare with "
            "the same targets"
        )


def _check_fits(name: str, own: Update, file: AdapterFile) -> None:
    theirs = file.updates[name]
    if (own.shape, own.a.shape) != (theirs.shape, theirs.a.shape):
        raise CheckpointError(
            f"{file.folder}: the adapter of {name} is for a weight {list(theirs.shape)} with rank {theirs.a.shape[0]}; "
            f"the model has {list(own.shape)} with rank {own.a.shape[0]}"
        )
    if (own.magnitude is None) != (theirs.magnitude is None):
        has = theirs.magnitude is not None
        raise CheckpointError(
            f"{file.folder}: the adapter of {name} is {'DoRA' if has else 'LoRA'} and the model's is "
            f"{'LoRA' if has else 'DoRA'}: prepare with dora={has}"
        )
    if abs(own.scaling - theirs.scaling) > 1e-6 * abs(own.scaling):
        raise CheckpointError(
            f"{file.folder}: the adapter of {name} is scaled by {theirs.scaling:g} and the model's by {own.scaling:g}: "
            "prepare with the same alpha, rank and rslora"
        )
