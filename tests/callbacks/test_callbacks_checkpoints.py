"""The checkpoints of a fit: float, readable by anybody, and the best of them converted with its own scales."""

from __future__ import annotations

import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor

from qat_plugin.callbacks import QuantizationAwareTraining
from qat_plugin.conversion import convert, is_converted
from qat_plugin.numerics import quantize
from qat_plugin.qat import initial_scales, load_quantizer_state, prepare
from qat_plugin.scheme import Scheme
from tests.callbacks.subjects import (
    WIDTH,
    Classifier,
    checkpoint,
    dequantized,
    loader,
    quantized,
    quantizers_in,
    trainer,
)


def test_checkpoints_are_float_and_need_no_package(tmp_path: Path) -> None:
    """A process that never imports the package reads them with weights_only, and strictly into the plain module."""
    files = ModelCheckpoint(tmp_path, save_top_k=-1, every_n_train_steps=2, filename="{step}", save_last=True)
    qat = QuantizationAwareTraining("w4a8-g32", start=2, freeze=4, learn_scales=True)
    module = Classifier()
    trainer(tmp_path, qat, files).fit(module, loader(), loader())
    assert is_converted(module)
    script = f"""
import sys, torch
from torch import nn
for path in {[str(path) for path in sorted(tmp_path.glob("*.ckpt"))]!r}:
    saved = torch.load(path, weights_only=True)
    state = {{name.removeprefix("net."): value for name, value in saved["state_dict"].items()}}
    assert all(type(value) is torch.Tensor and value.dtype is torch.float32 for value in state.values())
    net = nn.Sequential(nn.Linear({WIDTH}, 64), nn.Dropout(), nn.ReLU(), nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 4))
    net.load_state_dict(state, strict=True)
    print(path)
assert not [name for name in sys.modules if name.startswith("qat_plugin")]
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.split()) == 4  # steps 2, 4, 6 and last


def test_checkpoints_load_from_checkpoint(tmp_path: Path) -> None:
    files = ModelCheckpoint(tmp_path, save_last=True)
    trainer(tmp_path, QuantizationAwareTraining("w4a8-g32"), files).fit(Classifier(), loader(), loader())
    loaded = Classifier.load_from_checkpoint(files.last_model_path, map_location="cpu")
    saved = checkpoint(files.last_model_path)["state_dict"]
    assert all(torch.equal(value, saved[name]) for name, value in loaded.state_dict().items())


class Worsening(Classifier):
    """Validation gets worse from epoch to epoch: the best checkpoint is the first."""

    def validation_step(self, batch: list[Tensor], batch_idx: int, dataloader_idx: int = 0) -> None:
        self.log("val_loss", float(self.current_epoch))


@pytest.mark.parametrize("options", [{}, {"learn_scales": True}, {"start": 2, "freeze": 4}, {"start": 4}], ids=str)
def test_the_best_weights_are_converted(tmp_path: Path, options: dict[str, Any]) -> None:
    """The integers are those of the best checkpoint with its own scales, not of the weights training ended with."""
    best = ModelCheckpoint(tmp_path, monitor="val_loss", filename="best")
    last = ModelCheckpoint(tmp_path, filename="final")
    module = Worsening()
    qat = QuantizationAwareTraining("w4a16-g32", weights="best", **options)
    run = trainer(tmp_path, qat, best, last, max_steps=-1, max_epochs=3, limit_train_batches=3)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        run.fit(module, loader(), loader())
    assert any("post-training quantization" in str(w.message) for w in caught) == (options == {"start": 4})

    def converted(path: str) -> dict[str, Tensor]:
        saved, twin = checkpoint(path), Worsening()
        prepare(twin, "w4a16-g32", learn_scales="learn_scales" in options)
        twin.load_state_dict(saved["state_dict"])
        load_quantizer_state(twin, quantizers_in(saved))
        return dequantized(convert(twin))

    assert (checkpoint(best.best_model_path)["epoch"], checkpoint(last.best_model_path)["epoch"]) == (0, 2)
    assert len(quantized(module)) == 3
    first, final, now = converted(best.best_model_path), converted(last.best_model_path), dequantized(module)
    assert all(torch.equal(now[name], first[name]) for name in first)
    assert not any(torch.equal(now[name], final[name]) for name in final)


@pytest.mark.parametrize("scheme", ["w4a16-g32", "w4a16-g32-asym"])
@pytest.mark.parametrize("initial", ["minmax", "mse"])
def test_learned_scales_of_a_best_checkpoint_from_before_the_start_are_those_of_its_weights(
    tmp_path: Path, scheme: str, initial: Any
) -> None:
    """Its grid has not begun: it would be that of the weights before training. Reloaded, it begins as it did."""
    torch.manual_seed(0)
    best = ModelCheckpoint(tmp_path, monitor="val_loss", filename="best")
    module = Worsening(learning_rate=0.1)
    qat = QuantizationAwareTraining(scheme, weights="best", start=4, learn_scales=True, initial=initial)
    run = trainer(tmp_path, qat, best, max_steps=-1, max_epochs=3, limit_train_batches=3)
    run.fit(module, loader(), loader())
    weights, grid = checkpoint(best.best_model_path)["state_dict"], Scheme.parse(scheme)
    for reloaded in (False, True):
        if reloaded:
            run.test(module, loader(), ckpt_path="best", verbose=False)  # the float checkpoint into integer layers
        assert len(quantized(module)) == 3
        for name, weight in quantized(module).items():
            expected = quantize(weights[name], *initial_scales(weights[name], grid, initial), grid)
            assert torch.equal(weight.integers().q, expected.q), (name, reloaded)
            assert torch.equal(weight.integers().scale, expected.scale), (name, reloaded)


def test_a_checkpoint_from_before_the_start_goes_on_after_it_was_evaluated(tmp_path: Path) -> None:
    """An evaluation prepares the module for what the checkpoint says; the fit after it is the one not interrupted."""

    def fit(module: Classifier, *, path: Path | None = None) -> dict[str, Tensor]:
        files = ModelCheckpoint(tmp_path / str(path is None), every_n_train_steps=1, filename="{step}", save_top_k=-1)
        qat = QuantizationAwareTraining("w3a16-g32-asym", start=3, learn_scales=True, initial="mse")
        run = trainer(tmp_path, qat, files, max_steps=5)
        if path is not None:
            run.validate(module, loader(), ckpt_path=path, verbose=False)
        run.fit(module, loader(), ckpt_path=path)
        return {name: weight.integers().q for name, weight in quantized(module).items()}

    torch.manual_seed(0)
    whole = fit(Classifier(dropout=0.0))
    resumed = fit(Classifier(dropout=0.0), path=tmp_path / "True" / "step=2.ckpt")
    assert all(torch.equal(resumed[name], integers) for name, integers in whole.items())
