"""Adapter folders as read: peft's two files, checked against each other, and what this package wrote beside them.

::

    adapter_model.safetensors   base_model.model.<module>.lora_A.weight, .lora_B.weight, .lora_magnitude_vector (DoRA)
    adapter_config.json         peft's LoraConfig; target_modules names just the layers that have an adapter
    qat_adapter.json            format version; the base: path, fingerprint, sums of its files' tensors or of its
                                layers' weights; its plan; a SHA-256 of the adapter's tensors

An adapter that plain peft wrote has no third file and is read all the same.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor

from qat_plugin.errors import CheckpointError
from qat_plugin.policy import clean_name
from qat_plugin.qlora.updates import Update

FORMAT_VERSION: Final = 1
WEIGHTS: Final = "adapter_model.safetensors"
CONFIG: Final = "adapter_config.json"
SIDECAR: Final = "qat_adapter.json"
PREFIX: Final = "base_model.model."
PARTS: Final = {"a": "lora_A.weight", "b": "lora_B.weight", "magnitude": "lora_magnitude_vector"}
"""Field of :class:`Update` -> the end of its name in the file."""
MORE_THAN_LORA: Final = (
    "modules_to_save", "trainable_token_indices", "target_parameters", "layer_replication", "lora_bias", "use_qalora",
    "use_bdlora", "alora_invocation_tokens", "arrow_config", "kasa_config", "velora_config", "monteclora_config",
)  # fmt: skip
"""Fields of peft's LoraConfig that make an adapter more than ``W + s B A`` on linear layers."""


@dataclass(frozen=True)
class AdapterFile:
    """An adapter folder as read.

    Attributes:
        folder: where it was.
        config: ``adapter_config.json``.
        tensors: ``adapter_model.safetensors``, mapped from the file, by their names there.
        updates: the same, by the name of the layer in the model without adapters.
        base: what ``qat_adapter.json`` says of the base (``path``, ``fingerprint``, ``sums`` by file, ``weights``
            by layer); empty without the file.
        plan: the base's plan, one dict per layer; empty without the file.
    """

    folder: Path
    config: dict[str, Any]
    tensors: dict[str, Tensor]
    updates: dict[str, Update]
    base: dict[str, Any] = field(default_factory=dict)
    plan: tuple[dict[str, Any], ...] = ()

    @property
    def scheme(self) -> str:
        """What most layers with an adapter were in training ("nf4-dq"); "fp32" for float ones, empty without a plan."""
        schemes = {str(layer["name"]): layer["scheme"] or "fp32" for layer in self.plan}
        found = Counter(str(schemes[name]) for each in self.updates if (name := clean_name(each)) in schemes)
        return found.most_common(1)[0][0] if found else ""


def read_adapter(folder: str | os.PathLike[str]) -> AdapterFile:
    """Read and check an adapter folder; no model is needed.

    Args:
        folder: with ``adapter_config.json`` and ``adapter_model.safetensors``.

    Raises:
        CheckpointError: when a file is missing, truncated, not what its name says, or does not belong to the others;
            when the adapter is of a kind other than LoRA, rsLoRA and DoRA on linear layers.
    """
    path = Path(folder)
    if not path.is_dir():
        raise CheckpointError(f"there is no adapter folder {path} (looked for {path.absolute()})")
    config = _json(path / CONFIG)
    _check_config(path / CONFIG, config)
    tensors = _tensors(path / WEIGHTS)
    updates = _updates(path, config, tensors)
    if not (path / SIDECAR).is_file():
        return AdapterFile(path, config, tensors, updates)
    sidecar = _json(path / SIDECAR)
    if sidecar.get("version") != FORMAT_VERSION:
        raise CheckpointError(
            f"{path / SIDECAR} has format {sidecar.get('version')!r}; this package reads {FORMAT_VERSION}"
        )
    if sidecar.get("sha256") != digest(tensors):
        raise CheckpointError(
            f"{path / WEIGHTS} is not the file that {SIDECAR} was written with: it is corrupt, a save was interrupted, "
            f"or another program wrote a new adapter there. In the last case delete {SIDECAR}"
        )
    base, plan = sidecar.get("base") or {}, sidecar.get("plan") or ()
    return AdapterFile(path, config, tensors, updates, dict(base), tuple(plan))


