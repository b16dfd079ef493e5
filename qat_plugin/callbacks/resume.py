"""Resume in the middle of an epoch, to the bit.

Lightning restores weights, optimizers and loop counters, and then reads the data from its first batch again, with
random generators in whatever state the new process has. :class:`ExactResume` saves what is missing: the state of the
generators, where in the data the run was, and the running epoch means of what was logged.

::

    train loader  ->  _Position  ->  CombinedLoader (Lightning)  ->  training_step
                       | remembers the generators before each pass, counts batches
                       | on resume: generators back, skip what was consumed, generators forward
"""

from __future__ import annotations

import random
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import lightning as L
import numpy as np
import torch
from lightning.fabric.utilities.data import sized_len
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities import rank_zero_warn
from lightning.pytorch.utilities.combined_loader import CombinedLoader
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset
from typing_extensions import override

from qat_plugin.callbacks.random_state import States, capture, get_states, restore, set_states

_SKIPPED_WARNING = "You're resuming from a checkpoint that ended before the epoch ended"


class _Position:
    """A loader that knows where it is; everything else is the loader's own.

    Attributes:
        before_pass: the generators when the current pass began.
        yielded: batches of the pass so far.
        apart: fetch with generators of the pass's own. A stream draws from them with every item, between the draws of
            training; to replay it without training, the two must not share generators.
        ahead: Lightning fetches the first batch long before it trains on it, and draws in between.
        arrive: called once, when the next pass begins.
        resume: where that pass begins, if not at its first batch.
    """

    def __init__(self, loader: Any, *, apart: bool) -> None:
        self.loader = loader
        self.apart = apart
        self.ahead = False
        self.before_pass: dict[str, Any] | None = None
        self.yielded = 0
        self.arrive: Callable[[], None] | None = None
        self.resume: dict[str, Any] | None = None

    def __getattr__(self, name: str) -> Any:
        return getattr(self.loader, name)

    def __len__(self) -> int:
        return len(self.loader)

    def __iter__(self) -> Iterator[Any]:
        """One pass. It begins at the first ``next``, when no hook can come between the generators and the order."""
        arrived = self.arrive is not None
        if self.arrive is not None:
            arrive, self.arrive = self.arrive, None
            arrive()
        resume, self.resume = self.resume, None
        now = capture()
        if resume is not None:
            restore(resume["before_pass"])
        self.before_pass, self.yielded = capture(), 0
        batches = iter(self.loader)
        if self.apart:
            batches = _apart(batches)
        if resume is not None:
            for _ in range(resume["consumed"]):
                next(batches)
                self.yielded += 1
            restore(now)
        arrival = capture() if arrived and self.ahead else None
        for batch in batches:
            self.yielded += 1
            yield batch
            if arrival is not None:
                restore(arrival)
                arrival = None


def _apart(batches: Iterator[Any]) -> Iterator[Any]:
    """The same batches, fetched with generators of their own, which are seeded by one draw now."""
    seed, training = int(torch.randint(2**32, ()).item()), get_states()
    torch.default_generator.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed)
    fetching = get_states()
    set_states(training)
    return _swapping(batches, fetching)


def _swapping(batches: Iterator[Any], fetching: States) -> Iterator[Any]:
    while True:
        training = get_states()
        set_states(fetching)
        try:
            batch = next(batches)
        except StopIteration:
            return
        finally:
            fetching = get_states()
            set_states(training)
        yield batch


