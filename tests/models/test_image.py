"""The image net: trained on the spot, cached, and through the callback to INT8 and back."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from torch import nn

from qat_plugin import QuantizationAwareTraining, load_converted, proof_of, save_converted
from qat_plugin.data.images import ImageData
from qat_plugin.errors import ConfigError, DataError
from qat_plugin.measure import evaluate_classifier
from qat_plugin.models.image import ImageClassifier, ImageRecipe, trained_net
from qat_plugin.models.resnet import SmallResNet
from qat_plugin.qat.folded import FoldedNorm, folds

SMALL = ImageRecipe(width=4, steps=30)


@pytest.fixture
def data() -> ImageData:
    return ImageData(batch_size=32)


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from qat_plugin.native import native

    native()  # of the usual cache
    monkeypatch.setenv("QAT_PLUGIN_CACHE", str(tmp_path / "cache"))


def trainer(tmp_path: Path, *callbacks: L.Callback, **options: Any) -> L.Trainer:
    return L.Trainer(
        accelerator="cpu", default_root_dir=tmp_path, callbacks=list(callbacks), logger=False,
        enable_progress_bar=False, enable_model_summary=False, num_sanity_val_steps=0, **options,
    )  # fmt: skip


def test_the_net_learns_and_is_cached(data: ImageData) -> None:
    torch.manual_seed(7)
    before = torch.get_rng_state()
    net = trained_net(SMALL, data, progress=False)
    assert torch.equal(torch.get_rng_state(), before)
    assert evaluate_classifier(net, data.val_dataloader(), progress=False).accuracy > 0.2
    again = trained_net(SMALL, data, progress=False)
    assert all(torch.equal(value, again.state_dict()[name]) for name, value in net.state_dict().items())
    with pytest.raises(DataError, match="labels up to 9, the net 5 classes"):
        trained_net(ImageRecipe(classes=5), data)


@pytest.mark.parametrize("options", [{"width": 5}, {"classes": 1}, {"channels": 0}])
def test_sizes_that_cannot_be(options: dict[str, int]) -> None:
    with pytest.raises(ConfigError):
        SmallResNet(**options)


@pytest.mark.parametrize("start", [0, 3])
def test_the_callback_folds_trains_converts_and_ships(start: int, data: ImageData, tmp_path: Path) -> None:
    module = ImageClassifier(trained_net(SMALL, data, progress=False))
    names = list(module.state_dict())
    run = trainer(tmp_path, QuantizationAwareTraining("w8a8-static", start=start), max_steps=8)
    run.fit(module, data)
    assert list(module.state_dict()) == names
    assert len(folds(module)) == sum(isinstance(m, nn.BatchNorm2d) for m in module.modules())
    assert all(layer.inputs == "real" for layer in proof_of(module).layers)
    x, _ = next(iter(data.val_dataloader()))
    expected = module.eval()(x)
    (tested,) = run.test(module, data, verbose=False)
    assert torch.equal(module(x), expected), "the last checkpoint holds what was converted"
    mine = evaluate_classifier(module, data.val_dataloader(), progress=False)
    assert tested["test_accuracy"] == pytest.approx(mine.accuracy, abs=1e-6)
    save_converted(module, tmp_path / "small")
    other = load_converted(ImageClassifier(SMALL.build()), tmp_path / "small").eval()
    assert torch.equal(other(x), expected)


def test_a_float_checkpoint_of_the_run_needs_no_callback(data: ImageData, tmp_path: Path) -> None:
    module = ImageClassifier(trained_net(SMALL, data, progress=False))
    run = trainer(tmp_path, QuantizationAwareTraining("w8a8-static", convert=False), max_steps=4)
    run.fit(module, data)
    run.save_checkpoint(tmp_path / "last.ckpt")
    plain = ImageClassifier(SMALL.build())
    plain.load_state_dict(torch.load(tmp_path / "last.ckpt", weights_only=True)["state_dict"])
    ours = evaluate_classifier(module, data.val_dataloader(), progress=False)
    theirs = evaluate_classifier(plain, data.val_dataloader(), progress=False)
    assert theirs.loss == pytest.approx(ours.loss, rel=0.1)


@pytest.mark.parametrize("stop", [2, 6])
def test_a_run_resumed_before_or_after_the_fold_equals_one_that_was_not_stopped(
    stop: int, data: ImageData, tmp_path: Path
) -> None:
    def pretrained() -> ImageClassifier:
        return ImageClassifier(trained_net(SMALL, data, progress=False))

    whole = fit(pretrained(), data, tmp_path)
    fit(pretrained(), data, tmp_path, StopAt(stop, tmp_path / "stopped.ckpt"))
    resumed = ImageClassifier(SMALL.build())
    fit(resumed, data, tmp_path, ckpt_path=tmp_path / "stopped.ckpt", weights_only=True)
    assert sum(isinstance(m, FoldedNorm) for m in resumed.modules()) == 13
    for name, value in whole.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[name]), name


def fit(module: ImageClassifier, data: ImageData, tmp_path: Path, *stop: L.Callback, **options: Any) -> ImageClassifier:
    """Nine steps at a constant rate, fake-quantized from the fourth on."""
    module.configure_optimizers = lambda: torch.optim.AdamW(module.parameters(), lr=1e-3)
    qat = QuantizationAwareTraining("w8a8-static", start=4, convert=False)
    trainer(tmp_path, qat, *stop, max_steps=9).fit(module, data, **options)
    return module


class StopAt(L.Callback):
    def __init__(self, step: int, path: Path) -> None:
        self.step, self.path = step, path

    def on_train_batch_end(self, trainer: L.Trainer, *args: Any) -> None:
        if trainer.global_step == self.step:
            trainer.save_checkpoint(self.path)
            trainer.should_stop = True
