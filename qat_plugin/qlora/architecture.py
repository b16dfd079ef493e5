"""A pretrained model without its weights: built from its configuration, parameters on the meta device, buffers real.

Buffers that no file holds (rotary frequencies, Gemma's embedding scale) are computed by the model's own constructor,
as they would be on the CPU; only parameters are moved to the meta device, each as soon as it is registered.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import torch
from torch import nn
from torch.nn.modules.module import register_module_parameter_registration_hook

from qat_plugin.errors import CheckpointError
from qat_plugin.kernels.torchao_import import known_noise_dropped
from qat_plugin.qlora.source import first_line, quiet_transformers, read_config, some

# In old files, and in no model: rotary frequencies of each layer, GPT-2's causal mask and its masked value.
_NO_WEIGHTS: Final = re.compile(r"(^|\.)(rotary_emb\.inv_freq|position_ids|attn\.(bias|masked_bias))$")


@dataclass(frozen=True)
class Names:
    """Which tensor of the files is which of the model.

    Attributes:
        model: name in the files -> name in the model.
        skipped: names in the files that are no weights.
        converted: names in the files that transformers combines or splits while it loads (fused experts).
    """

    model: dict[str, str] = field(default_factory=dict)
    skipped: list[str] = field(default_factory=list)
    converted: list[str] = field(default_factory=list)


def empty_model(folder: Path, dtype: torch.dtype, *, quantized: bool = False) -> Any:
    """The causal language model that ``config.json`` describes, in eval mode; its parameters are on the meta device.

    Args:
        folder: a transformers directory; only its configuration is read.
        dtype: float type of the parameters, as ``from_pretrained(dtype=...)`` takes it.
        quantized: its files may be quantized; the model is float all the same.

    Raises:
        CheckpointError: when the configuration is of no known causal language model, needs code that lies in the
            directory, or is of a model whose files are quantized already.
    """
    kind, ours = _checked_config(folder, quantized)
    with quiet_transformers(), known_noise_dropped():
        from transformers import AutoConfig

        try:
            config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
            if hasattr(config, "quantization_config"):
                del config.quantization_config
            model = empty_from_config(config, dtype)
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise CheckpointError(
                f"{folder} does not load as a causal language model (model_type {kind!r}): {first_line(error)}{ours}"
            ) from error
        _load_generation_config(model, folder)
    model.config._name_or_path = str(folder)
    model.name_or_path = str(folder)
    return model


def empty_from_config(config: Any, dtype: torch.dtype) -> Any:
    """The causal language model of a transformers configuration, in eval mode; parameters on the meta device."""
    with quiet_transformers(), known_noise_dropped(), torch.random.fork_rng(devices=[]):
        from transformers import AutoModelForCausalLM

        with _parameters_on_meta():
            model = AutoModelForCausalLM.from_config(config, dtype=dtype, trust_remote_code=False)
    return model.eval()


def _checked_config(folder: Path, quantized: bool) -> tuple[str, str]:
    """The model's type, and a remark for an error's end when the directory brings code of its own."""
    config = read_config(folder)
    kind = str(config.get("model_type"))
    if "quantization_config" in config and not quantized:
        method = (config["quantization_config"] or {}).get("quant_method", "an unnamed method")
        raise CheckpointError(
            f"{folder} holds a model that is quantized already ({method}); give the original directory, whose weights "
            "are 16 or 32 bits, or take its float numbers by qat_plugin.load(path, dequantize=True)"
        )
    if "auto_map" not in config:
        return kind, ""
    print(
        f"{folder}: config.json names code of its own (auto_map), which is not run; transformers' own {kind!r} is used",
        file=sys.stderr,
    )
    return kind, "; the code that config.json names (auto_map) is never run"


@contextmanager
def _parameters_on_meta() -> Iterator[None]:
    """Every parameter registered inside lands on the meta device; one that is registered twice stays one."""

    def to_meta(module: nn.Module, name: str, parameter: nn.Parameter | None) -> nn.Parameter | None:
        if parameter is None or parameter.device.type == "meta":
            return parameter
        return nn.Parameter(parameter.detach().to("meta"), requires_grad=parameter.requires_grad)

    handle = register_module_parameter_registration_hook(to_meta)  # type: ignore[arg-type]
    try:
        yield
    finally:
        handle.remove()


def _load_generation_config(model: Any, folder: Path) -> None:
    from transformers import GenerationConfig

    if not model.can_generate():
        return
    own = (folder / "generation_config.json").is_file()
    options = {} if own else {"config_file_name": "config.json", "_from_model_config": True}
    try:
        model.generation_config = GenerationConfig.from_pretrained(folder, local_files_only=True, **options)
    except (OSError, ValueError, json.JSONDecodeError) as error:
        raise CheckpointError(f"{folder}: its generation_config.json cannot be read: {first_line(error)}") from error


def model_names(model: Any, stored: Iterable[str], folder: Path) -> Names:
    """Map the names in the files to the model's, by transformers' own rules (prefixes, renamed layers).

    Args:
        model: from :func:`empty_model`, before any of its layers is replaced.
        stored: the names in the files.
        folder: for the message.

    Raises:
        CheckpointError: for tensors that the model does not have.
    """
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

    own = model.state_dict()
    transforms = get_model_conversion_mapping(model)
    renamings = [each for each in transforms if isinstance(each, WeightRenaming)]
    converters = [each for each in transforms if isinstance(each, WeightConverter)]
    prefix = model.base_model_prefix
    names, unexpected = Names(), []
    for name in stored:
        renamed, conversion = rename_source_key(name, renamings, converters, prefix, own)
        if renamed not in own and name in own:
            renamed, conversion = rename_source_key(name, [], [], prefix, own)
        if conversion is not None:
            names.converted.append(name)
        elif renamed in own:
            names.model[name] = renamed
        elif _NO_WEIGHTS.search(name) or _matches(model._keys_to_ignore_on_load_unexpected, renamed):
            names.skipped.append(name)
        else:
            unexpected.append(name)
    if unexpected:
        raise CheckpointError(
            f"{folder}: its files hold {len(unexpected)} tensors that a {type(model).__name__} does not have: "
            f"{some(sorted(unexpected))}; config.json and weights do not belong together"
        )
    return names


def may_be_missing(model: Any, name: str) -> bool:
    """Whether the model's class says that files need not hold this parameter."""
    return _matches(model._keys_to_ignore_on_load_missing, name)


def _matches(patterns: Iterable[str] | None, name: str) -> bool:
    return any(re.search(pattern, name) for pattern in patterns or ())


def not_streamable(model: Any, names: Names, dtype: torch.dtype) -> str:
    """Why the model must be loaded by transformers itself; empty when it can be streamed tensor by tensor."""
    if names.converted:
        return f"transformers converts {len(names.converted)} of its tensors while loading ({some(names.converted)})"
    kept = set(model._keep_in_fp32_modules_strict or ())
    kept |= set(model._keep_in_fp32_modules or ()) if dtype == torch.float16 else set()
    if kept and dtype != torch.float32:
        return f"its class keeps some of its modules in float32 ({some(sorted(kept))})"
    return ""
