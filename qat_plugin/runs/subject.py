"""What a run is about: a model that can be made anew as often as needed, its data, and how it is measured."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import lightning as L
import torch
from torch import nn

from qat_plugin.config.schema import Config
from qat_plugin.measure import evaluate_classifier, evaluate_lm
from qat_plugin.models.causal_lm import CausalLM
from qat_plugin.models.image import ImageClassifier
from qat_plugin.report.model import Metrics
from qat_plugin.runs.training import accelerator_of

Batch = Any
Workloads = dict[str, Any]


@dataclass(frozen=True)
class Subject:
    """A model and its data.

    Attributes:
        build: makes the LightningModule with the weights to start from, each time the same, in the float type of
            training and on the device of measurement.
        data: set up.
        language: a causal language model (batches with ``input_ids`` and ``labels`` of one shape), else a classifier.
        build_student: as ``build``, with a teacher to learn from where the recipe distills.
        build_base: as ``build``, with what the policy makes NF4 quantized while it is loaded.
        directory: where a language model's files lie; ``None`` for others.
        build_from: as ``build``, from another directory of the same model.
    """

    build: Callable[[], L.LightningModule]
    data: L.LightningDataModule
    language: bool
    build_student: Callable[[], L.LightningModule]
    build_base: Callable[[], L.LightningModule]
    directory: Path | None = None
    build_from: Callable[[Path], L.LightningModule] | None = None

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
                    stack.enter_context(casting_inputs(model))
            metrics: Metrics = measure(network, loader, reference=reference)
        return metrics

    def held_out(self) -> Any:
        """Batches to evaluate on."""
        return first_loader(self.data.val_dataloader())

    def training_batches(self, count: int) -> list[Batch]:
        """The first batches of the training data."""
        return list(islice(first_loader(self.data.train_dataloader()), count))

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
def casting_inputs(model: nn.Module) -> Iterator[None]:
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
    return module.model if isinstance(module, (CausalLM, ImageClassifier)) else module


def name_prefix(module: L.LightningModule) -> str:
    """What stands before the names of the network's layers in the LightningModule."""
    network = network_of(module)
    return next(f"{name}." if name else "" for name, child in module.named_modules() if child is network)


def placed(module: L.LightningModule, config: Config) -> L.LightningModule:
    """A module in the float type of training and on the device of measurement."""
    if config.trainer.precision == "bf16-true":
        module.to(torch.bfloat16)
    return module.to(accelerator_of(config.trainer))


def _rows(inputs: Any, count: int) -> Any:
    return {name: value[:count] for name, value in inputs.items()} if isinstance(inputs, dict) else inputs[:count]


def first_loader(loaders: Any) -> Any:
    """The first of several loaders."""
    return loaders[0] if isinstance(loaders, (list, tuple)) else loaders
