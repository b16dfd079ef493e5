"""What a transformers directory holds beside its weights: configuration, generation settings, tokenizer."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qat_plugin.errors import ConfigError, ExportError
from qat_plugin.exporting.contents import Exportable, Layer
from qat_plugin.exporting.sharded import Part
from qat_plugin.qlora.source import load_tokenizer


def check_transformers(model: Exportable, title: str) -> None:
    """Raise unless the network is a transformers model with quantized layers.

    Raises:
        ConfigError: for any other module.
        ExportError: when nothing in it is quantized.
    """
    if model.config is None or not hasattr(model.network, "generation_config"):
        raise ConfigError(
            f"{title} is a transformers directory, and {type(model.network).__name__} is no transformers language "
            "model; format='converted' holds any module"
        )
    if not model.layers:
        raise ExportError(f"{title} needs quantized layers, and all of this plan's are float")


def not_plain(layer: Layer) -> str:
    """Why a layer is not what ``nn.Linear`` or ``nn.Embedding`` alone compute with its weight; "" when it is."""
    if layer.weight.usage == "conv":
        return "linear layers and embeddings are held, convolutions are not"
    if layer.weight.transposed:
        return "its weight is [in, out] (transformers' Conv1D), and [out, in] is held"
    if layer.weight.input_scale is not None:
        return (
            "it divides its inputs by a scale of its own (AWQ, SmoothQuant), which has no place in the file: calibrate "
            "it by another method"
        )
    return ""


def float_dtype(model: Exportable) -> torch.dtype:
    """The float type that the network runs in."""
    layers = iter(model.layers.values())
    first = next(layers, None)
    if first is not None:
        return first.weight.logical_dtype
    return next(tensor.dtype for tensor in model.network.parameters() if tensor.is_floating_point())


def write_directory(model: Exportable, path: Path, quantization_config: Mapping[str, Any]) -> None:
    """Everything but the weights.

    Args:
        model: what is exported; its own configuration stays as it is.
        path: an existing folder.
        quantization_config: for ``config.json``.
    """
    config = copy.deepcopy(model.config)
    config.quantization_config = dict(quantization_config)
    config.dtype = float_dtype(model)
    config.architectures = [type(model.network).__name__]
    network: Any = model.network
    head = network.get_output_embeddings()
    if head is not None and head.weight is not network.get_input_embeddings().weight:
        config.tie_word_embeddings = False  # conversion unties what takes two schemes
    write_companions(model, path, config)


def write_companions(model: Exportable, path: Path, config: Any) -> None:
    """A configuration, where there is one, and the model's generation settings and tokenizer.

    Args:
        model: what is exported.
        path: an existing folder.
        config: for ``config.json``, or ``None``.
    """
    generation = getattr(model.network, "generation_config", None)
    for part in (config, None if config is None else generation, model.tokenizer):
        if part is not None:
            part.save_pretrained(path)


def float_parts(model: Exportable) -> dict[str, Part]:
    """Name -> each tensor that is not quantized, as it is stored."""

    def part(name: str, tensor: Tensor) -> Part:
        return Part({name: tensor.to("meta")}, lambda: {name: tensor})

    return {name: part(name, tensor) for name, tensor in model.floats_in_place()}


def float_layers(model: Exportable) -> list[str]:
    """Linear layers that are not quantized, by name."""
    return [
        name
        for name, module in model.network.named_modules()
        if isinstance(module, torch.nn.Linear)
        and model.ties.get(f"{name}.weight", f"{name}.weight") not in model.layers
    ]


def in_order(model: Exportable, parts: Mapping[str, Part]) -> dict[str, Part]:
    """Parts in the order of the network's state."""
    return {name: parts[name] for name in model.network.state_dict(keep_vars=True) if name in parts}


def tokenizer_of(folder: Path) -> Any:
    """The directory's tokenizer, or ``None`` where it has none."""
    has = any((folder / name).is_file() for name in ("tokenizer.json", "tokenizer.model", "vocab.json"))
    return load_tokenizer(folder) if has else None