class ExactResume(Callback):
    """Makes ``trainer.fit(ckpt_path=...)`` continue to the bit, in the middle of an epoch too (on CPU; on CUDA as far
    as its kernels are deterministic).

    Works with any training loader: shuffled, with workers, batch samplers, iterable, several at once. A loader that
    saves its own position (``state_dict`` and ``load_state_dict``) is left to Lightning. Epoch means of logged tensors
    continue; ``torchmetrics`` objects that a module logs keep their own state, as ever (``persistent(True)`` saves it).

    :class:`~qat_plugin.callbacks.QuantizationAwareTraining` includes it.

    Example::

        Trainer(callbacks=[ExactResume()]).fit(module, loader, ckpt_path="last.ckpt")
    """

    def __init__(self) -> None:
        super().__init__()
        self._trainer: L.Trainer | None = None
        self._positions: list[_Position] = []
        self._saved: dict[str, Any] | None = None
        self._saved_results: dict[str, dict[str, Tensor]] = {}

    @override
    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._trainer = trainer
        self._wrap_loaders(trainer)
        if self._saved is not None:
            warnings.filterwarnings("ignore", message=f".*{_SKIPPED_WARNING}.*")
            if reason := _why_inexact(trainer):
                rank_zero_warn(f"ExactResume: {reason}: this run resumes at the right batch, but not to the bit")
            if self._saved["epoch_done"]:
                _leave_ended_epoch(trainer)
            self._seek(self._saved)
        _start_reading(trainer)

    @override
    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        bare = list(_combined_loader(trainer).flattened)
        if not self._wrap_loaders(trainer):
            return
        if self._saved is not None:  # new loaders (reload_dataloaders_every_n_epochs)
            self._seek(self._saved, reloaded=bare)
        _start_reading(trainer)

    @override
    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if self._saved_results:
            _add_results(trainer, self._saved_results)
            self._saved_results = {}

    @override
    def state_dict(self) -> dict[str, Any]:
        if self._trainer is None:
            return {}
        progress = self._trainer.fit_loop.epoch_loop.batch_progress
        return {
            "random": capture(),
            "epoch_done": bool(progress.is_last_batch),
            "validation_due": _validation_due(self._trainer),
            "loaders": self._loader_states(progress.current.ready),
            "results": {} if progress.is_last_batch else _results(self._trainer),
            "metrics": {key: value.detach().cpu().clone() for key, value in _callback_metrics(self._trainer).items()},
        }

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._saved = state_dict or None

    @override
    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        self._trainer, self._positions, self._saved = None, [], None

    def _loader_states(self, trained: int) -> list[dict[str, Any]]:
        """Generators before the pass and batches consumed, per loader; a batch fetched ahead is not consumed."""
        ahead = max(0, max((p.yielded for p in self._positions), default=0) - trained) if self._positions else 0
        return [
            {"before_pass": p.before_pass, "consumed": p.yielded - ahead}
            for p in self._positions
            if p.before_pass is not None
        ]

    def _wrap_loaders(self, trainer: L.Trainer) -> bool:
        """Put a :class:`_Position` around each loader that does not save its own; whether there was any to wrap."""
        combined = _combined_loader(trainer)
        if any(isinstance(loader, _Position) for loader in combined.flattened):
            return False
        apart = any(_is_stream(loader) for loader in combined.flattened)
        wrapped = [loader if _is_stateful(loader) else _Position(loader, apart=apart) for loader in combined.flattened]
        self._positions = [loader for loader in wrapped if isinstance(loader, _Position)]
        combined.flattened = wrapped
        return True

    def _seek(self, saved: dict[str, Any], *, reloaded: Sequence[Any] = ()) -> None:
        """Continue from where the checkpoint was, at the first batch.

        Args:
            saved: the state of the checkpoint.
            reloaded: loaders that Lightning made and began to read after that moment, which drew from the generators.
        """
        if not self._positions:
            self._arrive()
            return
        ahead = _reads_ahead(self._trainer)

        def arrive() -> None:
            self._arrive()
            for batches in [iter(loader) for loader in reloaded]:
                if ahead:
                    next(batches, None)

        self._positions[0].arrive, self._positions[0].ahead = arrive, ahead
        if not saved["epoch_done"]:
            for position, state in zip(self._positions, saved["loaders"], strict=False):
                position.resume = state
            self._saved_results = saved["results"]

    def _arrive(self) -> None:
        """Set the generators as they were when the checkpoint was saved, and do what was due right then."""
        saved, self._saved = self._saved, None
        if saved is None or self._trainer is None:
            return
        restore(saved["random"])
        _callback_metrics(self._trainer).update(saved["metrics"])
        if saved["validation_due"]:
            _validate(self._trainer)


def _combined_loader(trainer: L.Trainer) -> CombinedLoader:
    """Lightning's training loaders; the one private attribute this file needs."""
    combined = getattr(trainer.fit_loop, "_combined_loader", None)
    if not isinstance(combined, CombinedLoader):
        raise RuntimeError(
            f"ExactResume knows Lightning 2.6's fit loop; this is {L.__version__}, whose loop has no _combined_loader"
        )
    return combined


def _reads_ahead(trainer: L.Trainer | None) -> bool:
    """Whether Lightning fetches a batch before it is due: it does when it does not know how many there are."""
    fetcher = None if trainer is None else trainer.fit_loop._data_fetcher
    return fetcher is not None and fetcher.length is None