def digest(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 of names, types, shapes and bytes."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].contiguous()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)};".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _json(file: Path) -> dict[str, Any]:
    if not file.is_file():
        beside = ", ".join(sorted(entry.name for entry in file.parent.iterdir())[:8]) or "nothing"
        raise CheckpointError(f"{file.parent} has no {file.name}, so it is no adapter folder; it holds {beside}")
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise CheckpointError(f"{file} is not valid JSON: {error}") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{file} holds a {type(content).__name__}, not an object")
    return content


def _check_config(file: Path, config: Mapping[str, Any]) -> None:
    if config.get("peft_type") != "LORA":
        raise CheckpointError(
            f"{file}: peft_type is {config.get('peft_type')!r}; only 'LORA' (rsLoRA and DoRA included) is supported"
        )
    if beyond := [name for name in MORE_THAN_LORA if config.get(name)]:
        raise CheckpointError(f"{file} uses {', '.join(beyond)}, which is more than LoRA on linear layers")
    if not isinstance(config.get("r"), int) or not isinstance(config.get("lora_alpha"), (int, float)):
        given = f"{config.get('r')!r} and {config.get('lora_alpha')!r}"
        raise CheckpointError(f"{file}: r and lora_alpha must be numbers, not {given}")
    for name in ("rank_pattern", "alpha_pattern"):
        if not isinstance(config.get(name) or {}, dict):
            raise CheckpointError(f"{file}: {name} must be an object, not {config[name]!r}")


def _tensors(file: Path) -> dict[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    if not file.is_file():
        pickled = " adapter_model.bin is a pickle and is not loaded." if file.with_suffix(".bin").is_file() else ""
        raise CheckpointError(f"{file.parent} has no {file.name}.{pickled}")
    try:
        tensors: dict[str, Tensor] = load_file(file)
    except (SafetensorError, OSError) as error:
        size = file.stat().st_size
        raise CheckpointError(f"{file} is truncated or corrupt ({error}; {size} bytes); copy it again") from error
    return tensors


def _updates(folder: Path, config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> dict[str, Update]:
    file = folder / WEIGHTS
    parts: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        part, suffix = next(((p, s) for p, s in PARTS.items() if key.endswith(f".{s}")), ("", ""))
        if not part or not key.startswith(PREFIX):
            raise CheckpointError(
                f"{file}: {key} is no part of LoRA on a linear layer; names are {PREFIX}<module>.<part>, parts "
                f"{', '.join(PARTS.values())}"
            )
        parts.setdefault(key[len(PREFIX) : -len(suffix) - 1], {})[part] = tensor
    if not parts:
        raise CheckpointError(f"{file} holds no tensors")
    return {name: _update(file, name, config, found) for name, found in sorted(parts.items())}


def _update(file: Path, name: str, config: Mapping[str, Any], parts: Mapping[str, Tensor]) -> Update:
    wanted = set(PARTS) if config.get("use_dora") else {"a", "b"}
    if parts.keys() != wanted:
        has, should = (", ".join(PARTS[part] for part in sorted(which)) for which in (parts.keys(), wanted))
        raise CheckpointError(
            f"{file}: {name} has {has}; with use_dora {bool(config.get('use_dora'))} in {CONFIG} it should be {should}"
        )
    a, b, magnitude = parts["a"], parts["b"], parts.get("magnitude")
    rank = _by_pattern(config.get("rank_pattern"), name, config["r"])
    if a.dim() != 2 or b.dim() != 2 or not a.shape[0] == b.shape[1] == rank:
        raise CheckpointError(
            f"{file}: {name} has lora_A {list(a.shape)} and lora_B {list(b.shape)}; {CONFIG} says rank {rank}, "
            "that is [rank, in] and [out, rank]"
        )
    if magnitude is not None and magnitude.shape != b.shape[:1]:
        raise CheckpointError(f"{file}: {name} has {list(magnitude.shape)} magnitudes for {b.shape[0]} rows")
    alpha = _by_pattern(config.get("alpha_pattern"), name, config["lora_alpha"])
    update = Update(a, b, alpha / (rank**0.5 if config.get("use_rslora") else rank), magnitude)
    update.check_finite(name)
    return update


def _by_pattern(patterns: Mapping[str, Any] | None, name: str, default: Any) -> Any:
    """peft's rule: the first expression that matches the end of the name from a dot on."""
    return next((v for p, v in (patterns or {}).items() if re.match(rf"(.*\.)?({p})$", name)), default)
