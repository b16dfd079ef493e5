"""What a run is about: a model that can be made anew as often as needed, its data, and how it is measured."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch import nn

from qat_plugin.config.schema import AdamW, Config, EmbeddedModel, EmbeddedText, TextFiles, TransformersModel
from qat_plugin.config.targets import instantiate, is_target
from qat_plugin.config.typed import option_of
from qat_plugin.data.embedded import embedded_corpus
from qat_plugin.data.text import TextData
from qat_plugin.errors import ConfigError, did_you_mean
from qat_plugin.measure import evaluate_classifier, evaluate_lm
from qat_plugin.models.causal_lm import CausalLM, load_causal_lm
from qat_plugin.models.embedded import EmbeddedRecipe, embedded_lm
from qat_plugin.report.model import Metrics
from qat_plugin.runs.training import accelerator_of

Batch = Any
Workloads = dict[str, Any]
_NESTED = (nn.Module,)


@dataclass(frozen=True)
class Subject:
    """A model and its data.

    Attributes:
        build: makes the LightningModule with the weights to start from, each time the same, in the float type of
            training and on the device of measurement.
        data: set up.
        language: a causal language model (batches with ``input_ids`` and ``labels`` of one shape), else a classifier.
    """

    build: Callable[[], L.LightningModule]
    data: L.LightningDataModule
    language: bool

    @property
    def fingerprint(self) -> str:
        """sha256 of the data where the DataModule knows it, else an empty string."""
        return str(getattr(self.data, "fingerprint", ""))

    def evaluate(
        self, network: nn.Module, reference: nn.Module | None, batches: Iterable[Batch] | None = None
    ) -> Metrics:
        """Measure a network on the held-out data (or on ``batches``), against a reference if there is one."""
        loader = self.held_out() if batches is None else batches
        measure: Any = evaluate_lm if self.language else evaluate_classifier
        with ExitStack() as stack:
            for model in (network, reference):
                if model is not None:
                    stack.enter_context(_casting_inputs(model))
            metrics: Metrics = measure(network, loader, reference=reference)
        return metrics

    def held_out(self) -> Any:
        """Batches to evaluate on."""
        return _only(self.data.val_dataloader())

    def training_batches(self, count: int) -> list[Batch]:
        """The first batches of the training data."""
        return list(islice(_only(self.data.train_dataloader()), count))

    def workloads(self, lengths: Iterable[int]) -> Workloads:
        """What to time: passes over so many tokens, or for a classifier over one example and a whole batch."""
        batch = next(iter(self.held_out()))
        if self.language:
            ids = batch["input_ids"]
            row = ids[:1].repeat(1, -(-max(lengths, default=1) // ids.shape[1]))
            return {f"batch 1, {n} token{'s' if n > 1 else ''}": {"input_ids": row[:, :n]} for n in lengths}
        inputs = {k: v for k, v in batch.items() if k != "labels"} if isinstance(batch, Mapping) else batch[0]
        size = len(next(iter(inputs.values())) if isinstance(inputs, dict) else inputs)
        return {f"batch {n}": _rows(inputs, n) for n in dict.fromkeys((1, size))}


@contextmanager
def _casting_inputs(model: nn.Module) -> Iterator[None]:
    """Float inputs in the model's own float type, as Lightning's precision plugins and the timing give them."""
    dtype = next((weight.dtype for weight in model.parameters() if weight.is_floating_point()), torch.float32)

    def cast(value: Any) -> Any:
        return value.to(dtype) if isinstance(value, torch.Tensor) and value.is_floating_point() else value

    def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        return tuple(cast(value) for value in args), {name: cast(value) for name, value in kwargs.items()}

    handle = model.register_forward_pre_hook(hook, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


def network_of(module: L.LightningModule) -> nn.Module:
    """The model inside a LightningModule: what is measured, converted and shipped."""
    return module.model if isinstance(module, CausalLM) else module


def name_prefix(module: L.LightningModule) -> str:
    """What stands before the names of the network's layers in the LightningModule."""
    network = network_of(module)
    return next(f"{name}." if name else "" for name, child in module.named_modules() if child is network)


def subject_of(config: Config, allow: tuple[str, ...]) -> Subject:
    """Load or build what a recipe names.

    Raises:
        ConfigError: for options that do not go together, a path that does not exist, a class that is not allowed.
        DataError: for data that cannot be used.
        CheckpointError: for a model that cannot be loaded.
    """
    L.seed_everything(config.trainer.seed, workers=True, verbose=False)
    if option_of(config, "model") == "custom":
        return _custom(config, allow)
    path = language_model_path(config.model)
    _, tokenizer = load_causal_lm(path)
    data = _text(config, config.data, tokenizer)
    data.setup()
    return Subject(lambda: _language_module(config, path, allow), data, language=True)


def language_model_path(model: EmbeddedModel | TransformersModel) -> Path:
    """The directory of the model; the embedded one is trained first if it is not in the cache."""
    if isinstance(model, EmbeddedModel):
        return embedded_lm(recipe=embedded_recipe(model))
    return Path(model.path).expanduser()


def embedded_recipe(model: EmbeddedModel) -> EmbeddedRecipe:
    """The embedded model's recipe as its room knows it."""
    return EmbeddedRecipe(**{name: value for name, value in asdict(model).items() if name != "kind"})


