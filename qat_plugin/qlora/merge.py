"""Merging: the adapters of a model in memory become part of its weights.

    NF4 layer              a plain nn.Linear of  dequantized(base) + update     exact: nothing is quantized again
    float layer            W + update, in place
    fake-quantized layer   W + update by the arithmetic of training, still fake-quantized: convert() follows

Directories are merged by :mod:`qat_plugin.qlora.merge_files`; what a choice costs is in
:mod:`qat_plugin.qlora.survival`.
"""

from __future__ import annotations

import copy
from collections import Counter
from typing import Any

import torch
from torch import Tensor, nn

from qat_plugin.errors import ConfigError
from qat_plugin.policy.roles import is_conv1d
from qat_plugin.qat.layers import FakeQuantized
from qat_plugin.qlora.fold import folded_weight
from qat_plugin.qlora.merge_files import MergeRecord, merge_directory, updated_weights
from qat_plugin.qlora.nf4 import dequantized, guard, is_nf4
from qat_plugin.qlora.prepare import prepared_of, restore
from qat_plugin.qlora.record import LOADED
from qat_plugin.qlora.survival import Survival, check_requantization, survival, survival_table
from qat_plugin.qlora.updates import adapter_layers, adapter_root, update_of

__all__ = [
    "MergeRecord", "Survival", "check_requantization", "merge", "merge_directory", "survival", "survival_table",
    "updated_weights",
]  # fmt: skip


@torch.no_grad()
def merge(model: nn.Module, *, dtype: torch.dtype | None = None) -> nn.Module:
    """Fold the adapters into the weights, in place, and take peft's wrappers out.

    NF4 layers without an adapter become plain Linears too, so that the result is a float model (or a model prepared
    for quantization-aware training). Sums are made in float32 and rounded once.

    Args:
        model: prepared by :func:`~qat_plugin.qlora.prepare`, or with adapters that peft injected; a LightningModule or
            a wrapper around it.
        dtype: float type of every parameter of the result; by default each layer's own, for NF4 layers that of their
            bias or of most weights that are not NF4. In float32 nothing is lost.

    Returns:
        ``model``; it stays in train or eval mode. Gradients and checkpointing are as they were before
        :func:`~qat_plugin.qlora.prepare`; what was frozen then (a base loaded in NF4, too) stays frozen.

    Raises:
        ConfigError: without adapters, with some that peft has merged already, with DoRA on a fake-quantized base, or
            with ``dtype`` for a fake-quantized base.
        CheckpointError: when an adapter holds NaN or infinite values, or an NF4 weight has been repacked.
    """
    root = adapter_root(model)
    layers = adapter_layers(root)
    for name, layer in layers.items():
        _check(name, layer, dtype)
    _check_ties(root, layers)
    guard(root)
    plain = dtype or _float_dtype(root)
    bases = {id(layer.get_base_layer()) for layer in layers.values()}
    shared = _elsewhere(root, {id(layer) for layer in layers.values()}, bases)
    _put(root, {id(each): _merged_layer(each, plain, dtype, shared) for each in layers.values()})
    _put(root, {id(each): _linear(each, dequantized(each), plain) for each in root.modules() if is_nf4(each)})
    if dtype is not None:
        _cast(root, dtype)
    if "_qlora" in root.__dict__ and (before := prepared_of(root).before) is not None:
        restore(root, before)
    _forget(model)
    return model


def _check(name: str, layer: Any, dtype: torch.dtype | None) -> None:
    base, update = layer.get_base_layer(), update_of(layer)
    update.check_finite(name)
    if not isinstance(base, FakeQuantized):
        return
    if update.magnitude is not None:
        raise ConfigError(f"{name}: DoRA cannot be folded into a fake-quantized base; train plain LoRA there")
    if dtype not in (None, layer.get_base_layer().weight.dtype):
        raise ConfigError(
            f"{name} is fake-quantized, and another dtype ({dtype}) would change the integers it was trained with: "
            "merge without dtype, then convert"
        )


def _check_ties(root: nn.Module, layers: dict[str, Any]) -> None:
    """A fake-quantized weight is merged in place, so that nothing else may read it."""
    readers = Counter(id(p) for module in root.modules() for p in module._parameters.values() if p is not None)
    for name, layer in layers.items():
        base = layer.get_base_layer()
        if isinstance(base, FakeQuantized) and readers[id(base._parameters["weight"])] > 1:  # type: ignore[attr-defined]
            raise ConfigError(
                f"{name} is fake-quantized and shares its weight with another layer, which merging would change too: "
                "train it without an adapter, or untie the two before prepare()"
            )


