"""A transformers directory in compressed-tensors' format, which vLLM and transformers load.

``config.json`` has what compressed-tensors itself writes there: groups of layers with their scheme, and the layers that
stay float. Tensors are laid out by :mod:`~qat_plugin.exporting.compressed_layout` and written one layer at a time.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Final

import torch

from qat_plugin.errors import ConfigError, ExportError
from qat_plugin.exporting.compressed_layout import PACKED, format_of, group_of, tensors_of
from qat_plugin.exporting.contents import Exportable, Layer
from qat_plugin.exporting.directory import (
    check_transformers,
    float_dtype,
    float_layers,
    float_parts,
    in_order,
    write_directory,
)
from qat_plugin.exporting.elsewhere import Elsewhere
from qat_plugin.exporting.formats import Told
from qat_plugin.exporting.refusal import Refusal
from qat_plugin.exporting.sharded import DEFAULT_SHARD_SIZE, Part, bytes_of, write_shards
from qat_plugin.exporting.verification import Comparison, Verification, relative_difference
from qat_plugin.scheme import Scheme

_ROUNDING: Final = {torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 5e-2}
_ACTIVATIONS: Final = 0.1
_FUSED: Final = ("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj")
_CHOICES: Final = ("warn", "refuse")
_VLLM_GROUPS: Final = (None, 32, 64, 128)


@dataclass(frozen=True)
class Options:
    """What can be set."""

    shard_size: str = field(
        default=DEFAULT_SHARD_SIZE,
        metadata={"help": "bytes of one safetensors file at most ('5GB'); transformers' own default"},
    )
    fused: str = field(
        default="warn",
        metadata={
            "help": "what vLLM computes as one layer (q, k and v; gate and up) has several schemes: 'warn' writes it, "
            "for transformers, and says so; 'refuse' writes nothing"
        },
    )

    def __post_init__(self) -> None:
        bytes_of(self.shard_size)
        if self.fused not in _CHOICES:
            raise ConfigError(f"fused={self.fused!r} is not allowed: {' or '.join(map(repr, _CHOICES))}")


def refusals(model: Exportable, options: Options) -> list[Refusal]:
    """What the format has no place for."""
    check_transformers(model, "compressed-tensors' format")
    found = []
    alone = len({layer.scheme for layer in model.layers.values()}) == 1
    for layer in model.layers.values():
        reason, nearest = _refusal(layer, alone)
        if reason:
            found.append(Refusal(layer.name, str(layer.scheme), reason, nearest))
    if options.fused == "refuse" and not found:
        for names in _unequal(model):
            for name in names:
                reason = "vLLM computes " + ", ".join(_last(name) for name in names) + " of one block as one layer"
                scheme = model.layers.get(f"{name}.weight")
                spelling = "float" if scheme is None else str(scheme.scheme)
                found.append(Refusal(name, spelling, reason, _commonest(model, names)))
    return found


def _refusal(layer: Layer, alone: bool) -> tuple[str, str]:
    weight, scheme = layer.weight, layer.scheme
    if weight.usage in ("embedding", "both"):
        return "vLLM and transformers take embeddings (and heads tied to them) as floats", "fp16"
    if weight.usage == "conv":
        return "linear layers are held, convolutions are not", ""
    if weight.transposed:
        return "its weight is [in, out] (transformers' Conv1D), and only nn.Linear is held", ""
    if weight.input_scale is not None:
        return "it divides its inputs by a scale of its own (AWQ or SmoothQuant), which has no place in the file", ""
    if scheme.symmetric or format_of(scheme) != PACKED:
        return "", ""
    if scheme.per_tensor:
        return "packed zero points are per channel or per group", str(scheme).replace("-tensor", "")
    if not alone:
        reason = "transformers loads packed zero points only where all quantized layers have the same scheme"
        return reason, str(replace(scheme, symmetric=True))
    return "", ""


def _last(name: str) -> str:
    return name.rpartition(".")[2]


def _unequal(model: Exportable) -> list[list[str]]:
    """Names of layers that vLLM fuses and that do not have one scheme."""
    groups: dict[tuple[str, int], list[str]] = {}
    for name, module in model.network.named_modules():
        for number, members in enumerate(_FUSED):
            if isinstance(module, torch.nn.Linear) and _last(name) in members:
                groups.setdefault((name.rpartition(".")[0], number), []).append(name)
    return [names for names in groups.values() if len({_scheme(model, name) for name in names}) > 1]


def _scheme(model: Exportable, name: str) -> Scheme | None:
    layer = model.layers.get(f"{name}.weight")
    return None if layer is None else layer.scheme


def _commonest(model: Exportable, names: list[str]) -> str:
    spellings = [str(scheme) for name in names if (scheme := _scheme(model, name)) is not None]
    return max(spellings, key=spellings.count)


def write(model: Exportable, path: Path, options: Options, progress: Told) -> None:
    """Fill the folder."""
    parts = float_parts(model) | {name: _part(layer) for name, layer in model.layers.items()}
    write_shards(path, list(in_order(model, parts).values()), {"format": "pt"}, options.shard_size, progress)
    write_directory(model, path, _configuration(model))


def _part(layer: Layer) -> Part:
    weight = layer.weight

    def tensors(held: Any) -> dict[str, torch.Tensor]:
        return tensors_of(layer.name, held, weight.logical_dtype, weight.activation_scale)

    planned = {name: tensor.to("meta") for name, tensor in tensors(layer.outline).items()}
    return Part(planned, lambda: tensors(layer.integers))


def _configuration(model: Exportable) -> Mapping[str, Any]:
    """As compressed-tensors itself dumps it, checked by its own classes."""
    import compressed_tensors
    from compressed_tensors.quantization import QuantizationConfig

    schemes: dict[Scheme, list[str]] = {}
    for layer in model.layers.values():
        schemes.setdefault(layer.scheme, []).append(layer.name)
    alone = len(schemes) == 1
    formats = {format_of(scheme) for scheme in schemes}
    config = QuantizationConfig.model_validate(
        {
            "config_groups": {
                f"group_{number}": group_of(scheme, ["Linear"] if alone else targets)
                for number, (scheme, targets) in enumerate(schemes.items())
            },
            "format": formats.pop() if len(formats) == 1 else "mixed-precision",
            "quantization_status": "compressed",
            "ignore": float_layers(model),
        }
    )
    dumped: dict[str, Any] = config.model_dump(mode="json")
    if _dequantized(model):
        dumped["dequantize"] = True
    return {"version": compressed_tensors.__version__, **dumped}


def _dequantized(model: Exportable) -> bool:
    """Whether transformers must dequantize while it loads: it has no place for packed zero points (0.20)."""
    schemes = {layer.scheme for layer in model.layers.values()}
    return any(not scheme.symmetric and format_of(scheme) == PACKED for scheme in schemes)


def verify(model: Exportable, path: Path, options: Options) -> Verification:
    """Let transformers load it, in an interpreter without this package; the format's library unpacks integers."""
    import compressed_tensors
    import transformers

    seen = Comparison()
    sample = model.sample
    with Elsewhere(path) as there:
        for name, layer in model.layers.items():
            kind, parts = there.parts(name)
            _compare(seen, name, layer, kind, parts)
        for name, tensor in model.floats():
            seen.plain(name, tensor, there.parts(name)[1][""])
        if isinstance(sample, tuple):
            sample = {"input_ids": sample[0]}
        error = relative_difference(there.logits(sample), model.outputs())
    tolerance, reason = _allowed(model)
    return seen.verification(
        f"transformers {transformers.__version__} with compressed-tensors {compressed_tensors.__version__}, without "
        "this package",
        error=error, tolerance=tolerance, reason=reason, notes=_notes(model),
    )  # fmt: skip


