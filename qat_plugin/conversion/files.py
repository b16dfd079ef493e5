"""Converted models on disk: one safetensors file, no pickle, read back to the same integers.

An integer weight ``X`` is stored as ``X.q`` (rows packed to their bits), ``X.scale`` (exact: bf16, or fp16 or float32
where scales of files made elsewhere need it), and where it has them ``X.zero_point`` (uint8), ``X.activation_scale``
(float32) and ``X.input_scale`` (float32, one per input feature: inputs are divided by it, the integers are of the
weight times it): portable rows, whatever layout the kernel here uses.
The header's one entry, ``qat_plugin``, is the SHA-256 (64 hexadecimal digits) of the JSON that follows it: the scheme,
shape, type, orientation and use of each, which names are tied, which norms folded, the plan, the proof, and a SHA-256
of the tensors. One entry, because safetensors writes several in a random order: the same model gives the same bytes.
``plan.json`` beside it repeats the plan for readers.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from qat_plugin.atomic import replacing, write_text
from qat_plugin.conversion.absorb import absorb_norms
from qat_plugin.conversion.convert import Conversion, conversion_of, is_converted, remember, with_kernels
from qat_plugin.conversion.frozen import refuse_training
from qat_plugin.conversion.proof import Proof
from qat_plugin.conversion.reload import requantize_on_load
from qat_plugin.errors import CheckpointError, ConversionError, did_you_mean
from qat_plugin.kernels import ConvShape
from qat_plugin.kernels.packing import pack, packed_columns, unpack
from qat_plugin.kernels.scales import scale_dtype
from qat_plugin.kernels.weight import CastWeight, QuantizedWeight, is_converted_weight
from qat_plugin.numerics import Quantized
from qat_plugin.policy import Plan, clean_name
from qat_plugin.qat import is_prepared
from qat_plugin.qat.folding import fold_names, set_folds
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
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    conversion, folder = conversion_of(model), Path(directory)
    tensors, header = _flatten(model)
    header |= {"plan": conversion.plan.to_list(), "model": conversion.plan.model, "proof": conversion.proof.to_list()}
    text = json.dumps(header | {"sha256": _digest(tensors)})
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with replacing(folder / WEIGHTS) as temporary:
            save_file(tensors, temporary, metadata={"qat_plugin": _sha256(text) + text})
        write_text(folder / PLAN, json.dumps(header["plan"], indent=1) + "\n")
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or error
        raise CheckpointError(f"cannot save the converted model in {folder}: {reason}") from error
    return folder


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _digest(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 of names, types, shapes and bytes."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].contiguous()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)};".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


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
        elif not isinstance(tensor, Tensor):
            raise ConversionError(
                f"{name} of the model's state is a {type(tensor).__name__}: only tensors can be saved"
            )
        elif isinstance(tensor, QuantizedWeight):
            entries[name] = _entry(tensor)
            tensors |= {f"{name}.{part}": value for part, value in _parts(tensor).items()}
        elif isinstance(tensor, CastWeight):
            entries[name] = {"cast": _name_of(tensor.logical_dtype)}
            tensors[name] = tensor.data_.detach().cpu().contiguous()
        else:
            tensors[name] = tensor.detach().cpu().clone().contiguous()
    return tensors, {"version": FORMAT_VERSION, "entries": entries, "ties": ties, "folded": fold_names(model)}


def _name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _entry(weight: QuantizedWeight) -> dict[str, Any]:
    entry = {
        "scheme": weight.spelling,
        "shape": [weight.out_features, weight.in_features],
        "dtype": _name_of(weight.logical_dtype),
        "transposed": weight.transposed,
        "usage": weight.usage,
    }
    return entry if weight.conv is None else {**entry, "conv": [*weight.conv.weight], "groups": weight.conv.groups}


def _parts(weight: QuantizedWeight) -> dict[str, Tensor]:
    integers = weight.integers()
    parts = {
        "q": pack(integers.q, integers.scheme.weight_bits),
        "scale": integers.scale.to(scale_dtype(integers.scale)),
        "zero_point": integers.zero_point,
        "activation_scale": weight.activation_scale,
        "input_scale": weight.input_scale,
    }
    return {name: value.detach().cpu().clone().contiguous() for name, value in parts.items() if value is not None}


def load_converted(
    model: nn.Module, directory: str | os.PathLike[str], *, dtype: torch.dtype | None = None
) -> nn.Module:
    """Load what :func:`save_converted` wrote into a float model of the same architecture, in place.

    Args:
        model: the float model; it may be on the meta device.
        directory: a folder that :func:`save_converted` wrote.
        dtype: the float type to run in; by default that of the saved model. Integers and scales stay what they are.

    Returns:
        ``model``, converted, where it was (the CPU for the meta device) and in eval mode or not as it was.

    Raises:
        ConversionError: when the model is already converted, or prepared.
        CheckpointError: when the file is missing, truncated, corrupt, or of another model; nothing is changed then.
    """
    if is_converted(model):
        raise ConversionError(f"{type(model).__name__} is already converted: load into a fresh float model")
    if is_prepared(model):
        raise ConversionError(f"{type(model).__name__} is prepared for training: call unprepare(model) before loading")
    path = Path(directory) / WEIGHTS
    tensors, header = _read(path)
    try:
        weights = {name: _assemble(name, entry, tensors, dtype) for name, entry in header["entries"].items()}
        weights |= {
            name: tensor.to(dtype) if dtype is not None and tensor.is_floating_point() else tensor
            for name, tensor in tensors.items()
            if name not in weights and not _is_part(name, weights)
        }
        ties: dict[str, str] = dict(header["ties"])
        conversion = Conversion(Plan.from_list(header["plan"], header["model"]), Proof.from_list(header["proof"]))
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        raise CheckpointError(f"{path} is damaged: {error}") from error
    made = install_converted(model, weights, ties, conversion, path, folded=header.get("folded", []))
    if dtype is not None:
        layers = {clean_name(name): module for name, module in made.named_modules()}
        remember(made, Conversion(with_kernels(conversion.plan, layers), conversion.proof))
    return made


def install_converted(
    model: nn.Module,
    weights: Mapping[str, Tensor],
    ties: Mapping[str, str],
    conversion: Conversion,
    origin: Path,
    *,
    folded: Sequence[tuple[str, str]] = (),
) -> nn.Module:
    """Make a float model a converted one from tensors that were read.

    Args:
        model: float; it may be on the meta device.
        weights: a tensor for each name of the model's state, some of them converted weights.
        ties: name -> the name in ``weights`` whose parameter it shares.
        conversion: the plan they follow, and its proof.
        origin: where they were read, for messages.
        folded: BatchNorms that are folded into their layers, as :func:`~qat_plugin.qat.folding.fold_names` lists them.

    Raises:
        CheckpointError: when names or shapes are not the model's; nothing is changed then.
    """
    _check_fits(model, weights, ties, origin)
    _check_buffers(model, weights, origin)
    set_folds(model, folded)
    refuse_training(_install(model, weights, ties))
    absorb_norms(model)
    remember(model, conversion)
    return model


def _read(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    from safetensors import SafetensorError, safe_open

    if not path.is_file():
        raise CheckpointError(f"there is no converted model at {path}; save_converted(model, directory) writes one")
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            # clones are aligned as kernels need them; what the file maps is not, and changes when the file does
            tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118  (not a dict)
    except (SafetensorError, ValueError, OSError) as error:
        raise CheckpointError(f"{path} is truncated or corrupt ({error})") from error
    if "qat_plugin" not in metadata:
        raise CheckpointError(f"{path} is a safetensors file, but not a converted model of this package")
    checksum, text = metadata["qat_plugin"][:64], metadata["qat_plugin"][64:]
    if checksum != _sha256(text):
        raise CheckpointError(f"{path} is corrupt: its header does not match its checksum")
    header: dict[str, Any] = json.loads(text)
    if header.get("version") != FORMAT_VERSION:
        raise CheckpointError(f"{path} has format {header.get('version')!r}; this package reads {FORMAT_VERSION}")
    if header["sha256"] != _digest(tensors):
        raise CheckpointError(f"{path} is corrupt: its tensors do not match their checksum")
    return tensors, header


def _is_part(name: str, weights: Mapping[str, Tensor]) -> bool:
    stem, _, part = name.rpartition(".")
    return part in ("q", "scale", "zero_point", "activation_scale", "input_scale") and stem in weights


def _assemble(name: str, entry: Mapping[str, Any], tensors: Mapping[str, Tensor], dtype: torch.dtype | None) -> Tensor:
    if "cast" in entry:
        return CastWeight(tensors[name], dtype or _DTYPES[entry["cast"]])
    scheme = Scheme.parse(entry["scheme"])
    rows, columns = (int(size) for size in entry["shape"])
    packed, scale = tensors[f"{name}.q"], tensors[f"{name}.scale"].float()
    if packed.shape != (rows, packed_columns(columns, scheme.weight_bits)):
        raise ValueError(f"{name}.q has shape {tuple(packed.shape)}, not that of {rows} x {columns} {scheme} weights")
    groups = (1, 1) if scheme.per_tensor else (rows, columns // (scheme.group_size or columns))
    if scale.shape != groups:
        raise ValueError(f"{name}.scale has shape {tuple(scale.shape)}, not {groups}")
    input_scale = tensors.get(f"{name}.input_scale")
    if input_scale is not None and input_scale.shape != (columns,):
        raise ValueError(f"{name}.input_scale has shape {tuple(input_scale.shape)}, not {(columns,)}")
    q = unpack(packed, scheme.weight_bits, columns, signed=scheme.symmetric)
    return QuantizedWeight.from_integers(
        Quantized(q, scale, tensors.get(f"{name}.zero_point"), scheme),
        dtype or _DTYPES[entry["dtype"]],
        transposed=bool(entry["transposed"]),
        usage=entry["usage"],
        conv=ConvShape(tuple(map(int, entry["conv"])), int(entry["groups"])) if "conv" in entry else None,
        activation_scale=tensors.get(f"{name}.activation_scale"),
        input_scale=input_scale,
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


def _check_buffers(model: nn.Module, weights: Mapping[str, Tensor], path: Path) -> None:
    """Raise when a buffer that no state_dict holds would stay without storage."""
    lost = [name for name, buffer in model.named_buffers() if buffer.device.type == "meta" and name not in weights]
    if lost:
        raise CheckpointError(
            f"{path} does not hold {', '.join(lost[:5])}, which are non-persistent buffers on the meta device: build "
            "the model with real buffers and only its parameters on the meta device"
        )


def _install(model: nn.Module, weights: Mapping[str, Tensor], ties: Mapping[str, str]) -> nn.Module:
    """Put the weights in place; the first module that now holds a converted one."""
    made: dict[str, nn.Parameter] = {}
    for name in [*weights, *ties]:
        leader = ties.get(name, name)
        module_path, _, leaf = name.rpartition(".")
        module = model.get_submodule(module_path)
        if leaf in module._buffers:
            module._buffers[leaf] = _beside(module._buffers[leaf], weights[leader])
            continue
        if leader not in made:
            made[leader] = nn.Parameter(_beside(module._parameters[leaf], weights[leader]), requires_grad=False)
        module._parameters[leaf] = made[leader]
        if isinstance(weights[leader], (QuantizedWeight, CastWeight)):
            module.register_load_state_dict_pre_hook(requantize_on_load)
    return next(m for m in model.modules() if is_converted_weight(m._parameters.get("weight")))


def _beside(present: Tensor | None, loaded: Tensor) -> Tensor:
    """The loaded tensor on the device of the one it takes the place of."""
    return loaded if present is None or present.device.type == "meta" else loaded.to(present.device)