def _elsewhere(root: nn.Module, layers: set[int], bases: set[int]) -> set[int]:
    """Base layers that the model also uses without their adapter, under another name."""
    outside = [module for module in root.modules() if id(module) not in layers]
    return {id(child) for module in outside for child in module._modules.values()} & bases


def _merged_layer(layer: Any, plain: torch.dtype, dtype: torch.dtype | None, shared: set[int]) -> nn.Module:
    """The base layer with the adapter in it: NF4 in the type ``plain``, others in ``dtype`` or their own."""
    base: nn.Module = layer.get_base_layer()
    if is_nf4(base):
        return _linear(base, update_of(layer).merged(dequantized(base)), plain)
    weight: Tensor = base.weight  # type: ignore[assignment]
    if isinstance(base, FakeQuantized):
        weight.data.copy_(folded_weight(layer))
        return base
    if id(base) in shared:
        base = copy.copy(base)
        base._parameters = dict(base._parameters)
    # a new Parameter: a weight that another layer shares (a tied head) must not change there
    transposed = is_conv1d(base)
    total = update_of(layer).merged(weight.t() if transposed else weight)
    total = (total.t() if transposed else total).to(dtype or weight.dtype).contiguous()
    base._parameters["weight"] = nn.Parameter(total, requires_grad=weight.requires_grad)
    return base


def _linear(layer: nn.Module, weight: Tensor, dtype: torch.dtype) -> nn.Linear:
    """A plain layer with this weight, and the bias and mode of an NF4 layer."""
    bias: nn.Parameter | None = layer.bias  # type: ignore[assignment]
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    linear.weight = nn.Parameter(weight.to(dtype if bias is None else bias.dtype), requires_grad=False)
    linear.bias = bias  # type: ignore[assignment]
    return linear.train(layer.training)


def _float_dtype(root: nn.Module) -> torch.dtype:
    """The type of most float weights that are neither NF4 nor an adapter's; float32 where there are none."""
    sizes: Counter[torch.dtype] = Counter()
    for module in root.modules():
        if not is_nf4(module):
            for parameter in module._parameters.values():
                if parameter is not None and parameter.is_floating_point() and not parameter.requires_grad:
                    sizes[parameter.dtype] += parameter.numel()
    return sizes.most_common(1)[0][0] if sizes else torch.float32


def _put(root: nn.Module, replacements: dict[int, nn.Module]) -> None:
    """Put modules in the places of others, under every name that they have."""
    for parent in list(root.modules()):
        for name, child in parent._modules.items():
            if id(child) in replacements:
                parent._modules[name] = replacements[id(child)]


def _cast(root: nn.Module, dtype: torch.dtype) -> None:
    """Parameters alone: rotary frequencies and other buffers keep their type. Ties hold."""
    for module in root.modules():
        for parameter in module.parameters(recurse=False):
            if parameter.is_floating_point():
                parameter.data = parameter.data.to(dtype)
        if "_qlora_types" in module.__dict__:  # a base layer stored in a narrower type than it computes with
            module._qlora_types = (module._qlora_types[0], dtype)  # type: ignore[index, assignment]


def _forget(model: nn.Module) -> None:
    """Nothing says any more that there are adapters; a head that was merged is no longer tied."""
    for module in model.modules():
        for name in ("_qlora", LOADED, "peft_config", "_hf_peft_config_loaded", "active_adapter"):
            module.__dict__.pop(name, None)
        _untie(module)
        _not_quantized(module)


def _untie(module: Any) -> None:
    """transformers ties again on loading when the configuration says so."""
    config = module.__dict__.get("config")
    if getattr(config, "tie_word_embeddings", False) and hasattr(module, "get_output_embeddings"):
        head, embedding = module.get_output_embeddings(), module.get_input_embeddings()
        if head is not None and embedding is not None and head.weight is not embedding.weight:
            config.tie_word_embeddings = False


def _not_quantized(module: Any) -> None:
    """A model that transformers quantized while loading says so in its configuration, and would be saved as such."""
    if "hf_quantizer" not in module.__dict__ and not getattr(module, "is_quantized", False):
        return
    for name in ("hf_quantizer", "is_quantized", "is_loaded_in_4bit", "quantization_method"):
        module.__dict__.pop(name, None)
    for name in ("quantization_config", "_pre_quantization_dtype"):
        module.config.__dict__.pop(name, None)
