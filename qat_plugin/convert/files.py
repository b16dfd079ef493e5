"""Converted models on disk: one safetensors file, no pickle, read back to the same integers.

An integer weight ``X`` is stored as ``X.q`` (rows packed to their bits), ``X.scale`` (bf16, exact), and where it has
them
``X.zero_point`` (uint8) and ``X.activation_scale`` (float32): portable rows, whatever layout the kernel here uses. The
header's ``qat_plugin`` entry holds, as JSON, the scheme, shape, type, orientation and use of each, which names are
tied, the plan and the proof. ``plan.json`` beside it repeats the plan for readers.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from qat_plugin.convert.convert import Conversion, conversion_of, is_converted
from qat_plugin.convert.proof import Proof
from qat_plugin.errors import CheckpointError, ConversionError, did_you_mean
from qat_plugin.kernels.packing import pack, packed_columns, unpack
from qat_plugin.kernels.portable import SCALE_DTYPE
from qat_plugin.kernels.weight import CastWeight, QuantizedWeight
from qat_plugin.numerics import Quantized
from qat_plugin.policy import Plan
from qat_plugin.scheme import Scheme

FORMAT_VERSION = 1
WEIGHTS, PLAN = "model.safetensors", "plan.json"
_DTYPES = {str(t).removeprefix("torch."): t for t in (torch.float32, torch.bfloat16, torch.float16, torch.float64)}


def save_converted(model: nn.Module, directory: str | os.PathLike[str]) -> Path:
    """Save a converted model, atomically: a killed save leaves the old file or none.

    Args:
        model: converted.
        directory: created when missing; ``model.safetensors`` and ``plan.json`` in it are replaced.

    Returns:
        The directory.

    Raises:
        ConversionError: when the model is not converted.
        CheckpointError: when the directory cannot be written.
    """
    from safetensors.torch import save_file

    conversion, folder = conversion_of(model), Path(directory)
    tensors, header = _flatten(model)
    header |= {"plan": conversion.plan.to_list(), "model": conversion.plan.model, "proof": conversion.proof.to_list()}
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with _replacing(folder / WEIGHTS) as temporary:
            save_file(tensors, temporary, metadata={"format": "pt", "qat_plugin": json.dumps(header)})
        with _replacing(folder / PLAN) as temporary:
            Path(temporary).write_text(json.dumps(header["plan"], indent=1) + "\n", encoding="utf-8")
    except OSError as error:
        raise CheckpointError(f"cannot save the converted model in {folder}: {error.strerror or error}") from error
    return folder


class _replacing:
    """A temporary file beside ``target`` that takes its place when the block ends well, and vanishes otherwise."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __enter__(self) -> str:
        handle, self.temporary = tempfile.mkstemp(dir=self.target.parent, prefix=f".{self.target.name}.")
        os.close(handle)
        return self.temporary

    def __exit__(self, failure: Any, *_: Any) -> None:
        if failure is None:
            os.chmod(self.temporary, 0o666 & ~_umask())
            os.replace(self.temporary, self.target)
        elif os.path.exists(self.temporary):
            os.unlink(self.temporary)


def _umask() -> int:
    current = os.umask(0)
    os.umask(current)
    return current


