"""The subject of a run on a causal language model: the embedded one, or one in a local directory."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import lightning as L

from qat_plugin.config.schema import AdamW, Config, EmbeddedModel, EmbeddedText, TextFiles, TransformersModel
from qat_plugin.data.embedded import embedded_corpus
from qat_plugin.data.text import TextData
from qat_plugin.kernels.torchao_import import known_noise_dropped
from qat_plugin.models.causal_lm import CausalLM, load_causal_lm
from qat_plugin.models.embedded import EmbeddedRecipe, embedded_lm
from qat_plugin.runs.custom import with_optimizer
from qat_plugin.runs.subject import Subject, placed


def language_subject(config: Config, allow: tuple[str, ...]) -> Subject:
    """Load the model's tokenizer, read and tokenize the text.

    Raises:
        DataError: for text that cannot be used.
        CheckpointError: for a model that cannot be loaded.
    """
    with known_noise_dropped():  # transformers imports parts of torchao
        path = _directory(config.model)
        _, tokenizer = load_causal_lm(path)
    data = _text(config, config.data, tokenizer)
    data.setup()

    def build() -> L.LightningModule:
        model, _ = load_causal_lm(path)
        return placed(with_optimizer(CausalLM(model, tokenizer, **_schedule(config.optimizer)), config, allow), config)

    return Subject(build, data, language=True)


def embedded_recipe(model: EmbeddedModel) -> EmbeddedRecipe:
    """The embedded model's recipe as its room knows it."""
    return EmbeddedRecipe(**{name: value for name, value in asdict(model).items() if name != "kind"})


def _directory(model: EmbeddedModel | TransformersModel) -> Path:
    """Where the model lies; the embedded one is trained first if it is not in the cache."""
    if isinstance(model, EmbeddedModel):
        return embedded_lm(recipe=embedded_recipe(model))
    return Path(model.path)


def _schedule(optimizer: Any) -> dict[str, Any]:
    if not isinstance(optimizer, AdamW):
        return {}
    return {name: value for name, value in asdict(optimizer).items() if name != "kind"}


def _text(config: Config, data: EmbeddedText | TextFiles, tokenizer: Any) -> TextData:
    if isinstance(data, TextFiles):
        key = data.key
        sources: tuple[Any, Any] = (Path(data.train), data.valid and Path(data.valid))
    else:
        sizes = config.model if isinstance(config.model, EmbeddedModel) else EmbeddedModel()
        corpus = embedded_corpus(train_characters=sizes.train_characters, valid_characters=sizes.valid_characters)
        sources, key = (corpus.train_documents, corpus.valid_documents), "text"
    return TextData(
        tokenizer,
        *sources,
        sequence_length=data.sequence_length,
        batch_size=data.batch_size,
        eval_batch_size=data.eval_batch_size,
        eval_tokens=data.eval_tokens,
        seed=config.trainer.seed,
        key=key,
    )
