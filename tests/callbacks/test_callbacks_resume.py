"""A run stopped after any step and resumed ends as the run that was never stopped, to the bit.

The reference is the uninterrupted run itself; each resumed run starts from other weights and other generators.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor
from torch.utils.data import BatchSampler, Dataset, IterableDataset, RandomSampler, Sampler

from qat_plugin.callbacks import ExactResume, QuantizationAwareTraining
from qat_plugin.qat import get_phase, is_prepared, quantizer_state
from tests.callbacks.subjects import Classifier, loader, trainer, vectors


class Noisy(Classifier):
    """Draws from every generator there is: dropout, Python's and NumPy's; validation draws too."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        if isinstance(batch, dict):  # two loaders
            batch = [torch.cat([part[i] for part in batch.values()]) for i in range(2)]
        batch = [batch[0] * (1 + 0.1 * random.random() + 0.1 * np.random.rand()), batch[1]]
        return super().training_step(batch, batch_idx)

    def validation_step(self, batch: list[Tensor], batch_idx: int, dataloader_idx: int = 0) -> None:
        noisy = batch[0] + 0.1 * torch.randn_like(batch[0])
        super().validation_step([noisy, batch[1]], batch_idx, dataloader_idx)


class Stream(IterableDataset[Any]):
    """Has no length, and an order that it draws as it goes (a shuffle buffer)."""

    def __iter__(self) -> Iterator[Any]:
        data = vectors()
        buffer = list(range(48))
        while buffer:
            x, y = data[buffer.pop(random.randrange(len(buffer)))]
            yield x + 0.01 * torch.randn_like(x), y


class Augmented(Dataset[Any]):
    """Draws with every item."""

    def __len__(self) -> int:
        return 48

    def __getitem__(self, index: int) -> Any:
        x, y = vectors()[index]
        return x * (1 + 0.1 * float(np.random.rand())) + 0.01 * torch.randn_like(x), y


class Unsized(Sampler[int]):
    """A sampler without a length: Lightning reads its loader one batch ahead."""

    def __iter__(self) -> Iterator[int]:
        yield from torch.randperm(48).tolist()


@dataclass(frozen=True)
class Case:
    """A run: how its callback, its data and its Trainer are set up."""

    policy: str = "w4a8-g32"
    callback: dict[str, Any] = field(default_factory=dict)
    trainer: dict[str, Any] = field(default_factory=dict)
    data: Callable[[], Any] = lambda: loader(shuffle=True)


@dataclass(frozen=True)
class Ending:
    """All that a run leaves behind."""

    weights: dict[str, Tensor]
    optimizer: dict[str, Any]
    quantizers: dict[str, Any]
    metrics: dict[str, float]
    losses: list[float]
    epoch: int
    random: tuple[bytes, float, float]


def run(case: Case, folder: Path, *savers: ModelCheckpoint, seed: int = 0, path: Path | None = None) -> Ending:
    L.seed_everything(seed, verbose=False)
    module = Noisy()
    qat = QuantizationAwareTraining(case.policy, convert=False, **case.callback)
    # the same callbacks in both, since they see the same hooks; a resumed run saves beside the first one
    options = {"max_steps": 8, **case.trainer}
    it = trainer(folder, qat, *savers, **options)
    it.fit(module, case.data(), loader(), ckpt_path=path, weights_only=True)
    assert is_prepared(module)
    return Ending(
        {name: value.clone() for name, value in module.state_dict().items()},
        it.optimizers[0].state_dict(),
        quantizer_state(module) | {"phase": get_phase(module).value},
        {name: value.item() for name, value in it.callback_metrics.items()},
        module.losses,
        it.current_epoch,
        (torch.get_rng_state().numpy().tobytes(), random.random(), float(np.random.rand())),
    )


def assert_same(resumed: Ending, whole: Ending, where: str) -> None:
    for part in ("weights", "optimizer", "quantizers"):
        assert_equal(getattr(resumed, part), getattr(whole, part), f"{where}: {part}")
    if not resumed.losses:  # the checkpoint of the last step: there was nothing left to train
        return
    assert resumed.losses == whole.losses[len(whole.losses) - len(resumed.losses) :], where
    assert resumed.metrics == whole.metrics, where
    assert resumed.epoch == whole.epoch, where
    assert resumed.random == whole.random, where


