"""A model's architecture without its weights: enough to plan, at no cost in memory or time."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn

from qat_plugin.config.options import EmbeddedModel, ImageModel
from qat_plugin.config.schema import Config
from qat_plugin.config.typed import option_of
from qat_plugin.errors import CheckpointError, ConfigError
from qat_plugin.exporting.reading import is_quantized, outline
from qat_plugin.kernels.torchao_import import known_noise_dropped
from qat_plugin.models.embedded import _model as embedded_architecture
from qat_plugin.models.resnet import SmallResNet
from qat_plugin.models.shapes import shape_config
from qat_plugin.runs.custom import build_custom
from qat_plugin.runs.language_model import embedded_recipe
from qat_plugin.runs.subject import network_of


def skeleton_of(config: Config, allow: tuple[str, ...]) -> nn.Module:
    """The network that a recipe names, in the float type of training; a language model's on the meta device.

    Raises:
        CheckpointError: when a directory holds no causal language model's configuration.
        ConfigError: for a class that is not allowed.
    """
    shape = planned_shape(config)
    if option_of(config, "model") == "custom":
        return network_of(build_custom(config, allow))
    if isinstance(config.model, ImageModel):
        with torch.device("meta"):
            return SmallResNet(config.model.classes, 1, config.model.width)
    dtype = torch.bfloat16 if config.trainer.precision == "bf16-true" else torch.float32
    if config.model.path and is_quantized(place := Path(config.model.path)):
        with known_noise_dropped():
            return outline(place, dtype)
    with torch.device("meta"), known_noise_dropped():  # transformers imports parts of torchao
        if isinstance(config.model, EmbeddedModel) and shape is None:
            tokens = SimpleNamespace(bos_token_id=0, eos_token_id=0)
            network: nn.Module = embedded_architecture(embedded_recipe(config.model), tokens)
        else:
            network = _from_directory(Path(config.model.path)) if config.model.path else _from_shape(config)
    return network.to(dtype)


def planned_shape(config: Config) -> str | None:
    """The architecture by name that a plan is for, in place of a model.

    Raises:
        ConfigError: when the model is a class of the user's, which has the shape that it has.
    """
    if config.task.name != "plan" or config.plan.shape is None:
        return None
    if option_of(config, "model") == "custom":
        raise ConfigError(
            f"plan.shape={config.plan.shape} is for language models, and this recipe has model=custom: leave it out"
        )
    return None if config.model.path else config.plan.shape


def _from_shape(config: Config) -> nn.Module:
    from transformers import AutoModelForCausalLM

    if config.plan.shape is None:
        raise ConfigError(
            "model.path is needed: local directory with config.json, weights and tokenizer, or a hub's org/name; give "
            "model.path=VALUE, or for a plan alone plan.shape=NAME"
        )
    network: nn.Module = AutoModelForCausalLM.from_config(shape_config(config.plan.shape))
    return network


def _from_directory(folder: Path) -> nn.Module:
    from transformers import AutoConfig, AutoModelForCausalLM

    options: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}
    try:
        config = AutoConfig.from_pretrained(folder, **options)
        network: nn.Module = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    except (OSError, ValueError, KeyError) as error:
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise CheckpointError(f"{folder} holds no causal language model that transformers knows: {reason}") from error
    return network
