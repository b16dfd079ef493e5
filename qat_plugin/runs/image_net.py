"""The subject of a run on the small image net: scikit-learn's digits, or a folder in MNIST's format."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import lightning as L

from qat_plugin.config.options import IdxFolder, ImageModel
from qat_plugin.config.schema import Config
from qat_plugin.data.images import ImageData
from qat_plugin.models.image import ImageClassifier, ImageRecipe, trained_net
from qat_plugin.runs.custom import with_optimizer
from qat_plugin.runs.language_model import optimizer_schedule
from qat_plugin.runs.subject import Subject, placed


def image_subject(config: Config, allow: tuple[str, ...]) -> Subject:
    """Read the images, and train the net if it is not in the cache.

    Raises:
        DataError: for images that cannot be used.
        ConfigError: where scikit-learn is needed and not installed.
    """
    data, recipe = image_data(config), image_recipe(config.model)
    data.setup("fit")
    trained_net(recipe, data)

    def build() -> L.LightningModule:
        module = ImageClassifier(trained_net(recipe, data), **optimizer_schedule(config.optimizer))
        return placed(with_optimizer(module, config, allow), config)

    return Subject(build, data, language=False, build_student=build, build_base=build)


def image_data(config: Config) -> ImageData:
    """The data of a recipe, not yet read."""
    options: Any = config.data
    return ImageData(
        options.path if isinstance(options, IdxFolder) else None,
        batch_size=options.batch_size,
        eval_batch_size=options.eval_batch_size,
        valid_fraction=options.valid_fraction,
        seed=config.trainer.seed,
    )


def image_recipe(model: ImageModel) -> ImageRecipe:
    """The net's recipe as its room knows it."""
    return ImageRecipe(**{name: value for name, value in asdict(model).items() if name != "kind"})
