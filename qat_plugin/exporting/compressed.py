"""A transformers directory in compressed-tensors' format, which vLLM and transformers load.

``config.json`` has what compressed-tensors itself writes there: groups of layers with their scheme, and the layers that
stay float. Tensors are laid out by :mod:`~qat_plugin.exporting.compressed_layout` and written one layer at a time.
"""

from __future__ import annotations

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
    not_plain,
    write_directory,
)
from qat_plugin.exporting.elsewhere import compared_elsewhere, reader_with
from qat_plugin.exporting.formats import Told
from qat_plugin.exporting.refusal import Refusal
from qat_plugin.exporting.sharded import DEFAULT_SHARD_SIZE, Part, bytes_of, write_shards
from qat_plugin.exporting.verification import Comparison, Verification
from qat_plugin.exporting.vllm import fused_refusals, notes
from qat_plugin.kernels.weight import QuantizedWeight
from qat_plugin.scheme import Scheme

_CHOICES: Final = ("warn", "refuse")


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
        found = fused_refusals(model)
    return found


def _refusal(layer: Layer, alone: bool) -> tuple[str, str]:
    scheme = layer.scheme
    if layer.weight.usage in ("embedding", "both"):
        return "vLLM and transformers take embeddings (and heads tied to them) as floats", "fp16"
    if reason := not_plain(layer):
        return reason, ""
    if scheme.symmetric or format_of(scheme) != PACKED:
        return "", ""
    if scheme.per_tensor:
        return "packed zero points are per channel or per group", str(scheme).replace("-tensor", "")
    if not alone:
        reason = "transformers loads packed zero points only where all quantized layers have the same scheme"
        return reason, str(replace(scheme, symmetric=True))
    return "", ""


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

    grid = "compressed-tensors rounds activations on another grid (-128 to 127 by absmax / 127.5)"
    seen, agreed, told = compared_elsewhere(
        model, path, lambda layer: format_of(layer.scheme), _compare, _rounded_input, grid
    )
    return seen.verification(
        reader_with("compressed-tensors", compressed_tensors.__version__),
        error=agreed.error, tolerance=agreed.tolerance, reason=agreed.reason, notes=(*told, *_notes(model)),
    )  # fmt: skip


def _rounded_input(x: torch.Tensor, weight: QuantizedWeight) -> torch.Tensor:
    """The numbers that compressed-tensors makes of an activation [batch, tokens, features]."""
    from compressed_tensors.quantization import QuantizationArgs
    from compressed_tensors.quantization.lifecycle.forward import fake_quantize
    from compressed_tensors.quantization.utils import compute_dynamic_scales_and_zp

    fixed = weight.activation_scale
    if fixed is None:
        args = QuantizationArgs(num_bits=8, symmetric=True, strategy="token", dynamic=True)
        scale, zero_point = compute_dynamic_scales_and_zp(x, args, torch.nn.Identity())
    else:
        args = QuantizationArgs(num_bits=8, symmetric=True, strategy="tensor")
        scale, zero_point = fixed.reshape(1).to(x), torch.zeros(1, dtype=torch.int8, device=x.device)
    numbers: torch.Tensor = fake_quantize(x, scale, zero_point, args)
    return numbers


def _compare(seen: Comparison, name: str, layer: Layer, parts: dict[str, torch.Tensor]) -> None:
    held = layer.integers
    lowest = 0 if held.scheme.symmetric else 1 << (held.scheme.weight_bits - 1)
    zero_point = parts.get("weight_zero_point")
    scale = parts["weight_scale"].reshape(held.scale.shape)
    if zero_point is not None:
        zero_point = zero_point.to(torch.int16).reshape(held.scale.shape) + lowest
    seen.quantized(name, held, parts["weight"].to(torch.int16) + lowest, scale, zero_point)
    if "dense" in parts and not torch.equal(parts["dense"], held.dequantize(parts["dense"].dtype)):
        raise ExportError(f"{name}: transformers' weight is not what its integers stand for")
    fixed = layer.weight.activation_scale
    if fixed is not None and not torch.equal(fixed.cpu().reshape(1).float(), parts["stored_input_scale"]):
        raise ExportError(f"{name}: the file has another activation scale than the model")


def _notes(model: Exportable) -> list[str]:
    found = []
    if _dequantized(model):
        found.append("transformers holds the weights as floats: compressed-tensors has no place for packed zero points")
    dtype = float_dtype(model)
    if any(layer.scheme.static for layer in model.layers.values()) and dtype != torch.float32:
        found.append(f"transformers rounds activation scales to {str(dtype)[6:]}; the file holds float32")
    return found + notes(model)


def usage(model: Exportable, path: Path, options: Options) -> str:
    """How it is loaded."""
    return (
        "from transformers import AutoModelForCausalLM  # with compressed-tensors installed; nothing of qat_plugin\n"
        f'model = AutoModelForCausalLM.from_pretrained("{path.name}")\n'
        f"# or: vllm serve {path.name}"
    )