def _compare(seen: Comparison, name: str, layer: Layer, kind: str, parts: dict[str, torch.Tensor]) -> None:
    held = layer.integers
    if kind != format_of(held.scheme):
        raise ExportError(f"{name}: compressed-tensors reads it as {kind}, written was {format_of(held.scheme)}")
    lowest = 0 if held.scheme.symmetric else 1 << (held.scheme.weight_bits - 1)
    zero_point = parts.get("weight_zero_point")
    scale = parts["weight_scale"].reshape(held.scale.shape)
    if zero_point is not None:
        zero_point = zero_point.to(torch.int16).reshape(held.scale.shape) + lowest
    seen.quantized(name, held, parts["weight"].to(torch.int16) + lowest, scale, zero_point)
    if "dense" in parts and not torch.equal(parts["dense"], held.dequantize(parts["dense"].dtype)):
        raise ExportError(f"{name}: transformers' weight is not what its integers stand for")
    if layer.weight.activation_scale is not None:
        seen.plain(name, layer.weight.activation_scale.reshape(1).float(), parts["stored_input_scale"])


def _allowed(model: Exportable) -> tuple[float, str]:
    """How far outputs may lie apart, and why."""
    if any(layer.scheme.quantizes_activations for layer in model.layers.values()):
        return _ACTIVATIONS, "compressed-tensors rounds activations on another grid: absmax / 127.5, -128 to 127"
    return _ROUNDING[float_dtype(model)], "sums in another order"


def _notes(model: Exportable) -> tuple[str, ...]:
    """What vLLM would not take as it is."""
    notes = []
    if _dequantized(model):
        notes.append("transformers holds the weights as floats: compressed-tensors has no place for packed zero points")
    schemes = {layer.scheme for layer in model.layers.values()}
    if any(scheme.static for scheme in schemes) and float_dtype(model) != torch.float32:
        notes.append(f"transformers rounds activation scales to {_name(float_dtype(model))}; the file holds float32")
    unequal = _unequal(model)
    if unequal:
        first = ", ".join(unequal[0])
        more = f" and {len(unequal) - 1} more groups" if len(unequal) > 1 else ""
        notes.append(f"vLLM fuses {first}{more}, which have different schemes here; transformers loads it")
    odd = sorted(str(scheme) for scheme in schemes if not _in_vllm(scheme))
    if odd:
        notes.append(f"vLLM (not run here) may have no kernel for {', '.join(odd)}; transformers loads it")
    if any(re.search(r"(^|\.)lm_head$", layer.name) for layer in model.layers.values()):
        notes.append("vLLM (not run here) may take a float head only; transformers loads it")
    return tuple(notes)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _in_vllm(scheme: Scheme) -> bool:
    if scheme.quantizes_activations:
        return scheme.symmetric and (scheme.weight_bits, scheme.group_size) == (8, None)
    return scheme.weight_bits in (4, 8) and scheme.group_size in _VLLM_GROUPS


def usage(model: Exportable, path: Path, options: Options) -> str:
    """How it is loaded."""
    return (
        "from transformers import AutoModelForCausalLM  # with compressed-tensors installed; nothing of qat_plugin\n"
        f'model = AutoModelForCausalLM.from_pretrained("{path.name}")\n'
        f"# or: vllm serve {path.name}"
    )
