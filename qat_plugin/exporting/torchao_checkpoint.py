"""A transformers directory with torchao's quantized tensors: ``AutoModelForCausalLM.from_pretrained(folder)`` loads it.

The integers are ours: each becomes a torchao tensor as it is (:mod:`~qat_plugin.exporting.torchao_tensors`), flattened
by torchao's own function and written tensor by tensor. ``config.json`` names each layer's configuration.
"""

from __future__ import annotations

import json
from collections import OrderedDict
from dataclasses import dataclass, field
from pathlib import Path

from torch import Tensor

from qat_plugin.errors import ExportError
from qat_plugin.exporting.contents import Exportable, Layer
from qat_plugin.exporting.directory import (
    check_transformers,
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
from qat_plugin.exporting.torchao_tensors import (
    config_of,
    raised,
    refusal_of,
    rounded_input,
    tensor_of,
    uses_int8_tensor,
)
from qat_plugin.exporting.verification import Comparison, Verification
from qat_plugin.kernels.torchao_import import known_noise_dropped
from qat_plugin.numerics import Quantized


@dataclass(frozen=True)
class Options:
    """What can be set."""

    shard_size: str = field(
        default=DEFAULT_SHARD_SIZE,
        metadata={"help": "bytes of one safetensors file at most ('5GB'); transformers' own default"},
    )

    def __post_init__(self) -> None:
        bytes_of(self.shard_size)


def refusals(model: Exportable, options: Options) -> list[Refusal]:
    """What torchao has no tensor for."""
    check_transformers(model, "torchao's format")
    found = []
    for layer in model.layers.values():
        reason, nearest = _refusal(layer)
        if reason:
            found.append(Refusal(layer.name, str(layer.scheme), reason, nearest))
    return found


def _refusal(layer: Layer) -> tuple[str, str]:
    reason = not_plain(layer)
    return (reason, "") if reason else refusal_of(layer.scheme)


def write(model: Exportable, path: Path, options: Options, progress: Told) -> None:
    """Fill the folder."""
    with known_noise_dropped():
        from torchao.quantization import FqnToConfig
        from transformers import TorchAoConfig

    parts = float_parts(model)
    metadata = dict.fromkeys(parts, '{"_type": "Tensor"}')
    for name, layer in model.layers.items():
        parts[name], metadata[name] = _part(name, layer)
    ordered = in_order(model, parts)
    metadata |= {"tensor_names": json.dumps(list(ordered)), "format": "pt"}
    # each shard holds the whole of it: torchao unflattens a tensor by the names that the last file's header lists
    write_shards(path, list(ordered.values()), metadata, options.shard_size, progress)
    configs = OrderedDict((layer.name, config_of(layer.scheme)) for layer in model.layers.values())
    config = TorchAoConfig(
        FqnToConfig(fqn_to_config=configs),
        modules_to_not_convert=float_layers(model),
        include_input_output_embeddings=any(layer.weight.usage != "linear" for layer in model.layers.values()),
    )
    write_directory(model, path, config.to_dict())


def _part(name: str, layer: Layer) -> tuple[Part, str]:
    """One layer in the file, and what torchao must know to put it together again."""
    from torchao.prototype.safetensors.safetensors_support import flatten_tensor_state_dict

    def flat(integers: Quantized) -> tuple[dict[str, Tensor], dict[str, str]]:
        tensor = tensor_of(integers, layer.weight.logical_dtype)
        found: tuple[dict[str, Tensor], dict[str, str]] = flatten_tensor_state_dict({name: tensor})
        return found

    planned, metadata = flat(layer.outline)
    planned = {part: tensor.to("meta") for part, tensor in planned.items()}
    return Part(planned, lambda: flat(layer.integers)[0]), metadata[name]


def verify(model: Exportable, path: Path, options: Options) -> Verification:
    """Let transformers load it, in an interpreter that does not import this package."""
    import torchao

    grid = "torchao rounds activations on another grid (absmax / 127.5, or a zero point)"
    seen, agreed, notes = compared_elsewhere(model, path, _kind, _compare, rounded_input, grid)
    return seen.verification(
        reader_with("torchao", torchao.__version__),
        error=agreed.error, tolerance=agreed.tolerance, reason=agreed.reason, notes=notes,
    )  # fmt: skip


def _kind(layer: Layer) -> str:
    return "Int8Tensor" if uses_int8_tensor(layer.scheme) else "IntxUnpackedToInt8Tensor"


def _compare(seen: Comparison, name: str, layer: Layer, parts: dict[str, Tensor]) -> None:
    held = layer.integers
    q, zero_point = parts["qdata"], parts.get("zero_point")
    if held.zero_point is not None and zero_point is not None:
        bits = held.scheme.weight_bits
        seen.quantized(name, held, raised(q, bits), parts["scale"], raised(zero_point, bits))
    else:
        if zero_point is not None and bool((zero_point != 0).any()):
            raise ExportError(f"{name}: the file has zero points, the model has none")
        seen.quantized(name, held, q, parts["scale"])


def usage(model: Exportable, path: Path, options: Options) -> str:
    """How it is loaded."""
    return (
        "from transformers import AutoModelForCausalLM  # with torchao installed; nothing of qat_plugin\n"
        f'model = AutoModelForCausalLM.from_pretrained("{path.name}")\n'
        "model.generate(...)"
    )
