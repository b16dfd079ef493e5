"""The subject of a run on classes of the user's own: a LightningModule, a LightningDataModule, an optimizer."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Final

import lightning as L
import torch
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch import nn

from qat_plugin.config.schema import Config
from qat_plugin.config.targets import instantiate, is_target
from qat_plugin.config.typed import option_of
from qat_plugin.errors import ConfigError
from qat_plugin.models.causal_lm import CausalLM
from qat_plugin.models.image import ImageClassifier
from qat_plugin.runs.subject import Subject, first_loader, placed

_NESTED: Final = (nn.Module,)


def custom_subject(config: Config, allow: tuple[str, ...]) -> Subject:
    """Build the user's data and say how to build the user's module.

    Raises:
        ConfigError: when a class or its arguments are not allowed.
    """
    _see_working_directory(allow)
    data = instantiate(config.data, (L.LightningDataModule,), nested=_NESTED, allow=allow, where="data")
    data.prepare_data()
    data.setup("fit")
    batch = next(iter(first_loader(data.val_dataloader())), None)
    ids, labels = (batch.get("input_ids"), batch.get("labels")) if isinstance(batch, Mapping) else (None, None)
    language = ids is not None and labels is not None and ids.shape == labels.shape

    def build() -> L.LightningModule:
        return build_custom(config, allow)

    return Subject(build, data, language, build_student=build, build_base=build)


def build_custom(config: Config, allow: tuple[str, ...]) -> L.LightningModule:
    """The user's own LightningModule, its weights a function of the seed.

    Raises:
        ConfigError: when its class or its arguments are not allowed.
    """
    _see_working_directory(allow)
    L.seed_everything(config.trainer.seed, workers=True, verbose=False)
    module = instantiate(config.model, (L.LightningModule,), nested=_NESTED, allow=allow, where="model")
    return placed(with_optimizer(module, config, allow), config)


def with_optimizer(module: L.LightningModule, config: Config, allow: tuple[str, ...]) -> L.LightningModule:
    """The module, its ``configure_optimizers`` replaced where the recipe names an optimizer class.

    Raises:
        ConfigError: when the recipe's optimizer and the module do not go together.
    """
    spec, name = config.optimizer, type(module).__name__
    if is_target(spec):

        def configure_optimizers() -> torch.optim.Optimizer:
            weights = [parameter for parameter in module.parameters() if parameter.requires_grad]
            made: torch.optim.Optimizer = instantiate(
                spec, (torch.optim.Optimizer,), nested=(), allow=allow, where="optimizer", first=(weights,)
            )
            return made

        configure_optimizers()  # a mistake in its arguments shows now
        module.configure_optimizers = configure_optimizers  # type: ignore[method-assign]
    elif not isinstance(module, (CausalLM, ImageClassifier)):
        chosen = option_of(config, "optimizer")
        if chosen != "own":
            raise ConfigError(
                f"optimizer={chosen} is for the models that qat brings; with model=custom say optimizer=own "
                f"(the configure_optimizers of {name}) or optimizer=custom"
            )
        if not is_overridden("configure_optimizers", module):
            raise ConfigError(f"optimizer=own: {name} has no configure_optimizers; define it, or use optimizer=custom")
    return module


def _see_working_directory(allow: tuple[str, ...]) -> None:
    """A package that was allowed by name may lie in the working directory, where a console script does not look."""
    if allow and "" not in sys.path:
        sys.path.append("")