def assert_equal(left: Any, right: Any, where: str) -> None:
    """Equality of nested containers, to the bit for tensors."""
    if isinstance(left, dict):
        assert left.keys() == right.keys(), where
        for key in left:
            assert_equal(left[key], right[key], f"{where}.{key}")
    elif isinstance(left, list | tuple):
        assert len(left) == len(right), where
        for index, pair in enumerate(zip(left, right, strict=True)):
            assert_equal(*pair, f"{where}[{index}]")
    elif isinstance(left, Tensor):
        assert left.dtype == right.dtype and torch.equal(left, right), where
    else:
        assert left == right, where


def every_step(folder: Path) -> ModelCheckpoint:
    return ModelCheckpoint(
        folder, save_top_k=-1, every_n_train_steps=1, filename="{step}", auto_insert_metric_name=True
    )


CASES = {
    "shuffled": Case(),
    "workers": Case(
        trainer={"max_steps": 7, "val_check_interval": 3}, data=lambda: loader(shuffle=True, num_workers=2)
    ),
    "accumulation": Case(trainer={"accumulate_grad_batches": 2, "max_steps": 5}),
    "validation-in-the-epoch": Case(trainer={"val_check_interval": 2}),
    "static": Case("w8a8-static", {"start": 3, "freeze": 6}),
    "learned-scales": Case("w8a8", {"learn_scales": True, "start": 2, "freeze": 0.75}),
    "asymmetric-learned": Case("w4a16-g32-asym", {"learn_scales": True}),
    "iterable": Case(trainer={"val_check_interval": 4}, data=lambda: loader(Stream())),
    "streams-with-workers": Case(data=lambda: loader(Stream(), num_workers=1), trainer={"max_steps": 8}),
    "augmented": Case(data=lambda: loader(Augmented(), shuffle=True), trainer={"val_check_interval": 3}),
    "without-a-length": Case(data=lambda: loader(Augmented(), sampler=Unsized())),
    "two-loaders": Case(data=lambda: {"a": loader(shuffle=True), "b": loader(shuffle=True, batch_size=6)}),
    "batch-sampler": Case(
        data=lambda: loader(batch_sampler=BatchSampler(RandomSampler(range(48)), 8, False), batch_size=1)
    ),
    "without-validation": Case(trainer={"limit_val_batches": 0, "num_sanity_val_steps": 0}),
    "limited": Case(trainer={"limit_train_batches": 3, "max_epochs": 3, "max_steps": -1}),
    "bf16": Case(trainer={"precision": "bf16-mixed"}),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_resumed_after_any_step(tmp_path: Path, case: Case) -> None:
    whole = run(case, tmp_path, every_step(tmp_path))
    files = sorted(tmp_path.glob("*.ckpt"), key=lambda path: int(path.stem.split("=")[1]))
    assert len(files) >= 5
    for path in files:
        resumed = run(case, tmp_path, every_step(tmp_path / "again"), seed=99, path=path)
        assert_same(resumed, whole, f"{path.stem} of {[file.stem for file in files]}")


SAVERS: dict[str, dict[str, Any]] = {
    "validation-end": {"monitor": "val_loss", "every_n_epochs": 1},
    "epoch-end": {"every_n_epochs": 1, "save_on_train_epoch_end": True},
}


@pytest.mark.parametrize("saver", SAVERS.values(), ids=SAVERS.keys())
@pytest.mark.parametrize("interval", [1.0, 0.5], ids=["one-validation", "two-validations"])
def test_resumed_after_any_epoch(tmp_path: Path, saver: dict[str, Any], interval: float) -> None:
    case = Case(trainer={"max_epochs": 4, "max_steps": -1, "limit_train_batches": 4, "val_check_interval": interval})
    options: dict[str, Any] = {"save_top_k": -1, "filename": "{epoch}-{step}", **saver}
    whole = run(case, tmp_path, ModelCheckpoint(tmp_path, **options))
    files = sorted(tmp_path.glob("*.ckpt"))
    assert len(files) == (8 if "monitor" in saver and interval < 1 else 4)
    for path in files:
        resumed = run(case, tmp_path, ModelCheckpoint(tmp_path / "again", **options), seed=99, path=path)
        assert_same(resumed, whole, path.stem)


def test_a_stream_resumed_after_any_epoch(tmp_path: Path) -> None:
    """Lightning knows its last batch only when it has read it."""
    case = Case(trainer={"max_epochs": 3, "max_steps": -1}, data=lambda: loader(Stream()))
    saver: dict[str, Any] = {"save_top_k": -1, "filename": "{epoch}-{step}", "save_on_train_epoch_end": True}
    whole = run(case, tmp_path, ModelCheckpoint(tmp_path, **saver))
    files = sorted(tmp_path.glob("*.ckpt"))
    assert len(files) == 3
    for path in files:
        resumed = run(case, tmp_path, ModelCheckpoint(tmp_path / "again", **saver), seed=99, path=path)
        assert_same(resumed, whole, path.stem)


def test_resumed_twice(tmp_path: Path) -> None:
    """Stopped, resumed, stopped in another epoch, resumed: what was skipped the first time is not skipped again."""
    case = Case(callback={"start": 2})
    whole = run(case, tmp_path, every_step(tmp_path / "whole"))
    folders = [tmp_path / name for name in ("whole", "second", "third")]
    run(case, tmp_path, every_step(folders[1]), seed=1, path=folders[0] / "step=2.ckpt")
    last = run(case, tmp_path, every_step(folders[2]), seed=2, path=folders[1] / "step=4.ckpt")
    assert_same(last, whole, "step=4 of the resumed run")
    last = run(case, tmp_path, every_step(folders[2]), seed=2, path=folders[1] / "step=7.ckpt")
    assert_same(last, whole, "step=7 of the resumed run")


def test_an_ended_run_goes_on_with_more_steps(tmp_path: Path) -> None:
    case = Case(callback={"start": 2}, trainer={"max_steps": 9})
    whole = run(case, tmp_path, every_step(tmp_path / "whole"))
    short = Case(callback={"start": 2}, trainer={"max_steps": 5})
    run(short, tmp_path, every_step(tmp_path / "short"))
    resumed = run(case, tmp_path, every_step(tmp_path / "again"), seed=3, path=tmp_path / "short" / "step=5.ckpt")
    assert_same(resumed, whole, "step=5")


def test_without_exact_resume_weights_and_phase_still_return(tmp_path: Path) -> None:
    """The option that saves no generators: training goes on from the same scales and phase, on other batches."""
    case = Case("w8a8-static", {"start": 2, "exact_resume": False})
    whole = run(case, tmp_path, every_step(tmp_path))
    resumed = run(case, tmp_path, every_step(tmp_path / "again"), seed=99, path=tmp_path / "step=4.ckpt")
    assert resumed.quantizers["phase"] == whole.quantizers["phase"] == "fake-quantized"
    batches = [e.quantizers["layers"]["net.0"]["batches"].item() for e in (whole, resumed)]
    assert batches == [8, 8]
    assert resumed.losses != whole.losses[4:]


def test_exact_resume_alone(tmp_path: Path) -> None:
    """It serves a training without any quantization as well."""

    def fit(folder: Path, seed: int, path: Path | None = None) -> Noisy:
        L.seed_everything(seed, verbose=False)
        module = Noisy()
        trainer(folder, ExactResume(), every_step(folder), max_steps=8).fit(
            module, loader(shuffle=True), loader(), ckpt_path=path
        )
        return module

    whole = fit(tmp_path, 0)
    for step in (3, 6, 7):
        again = fit(tmp_path / "again", 99, tmp_path / f"step={step}.ckpt")
        assert again.losses == whole.losses[step:]
        assert_equal(again.state_dict(), whole.state_dict(), f"step {step}")


@pytest.mark.parametrize(
    "case",
    [
        Case(trainer={"reload_dataloaders_every_n_epochs": 1, "limit_train_batches": 3}),
        Case(data=lambda: {"a": loader(Stream()), "b": loader(shuffle=True)}),
    ],
    ids=["reloaded", "stream-beside-indexed"],
)
def test_what_does_not_resume_to_the_bit_says_so(tmp_path: Path, case: Case) -> None:
    run(case, tmp_path, every_step(tmp_path / "steps"))
    with pytest.warns(UserWarning, match="not to the bit"):
        run(case, tmp_path, path=tmp_path / "steps" / "step=4.ckpt")