def _why_inexact(trainer: L.Trainer) -> str:
    """What keeps a resumed run from being bit-exact; empty when nothing does."""
    if trainer.reload_dataloaders_every_n_epochs:  # type: ignore[attr-defined]
        return "reload_dataloaders_every_n_epochs makes new loaders, which draw from the random generators"
    loaders = [getattr(loader, "loader", loader) for loader in _combined_loader(trainer).flattened]
    if len({_is_stream(loader) for loader in loaders}) > 1:
        return "an iterable dataset beside an indexed one"
    return ""


def _start_reading(trainer: L.Trainer) -> None:
    """Begin a pass over the loaders there are now; the iterator that Lightning made before was the bare loaders'."""
    fetcher = trainer.fit_loop._data_fetcher
    if fetcher is not None:
        iter(fetcher)


def _leave_ended_epoch(trainer: L.Trainer) -> None:
    """Go to the next epoch after a checkpoint of the last batch, as Lightning does where it knows how many there are.

    Where it does not (streams), it would train on in the epoch that had ended, or never end.
    """
    loop = trainer.fit_loop.epoch_loop
    if trainer.num_training_batches != float("inf") or not loop.restarted_on_train_batch_end:
        return
    loop.batch_progress.increment_completed()
    loop.batch_progress.reset_on_run()
    loop.scheduler_progress.reset_on_run()
    loop.automatic_optimization.optim_progress.reset_on_run()
    loop.val_loop.batch_progress.total.reset()
    loop.reset_restart_stage()


def _callback_metrics(trainer: L.Trainer) -> dict[str, Tensor]:
    """What ``trainer.callback_metrics`` gathered so far; callbacks monitor it between validations."""
    metrics: dict[str, Tensor] = trainer._logger_connector._callback_metrics
    return metrics


def _validation_due(trainer: L.Trainer) -> bool:
    """Whether the checkpoint is being saved between a training batch and the validation that follows it.

    Lightning skips that validation when it resumes; its metrics, and what it draws from the generators, would be lost.
    """
    loop = trainer.fit_loop.epoch_loop
    counts: Any = loop.batch_progress.current
    between = trainer.training and counts.completed < counts.processed
    fetcher = trainer.fit_loop._data_fetcher
    return between and fetcher is not None and loop._should_check_val_fx(fetcher)


def _validate(trainer: L.Trainer) -> None:
    """The validation inside a fit, as the training loop runs it."""
    loop = trainer.fit_loop.epoch_loop
    trainer.validating = True
    loop.val_loop.restarting = False
    loop.val_loop.run()
    trainer.training = True


def _is_stateful(loader: object) -> bool:
    return hasattr(loader, "state_dict") and hasattr(loader, "load_state_dict")


def _is_stream(loader: object) -> bool:
    """Whether what a loader yields may depend on draws between its batches, or Lightning reads it ahead."""
    if not isinstance(loader, DataLoader) or isinstance(loader.dataset, IterableDataset):
        return True
    return sized_len(loader) is None


def _results(trainer: L.Trainer) -> dict[str, dict[str, Tensor]]:
    """Running epoch reductions of what training logged, by key."""
    results = trainer.fit_loop.epoch_loop._results
    states: dict[str, dict[str, Tensor]] = {}
    for key, metric in results.items():
        if metric.is_tensor and metric.meta.on_epoch:
            names = ("value", "cumulated_batch_size") if metric.meta.is_mean_reduction else ("value",)
            states[key] = {name: getattr(metric, name).detach().cpu().clone() for name in names}
    return states


@torch.no_grad()
def _add_results(trainer: L.Trainer, saved: dict[str, dict[str, Tensor]]) -> None:
    """Add what was accumulated before the stop to what the first batch after it accumulated."""
    for key, metric in trainer.fit_loop.epoch_loop._results.items():
        state = saved.get(key)
        if state is None or not metric.is_tensor:
            continue
        before = state["value"].to(metric.value.device)
        if metric.meta.is_mean_reduction or metric.meta.is_sum_reduction:
            metric.value = before + metric.value
        else:
            metric.value = metric.meta.reduce_fx(before, metric.value)
        if metric.meta.is_mean_reduction:
            metric.cumulated_batch_size = (
                state["cumulated_batch_size"].to(metric.value.device) + metric.cumulated_batch_size
            )
