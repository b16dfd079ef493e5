"""Learned scales have optimizer groups of their own, under any scheduler of torch, and after a resume."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch.optim import lr_scheduler as schedulers

from qat_plugin.callbacks import QuantizationAwareTraining
from qat_plugin.errors import ConfigError
from qat_plugin.qat import grid_parameters, initial_scales, quantizer_state
from qat_plugin.scheme import Scheme
from tests.callbacks.subjects import Classifier, loader, trainer

Schedule = Callable[[torch.optim.Optimizer], Any]
SCHEDULES: dict[str, Schedule] = {
    "none": lambda optimizer: None,
    "lambda": lambda optimizer: schedulers.LambdaLR(optimizer, lambda step: (step + 1) / 8),
    "cosine": lambda optimizer: schedulers.CosineAnnealingLR(optimizer, 8),
    "one-cycle": lambda optimizer: schedulers.OneCycleLR(optimizer, 0.02, total_steps=12),
    "sequence": lambda optimizer: schedulers.SequentialLR(
        optimizer,
        [schedulers.LinearLR(optimizer, 0.1, total_iters=3), schedulers.ExponentialLR(optimizer, 0.8)],
        milestones=[3],
    ),
}


class Scheduled(Classifier):
    """Two groups of its own, and a schedule."""

    def __init__(self, schedule: str, groups: int = 2) -> None:
        super().__init__()
        self.schedule, self.groups = schedule, groups
        self.rates: list[list[float]] = []

    def configure_optimizers(self) -> Any:
        parameters = list(self.parameters())
        first = {id(p) for p in self.net[0].parameters()}
        groups = [
            {"params": [p for p in parameters if id(p) not in first]},
            {"params": [p for p in parameters if id(p) in first], "lr": 5e-3},
        ]
        optimizer = torch.optim.AdamW(groups[:2] if self.groups == 2 else parameters, 1e-2, weight_decay=0.1)
        scheduler = SCHEDULES[self.schedule](optimizer)
        if scheduler is None:
            return optimizer
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def on_train_batch_end(self, *args: Any) -> None:
        self.rates.append([group["lr"] for group in self.trainer.optimizers[0].param_groups])


def callback(**options: Any) -> QuantizationAwareTraining:
    learning = {"learn_scales": True, "learn_zero_points": True}
    return QuantizationAwareTraining("w4a16-g32-asym", **learning, convert=False, **options)


def run(
    folder: Path, module: Scheduled, *others: L.Callback, rate: float | None, path: Path | None = None
) -> L.Trainer:
    it = trainer(folder, callback(scale_learning_rate=rate), *others, max_steps=8)
    it.fit(module, loader(), ckpt_path=path, weights_only=True)
    return it


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_scales_follow_the_weights_schedule_at_their_own_rate(tmp_path: Path, schedule: str) -> None:
    module, plain = Scheduled(schedule), Scheduled(schedule)
    optimizer = run(tmp_path, module, rate=0.03).optimizers[0]
    trainer(tmp_path, max_steps=8).fit(plain, loader())
    scales = {id(p) for p in grid_parameters(module).values()}
    of_weights, of_first, *of_scales = optimizer.param_groups
    assert len(of_scales) == 2
    held = [p for group in of_scales for p in group["params"]]
    assert {id(p) for p in held} == scales and len(held) == len(scales) == 6
    assert not scales & {id(p) for group in (of_weights, of_first) for p in group["params"]}
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.1, 0.1, 0.0, 0.0]
    given = (0.02, 0.02) if schedule == "one-cycle" else (1e-2, 5e-3)
    for mine, theirs in zip(module.rates, plain.rates, strict=True):
        assert mine[:2] == theirs, "the weights' rates are what they were"
        for own, group, peak in zip(mine[2:], theirs, given, strict=True):
            assert own == pytest.approx(group * 0.03 / peak)
    assert len({tuple(rates) for rates in module.rates}) == (1 if schedule == "none" else 8)


@pytest.mark.parametrize("schedule", ["lambda", "one-cycle", "sequence"])
def test_it_resumes_to_the_bit(tmp_path: Path, schedule: str) -> None:
    files = ModelCheckpoint(tmp_path, save_top_k=-1, every_n_train_steps=3, filename="{step}")
    whole = Scheduled(schedule)
    first = run(tmp_path, whole, files, rate=0.02)
    resumed = Scheduled(schedule)
    second = run(tmp_path, resumed, ModelCheckpoint(tmp_path / "again"), rate=0.02, path=tmp_path / "step=3.ckpt")
    assert resumed.rates == whole.rates[3:]
    for name, weight in whole.state_dict().items():
        assert torch.equal(resumed.state_dict()[name], weight), name
    mine, theirs = (quantizer_state(module)["layers"] for module in (resumed, whole))
    for layer, state in theirs.items():
        assert all(torch.equal(mine[layer][name], value) for name, value in state.items())
        assert not torch.equal(state["relative_scale"], torch.ones_like(state["relative_scale"]))
    moments = [it.optimizers[0].state_dict()["state"] for it in (first, second)]
    assert all(torch.equal(moments[0][i]["exp_avg"], moments[1][i]["exp_avg"]) for i in moments[0])


def test_without_a_rate_they_have_the_weights_and_no_decay(tmp_path: Path) -> None:
    module = Scheduled("lambda", groups=1)
    optimizer = run(tmp_path, module, rate=None).optimizers[0]
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.1, 0.0]
    assert all(weights == scales for weights, scales in module.rates)


class WithoutScales(Classifier):
    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD([p for name, p in self.named_parameters() if "fake_quantizer" not in name], 1e-2)


def test_scales_that_no_optimizer_holds_are_told(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match=r"no optimizer holds.*net\.0\.fake_quantizer\.grid.*6 in all"):
        trainer(tmp_path, callback(), max_steps=1).fit(WithoutScales(), loader())


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"learn_scales": True, "scale_learning_rate": 0.0}, "scale_learning_rate=0.0 is not allowed"),
        ({"learn_scales": True, "initial": "best"}, "initial='best' is not one of minmax, mse"),
        ({"scale_learning_rate": 0.1}, "they need learn_scales=True"),
        ({"initial": "mse"}, "they need learn_scales=True"),
        ({"learn_zero_points": True}, "they need learn_scales=True"),
    ],
)
def test_arguments_are_checked(options: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        QuantizationAwareTraining("w4a16-g32", **options)


def test_scales_begin_when_fake_quantization_does(tmp_path: Path) -> None:
    module = Classifier()
    began: list[Any] = []

    class Look(L.Callback):
        """After three float steps the fourth is fake-quantized: what do its scales come from?"""

        def on_before_backward(self, trainer: L.Trainer, pl_module: L.LightningModule, loss: Any) -> None:
            if trainer.global_step == 3:
                layer = module.net[0]
                began.append((layer.fake_quantizer.qparams(layer.weight), layer.weight.detach().clone()))

    trainer(tmp_path, callback(start=3, initial="mse"), Look(), max_steps=4).fit(module, loader())
    ((scale, zero_point), weight) = began[0]
    expected = initial_scales(weight, Scheme.parse("w4a16-g32-asym"))
    assert torch.equal(scale, expected[0]) and torch.equal(zero_point, expected[1])


def test_symmetric_grids_of_few_bits_are_said_to_lose(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="w2a16-g32-asym instead of w2a16-g32"):
        trainer(tmp_path, QuantizationAwareTraining("w2a16-g32", convert=False), max_steps=1).fit(
            Classifier(), loader()
        )
