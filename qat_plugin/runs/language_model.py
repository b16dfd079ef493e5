"""The subject of a run on a causal language model: the embedded one, or one in a directory or on a hub."""

from __future__ import annotations

import copy
from dataclasses import asdict
from pathlib import Path
from typing import Any

import lightning as L
import torch

from qat_plugin import qlora
from qat_plugin.config.options import AdamW, EmbeddedModel, InstructionFiles, TextFiles, TransformersModel
from qat_plugin.config.schema import Config
from qat_plugin.data.embedded import embedded_corpus
from qat_plugin.data.instructions import InstructionData
from qat_plugin.data.text import TextData
from qat_plugin.exporting.dequantized import float_folder
from qat_plugin.exporting.reading import is_quantized
from qat_plugin.kernels.torchao_import import known_noise_dropped
from qat_plugin.models.causal_lm import CausalLM, load_causal_lm
from qat_plugin.models.embedded import EmbeddedRecipe, embedded_lm
from qat_plugin.models.objective import Distillation
from qat_plugin.qlora.source import find_source, load_tokenizer
from qat_plugin.runs.base_policy import base_policy
from qat_plugin.runs.custom import with_optimizer
from qat_plugin.runs.journal import say
from qat_plugin.runs.subject import Subject, placed
from qat_plugin.runs.training import accelerator_of


def language_subject(config: Config, allow: tuple[str, ...]) -> Subject:
    """Load the model's tokenizer, read and tokenize the text.

    Raises:
        DataError: for text that cannot be used.
        CheckpointError: for a model that cannot be loaded.
    """
    path = model_directory(config)
    tokenizer = load_tokenizer(path)
    data = language_data(config, tokenizer)
    distill = config.distill
    distillation = Distillation(distill.weight, distill.temperature, distill.hidden) if distill.weight else None

    def module_of(model: Any, **options: Any) -> L.LightningModule:
        module = CausalLM(model, tokenizer, **optimizer_schedule(config.optimizer), **options)
        return placed(with_optimizer(module, config, allow), config)

    def build_from(folder: Path) -> L.LightningModule:
        return module_of(_float(folder))

    def build() -> L.LightningModule:
        return build_from(path)

    def build_student() -> L.LightningModule:
        if distillation is None:
            return build()
        model = _float(path)
        dtype = torch.bfloat16 if config.trainer.precision == "bf16-true" else torch.float32
        return module_of(model, distillation=distillation, teacher=copy.deepcopy(model).to(dtype))

    def build_base() -> L.LightningModule:
        keeps = isinstance(config.model, TransformersModel) and config.model.cache
        with known_noise_dropped():
            model, _, record = qlora.load_base(
                path,
                base_policy(config),
                backend=config.lora.backend,  # type: ignore[arg-type]
                dtype=torch.float32 if config.trainer.precision.startswith("32") else torch.bfloat16,
                device=accelerator_of(config.trainer),
                cache=keeps,
            )
        return module_of(model, distillation=distillation, base_record=record)

    return Subject(
        build, data, language=True,
        build_student=build_student, build_base=build_base, build_from=build_from, directory=path,
    )  # fmt: skip


def model_directory(config: Config) -> Path:
    """Where the float model lies; the embedded one is trained first if it is not in the cache, a hub's is downloaded.

    Of a quantized file or folder it is a directory of the numbers that its integers stand for, which is told.

    Raises:
        DataError: when there is none.
        CheckpointError: when a quantized one cannot be read.
    """
    place = model_files(config)
    with known_noise_dropped():
        if not is_quantized(place):
            return place
        folder = float_folder(place, checksums=config.model.checksums)
    say(f"{place} is quantized: this run takes the float32 numbers that its integers stand for, kept in {folder}")
    return folder


def model_files(config: Config) -> Path:
    """What the recipe's model is read from: a directory, or a GGUF file.

    Raises:
        DataError: when there is none.
    """
    model = config.model
    with known_noise_dropped():  # transformers imports parts of torchao
        if isinstance(model, EmbeddedModel):
            return embedded_lm(recipe=embedded_recipe(model))
        if Path(model.path).is_file():
            return Path(model.path)
        return find_source(model.path, revision=model.revision).folder


def language_data(config: Config, tokenizer: Any) -> TextData | InstructionData:
    """The recipe's text, tokenized.

    Raises:
        DataError: for text that cannot be used.
    """
    data = _data(config, tokenizer)
    data.setup("fit")
    if isinstance(data, InstructionData):
        say(data.summary)
    return data


def embedded_recipe(model: EmbeddedModel) -> EmbeddedRecipe:
    """The embedded model's recipe as its room knows it."""
    return EmbeddedRecipe(**{name: value for name, value in asdict(model).items() if name not in ("kind", "path")})


def _float(path: Path) -> Any:
    with known_noise_dropped():
        model, _ = load_causal_lm(path)
    return model


def optimizer_schedule(optimizer: Any) -> dict[str, Any]:
    """AdamW's options as the modules that qat builds take them; nothing for an optimizer of the user's."""
    if not isinstance(optimizer, AdamW):
        return {}
    options = {name: value for name, value in asdict(optimizer).items() if name not in ("kind", "bits")}
    return {**options, "optimizer_bits": optimizer.bits}


def _data(config: Config, tokenizer: Any) -> TextData | InstructionData:
    data: Any = config.data
    windows: dict[str, Any] = {
        "sequence_length": data.sequence_length,
        "batch_size": data.batch_size,
        "eval_batch_size": data.eval_batch_size,
        "eval_tokens": data.eval_tokens,
        "seed": config.trainer.seed,
    }
    if isinstance(data, InstructionFiles):
        valid = data.valid and Path(data.valid)
        options = {"packing": data.packing, "answers_only": data.answers_only}
        return InstructionData(tokenizer, Path(data.train), valid, **options, **windows)
    if isinstance(data, TextFiles):
        valid = data.valid and Path(data.valid)
        return TextData(tokenizer, Path(data.train), valid, key=data.key, packing=data.packing, **windows)
    sizes = config.model if isinstance(config.model, EmbeddedModel) else EmbeddedModel()
    corpus = embedded_corpus(train_characters=sizes.train_characters, valid_characters=sizes.valid_characters)
    return TextData(tokenizer, corpus.train_documents, corpus.valid_documents, **windows)
