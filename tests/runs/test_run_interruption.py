"""Ctrl-C during training: the step is finished, a checkpoint is whole, and going on changes nothing."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import Callback
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from qat_plugin.callbacks import ExactResume
from qat_plugin.config.schema import TrainerConfig
from qat_plugin.errors import CheckpointError, ConfigError
from qat_plugin.runs.interruption import Interrupted, Interruptions
from qat_plugin.runs.training import LAST, accelerator_of, read_checkpoint, train


class Regression(L.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.Linear(4, 1)
        self.losses: list[float] = []

    def training_step(self, batch: list[torch.Tensor], batch_idx: int) -> torch.Tensor:
        loss = (self.layer(batch[0]) - 1).square().mean()
        self.losses.append(loss.item())
        self.log("train_loss", loss)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=0.05)


class Data(L.LightningDataModule):
    def train_dataloader(self) -> Any:
        x = torch.randn(24, 4, generator=torch.Generator().manual_seed(0))
        return DataLoader(TensorDataset(x), batch_size=2)


class Press(Callback):
    """Sends this process a signal during a given batch, before its optimizer step."""

    def __init__(self, number: int, batch: int) -> None:
        self.number, self.batch = number, batch

    def on_train_batch_start(self, trainer: L.Trainer, module: Any, batch: Any, batch_idx: int) -> None:
        if batch_idx == self.batch and trainer.current_epoch == 0:
            os.kill(os.getpid(), self.number)


def fit(folder: Path, callbacks: list[Callback] | None = None, **keys: Any) -> Regression:
    module, interruptions = Regression(), Interruptions()
    config = TrainerConfig(**{"max_steps": 9, "accelerator": "cpu", **keys})
    with interruptions.listening():
        train(
            module,
            Data(),
            config,
            stage="qat",
            folder=folder / "checkpoints" / "qat",
            callbacks=[ExactResume(), *(callbacks or [])],
            interruptions=interruptions,
        )
    return module


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_interrupted_and_resumed_equals_uninterrupted(number: int, accumulate: int, tmp_path: Path) -> None:
    whole = fit(tmp_path / "whole", accumulate=accumulate)
    handlers = (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM))
    with pytest.raises(Interrupted) as caught:
        fit(tmp_path / "parts", [Press(number, 4)], accumulate=accumulate)
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == handlers
    assert caught.value.step == (5 if accumulate == 1 else 3), "the step in hand is finished, accumulation included"
    checkpoint = read_checkpoint(caught.value.checkpoint)
    assert checkpoint["global_step"] == caught.value.step
    resumed = fit(tmp_path / "parts", accumulate=accumulate)
    assert torch.equal(resumed.layer.weight, whole.layer.weight)
    assert torch.equal(resumed.layer.bias, whole.layer.bias)


def test_resuming_what_is_already_trained_trains_no_more(tmp_path: Path) -> None:
    whole = fit(tmp_path)
    again = fit(tmp_path)
    assert again.losses == []
    assert torch.equal(again.layer.weight, whole.layer.weight)


def test_a_checkpoint_is_saved_at_the_interval_and_at_the_end(tmp_path: Path) -> None:
    seen: list[int] = []

    class Look(Callback):
        def on_train_batch_start(self, *args: Any) -> None:
            path = tmp_path / "checkpoints" / "qat" / LAST
            seen.append(read_checkpoint(path)["global_step"] if path.exists() else 0)

    fit(tmp_path, [Look()], checkpoint_interval=4)
    assert seen == [0, 0, 0, 0, 4, 4, 4, 4, 8]
    assert read_checkpoint(tmp_path / "checkpoints" / "qat" / LAST)["global_step"] == 9
    assert [path.name for path in (tmp_path / "checkpoints" / "qat").iterdir()] == [LAST]


def test_checkpoints_are_plain_float_lightning_files(tmp_path: Path) -> None:
    fit(tmp_path)
    content = torch.load(tmp_path / "checkpoints" / "qat" / LAST, weights_only=True)
    assert set(content["state_dict"]) == {"layer.weight", "layer.bias"}
    assert "pytorch-lightning_version" in content


@pytest.mark.parametrize("damage", [lambda b: b[: len(b) // 2], lambda b: b"", lambda b: b"not a checkpoint"])
def test_a_damaged_checkpoint_is_an_error_that_names_it(damage: Any, tmp_path: Path) -> None:
    fit(tmp_path)
    path = tmp_path / "checkpoints" / "qat" / LAST
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(CheckpointError, match=r"last\.ckpt"):
        fit(tmp_path)


def test_outside_of_training_a_signal_interrupts_at_once() -> None:
    interruptions = Interruptions()
    with pytest.raises(KeyboardInterrupt), interruptions.listening():
        os.kill(os.getpid(), signal.SIGTERM)
    assert interruptions.received == 1


def test_cuda_where_there_is_none_is_a_clear_error() -> None:
    if torch.cuda.is_available():
        pytest.skip("this machine has CUDA")
    with pytest.raises(ConfigError, match="no CUDA device"):
        accelerator_of(TrainerConfig(accelerator="cuda"))
    assert accelerator_of(TrainerConfig()) == "cpu"


def test_curves_are_logged_where_the_recipe_asks_for_them(tmp_path: Path) -> None:
    fit(tmp_path, logger="csv", max_steps=10)
    assert (tmp_path / "curves" / "qat" / "metrics.csv").is_file()