def _flatten(model: nn.Module) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Plain tensors by name, and what it takes to put the model together again."""
    tensors: dict[str, Tensor] = {}
    entries: dict[str, dict[str, Any]] = {}
    ties: dict[str, str] = {}
    first: dict[int, str] = {id(p): n for n, p in reversed(list(model.named_parameters(remove_duplicate=False)))}
    parameters = dict(model.named_parameters(remove_duplicate=False))
    for name, tensor in model.state_dict(keep_vars=True).items():
        leader = first.get(id(parameters.get(name)), name)
        if leader != name:
            ties[name] = leader
        elif isinstance(tensor, QuantizedWeight):
            entries[name] = _entry(tensor)
            tensors |= {f"{name}.{part}": value for part, value in _parts(tensor).items()}
        elif isinstance(tensor, CastWeight):
            entries[name] = {"cast": _name_of(tensor.logical_dtype)}
            tensors[name] = tensor.data_.detach().cpu().contiguous()
        else:
            tensors[name] = tensor.detach().cpu().clone().contiguous()
    return tensors, {"version": FORMAT_VERSION, "entries": entries, "ties": ties}


def _name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _entry(weight: QuantizedWeight) -> dict[str, Any]:
    return {
        "scheme": weight.spelling,
        "shape": [weight.out_features, weight.in_features],
        "dtype": _name_of(weight.logical_dtype),
        "transposed": weight.transposed,
        "usage": weight.usage,
    }


def _parts(weight: QuantizedWeight) -> dict[str, Tensor]:
    integers = weight.integers()
    parts = {
        "q": pack(integers.q, integers.scheme.weight_bits),
        "scale": integers.scale.to(SCALE_DTYPE),
        "zero_point": integers.zero_point,
        "activation_scale": weight.activation_scale,
    }
    return {name: value.detach().cpu().clone().contiguous() for name, value in parts.items() if value is not None}


def load_converted(model: nn.Module, directory: str | os.PathLike[str]) -> nn.Module:
    """Load what :func:`save_converted` wrote into a float model of the same architecture, in place.

    Args:
        model: the float model; it may be on the meta device.
        directory: a folder that :func:`save_converted` wrote.

    Returns:
        ``model``, converted, on the CPU and in eval mode or not as it was.

    Raises:
        ConversionError: when the model is already converted.
        CheckpointError: when the file is missing, truncated, corrupt, or of another model; nothing is changed then.
    """
    if is_converted(model):
        raise ConversionError(f"{type(model).__name__} is already converted: load into a fresh float model")
    path = Path(directory) / WEIGHTS
    tensors, header = _read(path)
    try:
        weights = {name: _assemble(name, entry, tensors) for name, entry in header["entries"].items()}
        weights |= {
            name: tensor for name, tensor in tensors.items() if name not in weights and not _is_part(name, weights)
        }
        ties: dict[str, str] = dict(header["ties"])
        conversion = Conversion(Plan.from_list(header["plan"], header["model"]), Proof.from_list(header["proof"]))
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        raise CheckpointError(f"{path} is damaged: {error}") from error
    _check_fits(model, weights, ties, path)
    _install(model, weights, ties)
    model._qat_conversion = conversion  # type: ignore[assignment]
    return model


def _read(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    from safetensors import SafetensorError, safe_open

    if not path.is_file():
        raise CheckpointError(f"there is no converted model at {path}; save_converted(model, directory) writes one")
    try:
        with safe_open(path, framework="pt") as file:
            header = json.loads((file.metadata() or {}).get("qat_plugin", "null"))
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  (not a dict)
    except (SafetensorError, ValueError, OSError) as error:
        raise CheckpointError(f"{path} is truncated or corrupt ({error})") from error
    if not isinstance(header, dict):
        raise CheckpointError(f"{path} is a safetensors file, but not a converted model of this package")
    if header.get("version") != FORMAT_VERSION:
        raise CheckpointError(f"{path} has format {header.get('version')!r}; this package reads {FORMAT_VERSION}")
    return tensors, header


def _is_part(name: str, weights: Mapping[str, Tensor]) -> bool:
    stem, _, part = name.rpartition(".")
    return part in ("q", "scale", "zero_point", "activation_scale") and stem in weights


def _assemble(name: str, entry: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Tensor:
    if "cast" in entry:
        return CastWeight(tensors[name], _DTYPES[entry["cast"]])
    scheme = Scheme.parse(entry["scheme"])
    rows, columns = (int(size) for size in entry["shape"])
    packed, scale = tensors[f"{name}.q"], tensors[f"{name}.scale"].float()
    if packed.shape != (rows, packed_columns(columns, scheme.weight_bits)):
        raise ValueError(f"{name}.q has shape {tuple(packed.shape)}, not that of {rows} x {columns} {scheme} weights")
    groups = (1, 1) if scheme.per_tensor else (rows, columns // (scheme.group_size or columns))
    if scale.shape != groups:
        raise ValueError(f"{name}.scale has shape {tuple(scale.shape)}, not {groups}")
    q = unpack(packed, scheme.weight_bits, columns, signed=scheme.symmetric)
    return QuantizedWeight.from_integers(
        Quantized(q, scale, tensors.get(f"{name}.zero_point"), scheme),
        _DTYPES[entry["dtype"]],
        transposed=bool(entry["transposed"]),
        usage=entry["usage"],
        activation_scale=tensors.get(f"{name}.activation_scale"),
    )


def _check_fits(model: nn.Module, weights: Mapping[str, Tensor], ties: Mapping[str, str], path: Path) -> None:
    own = {name: tuple(tensor.shape) for name, tensor in model.state_dict(keep_vars=True).items()}
    names = weights.keys() | ties.keys()
    if missing := sorted(own.keys() - names):
        raise CheckpointError(f"{path} is another model's: it lacks {', '.join(missing[:5])} of {type(model).__name__}")
    if unknown := sorted(names - own.keys()):
        raise CheckpointError(
            f"{path} is another model's: {type(model).__name__} has no "
            f"{', '.join(unknown[:5])}.{did_you_mean(unknown[0], own)}"
        )
    for name, weight in weights.items():
        if tuple(weight.shape) != own[name]:
            raise CheckpointError(
                f"{path} is another model's: {name} has shape {tuple(weight.shape)} there, {own[name]} in "
                f"{type(model).__name__}"
            )


def _install(model: nn.Module, weights: Mapping[str, Tensor], ties: Mapping[str, str]) -> None:
    from qat_plugin.convert.reload import requantize_on_load

    made: dict[str, nn.Parameter] = {}
    for name in [*weights, *ties]:
        leader = ties.get(name, name)
        module_path, _, leaf = name.rpartition(".")
        module = model.get_submodule(module_path)
        if leaf in module._buffers:
            module._buffers[leaf] = weights[leader]
            continue
        if leader not in made:
            made[leader] = nn.Parameter(weights[leader], requires_grad=False)
        module._parameters[leaf] = made[leader]
        if isinstance(weights[leader], (QuantizedWeight, CastWeight)):
            module.register_load_state_dict_pre_hook(requantize_on_load)
