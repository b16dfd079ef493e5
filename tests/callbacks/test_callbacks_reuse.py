"""While gradients are accumulated and while it evaluates, the callback quantizes each weight once."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from torch import Tensor

from qat_plugin.callbacks import QuantizationAwareTraining
from qat_plugin.callbacks.weight_reuse import TrainerReuse
from qat_plugin.qat import WeightReuse, quantizers
from tests.callbacks.subjects import Classifier, loader, trainer

LAYERS = 3


class Counting(L.Callback):
    """Quantizations and reuses of each stretch between two optimizer steps, and of each validation."""

    def __init__(self) -> None:
        self.training: list[tuple[int, int]] = []
        self.validation: list[tuple[int, int]] = []

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *args: Any) -> None:
        self.training.append(counts(pl_module))

    def on_validation_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *args: Any) -> None:
        self.validation.append(counts(pl_module))


def counts(module: L.LightningModule) -> tuple[int, int]:
    reuse: WeightReuse | None = next(iter(quantizers(module).values())).reuse
    return (0, 0) if reuse is None else (reuse.quantized, reuse.reused)


def fitted(folder: Path, accumulate: int) -> tuple[Counting, dict[str, Tensor]]:
    torch.manual_seed(0)
    module, counting = Classifier(dropout=0.0), Counting()
    callback = QuantizationAwareTraining("w4a8-g32", convert=False)
    run = trainer(folder, callback, counting, max_steps=2, accumulate_grad_batches=accumulate)
    run.fit(module, loader(), loader())
    assert all(quantizer.reuse is None for quantizer in quantizers(module).values())
    return counting, module.state_dict()


def test_each_weight_once_for_an_optimizer_step_and_once_for_a_validation(tmp_path: Path) -> None:
    counting, _ = fitted(tmp_path, accumulate=2)
    assert counting.training[:4] == [(LAYERS, 0), (LAYERS, LAYERS), (2 * LAYERS, LAYERS), (2 * LAYERS, 2 * LAYERS)]
    assert counting.validation[0] == (LAYERS, 0)
    assert {quantized for quantized, _ in counting.validation} == {LAYERS}


def test_without_accumulation_nothing_is_held_in_training(tmp_path: Path) -> None:
    counting, _ = fitted(tmp_path, accumulate=1)
    assert set(counting.training) == {(0, 0)}


def test_the_trained_weights_are_the_same_bits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _, with_reuse = fitted(tmp_path / "with", accumulate=2)
    monkeypatch.setattr(TrainerReuse, "_enter", lambda self, module: None)
    counting, without = fitted(tmp_path / "without", accumulate=2)
    assert set(counting.training) == {(0, 0)}
    assert all(torch.equal(with_reuse[name], without[name]) for name in without)
