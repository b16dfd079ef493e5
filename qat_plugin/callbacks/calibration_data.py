"""Which batches a callback calibrates on, and how it reads them without a trace in the run."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any, Final

import lightning as L
import torch
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch import nn
from torch.utils.data import DataLoader

from qat_plugin.callbacks.random_state import capture, restore, seed_all
from qat_plugin.callbacks.resume import _Position
from qat_plugin.errors import ConfigError, DataError

_INSTEAD: Final = "say what to calibrate on, PostTrainingQuantization(..., dataloader=...)"


@dataclass(frozen=True)
class Source:
    """A loader, what it is called in messages, and what to do where it does not serve."""

    loader: Any
    name: str
    instead: str = _INSTEAD


class TransferredBatches:
    """Batches that pass through the module's own transfer hooks each time they are read.

    Args:
        batches: as the loader made them.
        trainer: whose strategy and precision move and convert them.
        pl_module: whose ``on_before_batch_transfer``, ``transfer_batch_to_device`` and ``on_after_batch_transfer`` (or
            its datamodule's) are called.
    """

    def __init__(self, batches: Sequence[Any], trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._batches, self._trainer, self._module = batches, trainer, pl_module

    def __len__(self) -> int:
        return len(self._batches)

    def __iter__(self) -> Iterator[Any]:
        for batch in self._batches:
            converted = self._trainer.precision_plugin.convert_input(batch)
            ready = self._module._on_before_batch_transfer(converted, dataloader_idx=0)
            yield self._trainer.strategy.batch_to_device(ready, dataloader_idx=0)


def network_of(pl_module: L.LightningModule) -> nn.Module:
    """What takes a batch's inputs: the module, or the one model in a module that has no ``forward`` of its own.

    Raises:
        ConfigError: when it has no ``forward`` and not exactly one child with parameters.
    """
    if type(pl_module).forward is not L.LightningModule.forward:
        return pl_module
    models = [child for child in pl_module.children() if any(True for _ in child.parameters())]
    if len(models) != 1:
        raise ConfigError(
            f"{type(pl_module).__name__} has no forward() to calibrate through, and {len(models)} models in it: define "
            "forward() to take a batch's inputs"
        )
    return models[0]


def training_source(trainer: L.Trainer, *, instead: str = _INSTEAD) -> Source:
    """The loader that a fit trains on.

    Args:
        trainer: in or after its fit.
        instead: what to do where that does not work, for the error.

    Raises:
        ConfigError: when there are several.
    """
    return Source(_single(trainer.train_dataloader, "training", instead), "the train dataloader", instead)


def evaluation_source(trainer: L.Trainer, pl_module: L.LightningModule) -> Source:
    """The train dataloader of the datamodule or module, or else the one of the loop that is about to run.

    Raises:
        ConfigError: when there are several training loaders.
    """
    owner: Any = getattr(trainer, "datamodule", None) or pl_module
    if is_overridden("train_dataloader", owner):
        kept = capture()
        try:
            return Source(_single(_train_dataloader(owner), "training"), "the train dataloader")
        finally:
            restore(kept)
    stage = {"validate": "val", "test": "test", "predict": "predict"}[str(trainer.state.fn.value)]  # type: ignore[union-attr]
    loaders = getattr(trainer, f"{stage}_dataloaders")
    loader = loaders[0] if isinstance(loaders, (list, tuple)) and loaders else loaders
    return Source(loader, f"the {stage} dataloader itself, there being no train dataloader")


def first_batches(source: Source, count: int, *, seed: int | None = None) -> list[Any]:
    """The first batches of a loader; every random generator is afterwards as it was, and its iterators go on.

    Args:
        source: what to read.
        count: how many batches, at most.
        seed: for all generators meanwhile, so that the batches are the same at any moment of a run; ``None`` for the
            state that they are in.

    Raises:
        DataError: when there is none, or the loader can be read only once.
    """
    loader = source.loader.loader if isinstance(source.loader, _Position) else source.loader  # exact resume wraps it
    if isinstance(loader, Iterator):
        raise DataError(
            f"{source.name} is an iterator, and calibrating on it would take batches from the run: pass an iterable "
            f"that can be read again, or {source.instead}"
        )
    if isinstance(loader, DataLoader):
        loader = _second_reader(loader)
    generators = _generators(loader)
    kept, own = capture(), [generator.get_state() for generator in generators]
    try:
        if seed is not None:
            seed_all(seed)
            for generator in generators:
                generator.manual_seed(seed)
        batches = list(islice(iter(loader), count))
    finally:
        restore(kept)
        for generator, state in zip(generators, own, strict=True):
            generator.set_state(state)
    if not batches:
        raise DataError(f"there is no calibration data: {source.name} has no batch; {source.instead}")
    return batches


def _second_reader(loader: DataLoader[Any]) -> DataLoader[Any]:
    """The same loader for another pass while one may be under way: persistent workers belong to an iterator, and the
    batch sampler that Lightning predicts with keeps its position in itself."""
    reader = copy.copy(loader)
    reader._iterator = None
    for name in ("sampler", "batch_sampler"):  # DataLoader refuses plain assignment
        reader.__dict__[name] = copy.copy(getattr(loader, name))
    return reader


def _train_dataloader(owner: Any) -> Any:
    """A datamodule that was set up to validate may have no training data yet."""
    try:
        return owner.train_dataloader()
    except Exception as unready:
        if not isinstance(owner, L.LightningDataModule):
            raise
        try:
            owner.setup("fit")
            return owner.train_dataloader()
        except Exception:
            raise unready from None


def _single(loaders: Any, kind: str, instead: str = _INSTEAD) -> Any:
    parts = list(loaders.values()) if isinstance(loaders, dict) else loaders
    if isinstance(parts, (list, tuple)):
        if len(parts) != 1:
            raise ConfigError(
                f"there are {len(parts)} {kind} dataloaders, whose batches the module's forward does not take: "
                f"{instead}"
            )
        return parts[0]
    return loaders


def _generators(loader: Any) -> list[torch.Generator]:
    """Generators that a loader and its samplers draw from."""
    holders = [loader]
    for name in ("sampler", "batch_sampler"):
        holders += [getattr(holder, name) for holder in list(holders) if getattr(holder, name, None) is not None]
    found = [getattr(holder, "generator", None) for holder in holders]
    return list({id(one): one for one in found if isinstance(one, torch.Generator)}.values())