def check_choices(config: Config) -> None:
    """Raise for options that do not go together and paths that do not exist, before anything expensive happens.

    Raises:
        ConfigError: with what to choose instead, or the closest name beside a path.
    """
    if option_of(config, "model") == "custom":
        if not is_target(config.data):
            raise ConfigError(
                "model=custom needs data=custom: your own LightningDataModule, data._target_=package.Class"
            )
        return
    if option_of(config, "optimizer") == "own":
        raise ConfigError("optimizer=own is for model=custom: a language model that qat loads has none of its own")
    if not isinstance(config.data, (EmbeddedText, TextFiles)):
        raise ConfigError("data=custom is for model=custom; with a language model use data=text or data=embedded")
    named: list[tuple[str, str | None]] = []
    if isinstance(config.model, TransformersModel):
        named.append(("model.path", config.model.path))
    if isinstance(config.data, TextFiles):
        named += [("data.train", config.data.train), ("data.valid", config.data.valid)]
    for key, given in named:
        path = None if given is None else Path(given).expanduser()
        if path is not None and not path.exists():
            folder = path.absolute().parent
            near = did_you_mean(path.name, [entry.name for entry in folder.iterdir()] if folder.is_dir() else [])
            raise ConfigError(f"{key}={given} does not exist (looked for {path.absolute()}).{near}")


def _language_module(config: Config, path: Path, allow: tuple[str, ...]) -> L.LightningModule:
    model, tokenizer = load_causal_lm(path)
    module = CausalLM(model, tokenizer, **_schedule(config.optimizer))
    return _placed(_with_optimizer(module, config, allow), config)


def _schedule(optimizer: Any) -> dict[str, Any]:
    if isinstance(optimizer, AdamW):
        return {
            "learning_rate": optimizer.learning_rate,
            "weight_decay": optimizer.weight_decay,
            "warmup_steps": optimizer.warmup_steps,
        }
    return {}


def _text(config: Config, data: EmbeddedText | TextFiles, tokenizer: Any) -> TextData:
    if isinstance(data, TextFiles):
        key = data.key
        sources: tuple[Any, Any] = (Path(data.train).expanduser(), data.valid and Path(data.valid).expanduser())
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


def _custom(config: Config, allow: tuple[str, ...]) -> Subject:
    _see_working_directory(allow)
    data = instantiate(config.data, (L.LightningDataModule,), nested=_NESTED, allow=allow, where="data")
    data.prepare_data()
    data.setup("fit")
    batch = next(iter(_only(data.val_dataloader())), None)
    ids, labels = (batch.get("input_ids"), batch.get("labels")) if isinstance(batch, Mapping) else (None, None)
    language = ids is not None and labels is not None and ids.shape == labels.shape
    return Subject(lambda: build_custom(config, allow), data, language)


def build_custom(config: Config, allow: tuple[str, ...]) -> L.LightningModule:
    """The user's own LightningModule, its weights a function of the seed.

    Raises:
        ConfigError: when its class or its arguments are not allowed.
    """
    _see_working_directory(allow)
    L.seed_everything(config.trainer.seed, workers=True, verbose=False)
    module = instantiate(config.model, (L.LightningModule,), nested=_NESTED, allow=allow, where="model")
    return _placed(_with_optimizer(module, config, allow), config)


def _see_working_directory(allow: tuple[str, ...]) -> None:
    """A package that was allowed by name may lie in the working directory, where a console script does not look."""
    if allow and "" not in sys.path:
        sys.path.append("")


def _with_optimizer(module: L.LightningModule, config: Config, allow: tuple[str, ...]) -> L.LightningModule:
    """The module, its ``configure_optimizers`` replaced where the recipe names an optimizer class."""
    spec, name = config.optimizer, type(module).__name__
    if is_target(spec):

        def configure_optimizers() -> torch.optim.Optimizer:
            weights = [parameter for parameter in module.parameters() if parameter.requires_grad]
            made: torch.optim.Optimizer = instantiate(
                spec, (torch.optim.Optimizer,), nested=(), allow=allow, where="optimizer", first=(weights,)
            )
            return made

        configure_optimizers()
        module.configure_optimizers = configure_optimizers  # type: ignore[method-assign]
    elif not isinstance(module, CausalLM):
        if option_of(config, "optimizer") != "own":
            raise ConfigError(
                f"optimizer={option_of(config, 'optimizer')} is for the language models that qat loads; with "
                f"model=custom say optimizer=own (the configure_optimizers of {name}) or optimizer=custom"
            )
        if not is_overridden("configure_optimizers", module):
            raise ConfigError(f"optimizer=own: {name} has no configure_optimizers; define it, or use optimizer=custom")
    return module


def _placed(module: L.LightningModule, config: Config) -> L.LightningModule:
    """In the float type of training and on the device of measurement."""
    if config.trainer.precision == "bf16-true":
        module.to(torch.bfloat16)
    return module.to(accelerator_of(config.trainer))


def _rows(inputs: Any, count: int) -> Any:
    return {name: value[:count] for name, value in inputs.items()} if isinstance(inputs, dict) else inputs[:count]


def _only(loaders: Any) -> Any:
    """The first of several loaders."""
    return loaders[0] if isinstance(loaders, (list, tuple)) else loaders
