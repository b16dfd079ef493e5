"""The monitor sees what was constructed: flips, oscillation, clipping, scales at their end; and it resumes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor, nn

from qat_plugin import prepare, set_phase
from qat_plugin.callbacks import QuantizationAwareTraining, QuantizationMonitor
from qat_plugin.errors import CheckpointError, ConfigError
from qat_plugin.qat import Phase, set_input_scale
from qat_plugin.qat.drift import DriftWatch
from tests.callbacks.subjects import Classifier, checkpoint, loader, trainer


class Swinging(L.LightningModule):
    """32 x 64 weights on a frozen grid of step 0.1: a quarter swings, a quarter climbs, an eighth lies outside."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Linear(64, 32, bias=False)
        self.automatic_optimization = False
        with torch.no_grad():
            self.net.weight.zero_()
            self.net.weight[:, -1] = 0.7  # the range: a scale of 0.1
        prepare(self, "w4a16")
        set_phase(self, Phase.FROZEN)
        with torch.no_grad():
            self.net.fake_quantizer.frozen_scale.fill_(0.1)
            self.net.weight[:, 40:48] = 5.0

    def training_step(self, batch: list[Tensor], batch_idx: int) -> None:
        (optimizer,) = [self.optimizers()]
        with torch.no_grad():
            self.net.weight[:, :16] = 0.04 if batch_idx % 2 else 0.06
            self.net.weight[:, 16:32] += 0.1
        optimizer.step()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), 0.0)


def rows_of(logger: CSVLogger) -> list[dict[str, str]]:
    header, *lines = Path(logger.log_dir, "metrics.csv").read_text().splitlines()
    return [dict(zip(header.split(","), line.split(","), strict=True)) for line in lines]


def test_a_constructed_oscillation_is_seen_logged_and_advised_on(tmp_path: Path) -> None:
    monitor, logger = QuantizationMonitor(every=1), CSVLogger(tmp_path)
    it = trainer(tmp_path, monitor, max_steps=6, logger=logger, log_every_n_steps=50)
    it.fit(Swinging(), loader())
    logger.save()
    rows = [row for row in rows_of(logger) if row.get("quantization/flipped")]
    assert [int(row["step"]) for row in rows] == [1, 2, 3, 4, 5, 6]
    flipped, oscillating, clipped = (
        [float(row[f"quantization/{name}"]) for row in rows] for name in ("flipped", "oscillating", "clipped")
    )
    assert flipped[1:] == [0.5] * 5
    assert oscillating[2:] == [0.25] * 4, "climbing is not oscillating"
    assert clipped == [0.125] * 6
    assert it.callback_metrics["quantization/flipped"] == 0.5
    assert monitor.advice.startswith("25.0% of the weights of net oscillate between two integers")


def test_clipping_and_scales_at_their_end_are_advised_on(tmp_path: Path) -> None:
    for change, said in (("weight", "of the weights of net.0 lie beyond"), ("scale", "of the scales of net.0 are at")):
        module = Classifier()
        monitor = QuantizationMonitor(every=2)
        prepare(module, {"net.0": "w4a16-g32"}, learn_scales=True)
        with torch.no_grad():
            if change == "weight":
                module.net[0].weight.mul_(4.0)
            else:
                module.net[0].fake_quantizer.grid.relative_scale[:3] = -1.0
        module.learning_rate = 1e-6
        trainer(tmp_path, monitor, max_steps=4).fit(module, loader())
        assert said in monitor.advice


def test_weights_that_stay_are_told(tmp_path: Path) -> None:
    module = Classifier(learning_rate=1e-12)
    monitor = QuantizationMonitor(every=2)
    trainer(tmp_path, QuantizationAwareTraining("w4a16-g32", convert=False), monitor, max_steps=4).fit(module, loader())
    assert "learning rate is too low" in monitor.advice


def test_it_says_when_it_saw_nothing(tmp_path: Path) -> None:
    monitor = QuantizationMonitor()
    qat = QuantizationAwareTraining("w4a16-g32", convert=False)
    trainer(tmp_path, qat, monitor, max_steps=2).fit(Classifier(), loader())
    assert "no look yet" in monitor.advice


@pytest.mark.parametrize("scheme", ["w4a8-g32", "w4a16-g32-asym", "w8a8", "w8a16-tensor"])
@pytest.mark.parametrize("learn_scales", [False, True])
@pytest.mark.parametrize("divided", [False, True])
def test_a_sample_is_whole_rows_on_their_own_scales(scheme: str, learn_scales: bool, divided: bool) -> None:
    model = prepare(nn.Sequential(nn.Linear(64, 40)), scheme, learn_scales=learn_scales)
    if divided:
        set_input_scale(model[0], torch.rand(64) * 3 + 0.1)
    watch, all_of_it = DriftWatch(model[0], 640), DriftWatch(model[0], 10**6)
    first, whole = watch.look(), all_of_it.look()
    assert watch.integers is not None and watch.integers.shape == (10, 64)
    assert torch.equal(watch.integers, model[0].fake_quantizer.integers(model[0].weight).q[::4])
    assert all_of_it.integers is not None and all_of_it.integers.shape == (40, 64)
    assert first.flipped == whole.flipped == 0.0


def test_it_resumes_where_it_was(tmp_path: Path) -> None:
    def run(folder: Path, path: Path | None = None) -> tuple[QuantizationMonitor, dict[str, Any]]:
        L.seed_everything(0, verbose=False)
        monitor = QuantizationMonitor(every=2)
        qat = QuantizationAwareTraining("w3a16-g32-asym", learn_scales=True, convert=False)
        files = ModelCheckpoint(folder, save_top_k=-1, every_n_train_steps=1, filename="{step}")
        it = trainer(folder, qat, monitor, files, max_steps=9)
        it.fit(Classifier(), loader(), ckpt_path=path, weights_only=True)
        return monitor, {name: float(value) for name, value in it.callback_metrics.items()}

    whole, metrics = run(tmp_path)
    assert checkpoint(tmp_path / "step=5.ckpt")["callbacks"]
    for step in (3, 4, 5):
        resumed, again = run(tmp_path / "again", tmp_path / f"step={step}.ckpt")
        assert resumed.advice == whole.advice
        quantization = [name for name in metrics if name.startswith("quantization/")]
        assert len(quantization) == 4
        assert {name: again[name] for name in quantization} == {name: metrics[name] for name in quantization}


def test_mistakes(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="every=0 is not allowed"):
        QuantizationMonitor(every=0)
    with pytest.raises(ConfigError, match="weights=0 is not allowed"):
        QuantizationMonitor(weights=0)
    with pytest.raises(ConfigError, match="found no quantized layer in Classifier"):
        trainer(tmp_path, QuantizationMonitor()).fit(Classifier(), loader())
    model = prepare(nn.Sequential(nn.Linear(64, 40)), "w8a8")
    watch = DriftWatch(model[0], 640)
    watch.look()
    with pytest.raises(CheckpointError, match=r"looked at \[10, 64\] weights, now at \[40, 64\]"):
        DriftWatch(model[0], 10**6).import_state(watch.export_state())
