"""Observers in Lightning: they watch training batches only, agree with a plain loop, and stay frozen after a resume."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor

from qat_plugin.callbacks import QuantizationAwareTraining
from qat_plugin.errors import CheckpointError, ConfigError, DataError
from qat_plugin.observers import make_observer
from qat_plugin.qat import Phase, get_phase, quantizer_state
from tests.callbacks.subjects import Classifier, checkpoint, loader, quantizers_in, trainer, vectors

OBSERVERS = ["minmax", "moving-average:0.5", "percentile:99", "mse", "entropy"]


class Loud(Classifier):
    """Evaluates on inputs a thousand times larger, twice over."""

    def validation_step(self, batch: list[Tensor], batch_idx: int, dataloader_idx: int = 0) -> None:
        super().validation_step([batch[0] * 1000, batch[1]], batch_idx)

    def test_step(self, batch: list[Tensor], batch_idx: int) -> None:
        super().test_step([batch[0] * 1000, batch[1]], batch_idx)


def module() -> Loud:
    torch.manual_seed(0)
    return Loud(dropout=0.0)


def qat(observer: str, **options: Any) -> QuantizationAwareTraining:
    return QuantizationAwareTraining("w8a8-static", observer=observer, convert=False, **options)


def statistics(subject: Any) -> dict[str, dict[str, Tensor]]:
    found: dict[str, dict[str, Tensor]] = quantizer_state(subject)["layers"]
    return found


def equal(mine: dict[str, dict[str, Tensor]], other: dict[str, dict[str, Tensor]]) -> bool:
    flat, flat_other = (
        {(name, key): value for name, tensors in layers.items() for key, value in tensors.items()}
        for layers in (mine, other)
    )
    return flat.keys() == flat_other.keys() and all(torch.equal(value, flat_other[key]) for key, value in flat.items())


@pytest.mark.parametrize("observer", OBSERVERS)
def test_validation_test_and_predict_move_nothing(tmp_path: Path, observer: str) -> None:
    plain, validated = module(), module()
    trainer(tmp_path, qat(observer)).fit(plain, loader())
    run = trainer(tmp_path, qat(observer), val_check_interval=1)
    run.fit(validated, loader(), loader())
    run.validate(validated, loader(), verbose=False)
    run.test(validated, loader(), verbose=False)
    run.predict(validated, loader())
    assert equal(statistics(plain), statistics(validated))


@pytest.mark.parametrize("observer", OBSERVERS)
def test_the_first_layer_observes_just_the_training_batches(tmp_path: Path, observer: str) -> None:
    subject, expected = module(), make_observer(observer)
    trainer(tmp_path, qat(observer), max_steps=4).fit(subject, loader(), loader())
    for batch, _ in list(loader())[:4]:
        expected(batch)
    found = statistics(subject)["net.0"]
    assert all(torch.equal(found[name], value) for name, value in expected.named_buffers())


@pytest.mark.parametrize("observer", OBSERVERS)
def test_a_frozen_observer_stays_frozen_after_a_resume(tmp_path: Path, observer: str) -> None:
    files = ModelCheckpoint(tmp_path, every_n_train_steps=4, filename="{step}", save_top_k=-1)
    trainer(tmp_path, qat(observer, start=1, freeze=3), files, max_steps=4).fit(module(), loader())
    saved = quantizers_in(checkpoint(tmp_path / "step=4.ckpt"))
    assert (saved["phase"], saved["observer"]) == ("frozen", observer)

    resumed = module()
    louder = loader(torch.utils.data.TensorDataset(vectors()[:][0] * 100, vectors()[:][1]))
    run = trainer(tmp_path / "again", qat(observer, start=1, freeze=3), max_steps=6)
    run.fit(resumed, louder, louder, ckpt_path=tmp_path / "step=4.ckpt")
    assert run.global_step == 6
    assert get_phase(resumed) is Phase.FROZEN
    for name, tensors in saved["layers"].items():
        assert all(torch.equal(value, statistics(resumed)[name][key]) for key, value in tensors.items())


@pytest.mark.parametrize("observer", ["moving-average", "mse"])
def test_an_observer_that_is_not_frozen_goes_on_where_it_was(tmp_path: Path, observer: str) -> None:
    files = ModelCheckpoint(tmp_path, every_n_train_steps=3, filename="{step}", save_top_k=-1)
    whole = module()
    trainer(tmp_path, qat(observer), files).fit(whole, loader(shuffle=True))
    resumed = module()
    trainer(tmp_path / "again", qat(observer)).fit(resumed, loader(shuffle=True), ckpt_path=tmp_path / "step=3.ckpt")
    assert equal(statistics(resumed), statistics(whole))


def test_resuming_with_another_observer_is_refused(tmp_path: Path) -> None:
    files = ModelCheckpoint(tmp_path, every_n_train_steps=2, filename="{step}")
    trainer(tmp_path, qat("minmax"), files, max_steps=2).fit(module(), loader())
    with pytest.raises(CheckpointError, match="observed by 'minmax', this model's are by 'mse'"):
        trainer(tmp_path, qat("mse")).fit(module(), loader(), ckpt_path=tmp_path / "step=2.ckpt")


def test_a_checkpoint_is_evaluated_in_a_new_process_with_its_own_observer(tmp_path: Path) -> None:
    files = ModelCheckpoint(tmp_path, every_n_train_steps=2, filename="{step}")
    trained = Classifier(dropout=0.0)
    run = trainer(tmp_path, qat("mse"), files, max_steps=2)
    run.fit(trained, loader())
    expected = run.validate(trained, loader(), verbose=False)
    fresh = trainer(tmp_path, qat("mse"))
    assert (
        fresh.validate(Classifier(dropout=0.0), loader(), ckpt_path=tmp_path / "step=2.ckpt", verbose=False) == expected
    )


def test_a_nan_in_a_training_batch_stops_training_and_names_the_layer(tmp_path: Path) -> None:
    x, y = vectors()[:]
    x[20, 5] = torch.nan
    subject = module()
    with pytest.raises(DataError, match=r"net\.0 \(w8a8-static\): its input holds NaN or infinity"):
        trainer(tmp_path, qat("mse")).fit(subject, loader(torch.utils.data.TensorDataset(x, y)))
    assert len(subject.losses) == 2


def test_an_unknown_observer_is_refused_by_the_constructor() -> None:
    with pytest.raises(ConfigError, match="observer=movingaverage is not allowed.*Did you mean 'moving-average'"):
        qat("movingaverage")
