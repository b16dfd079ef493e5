"""``initial="gptq"``: learned scales begin at what calibrate() finds by hand, once, and leave the run's order alone."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from qat_plugin import QuantizationAwareTraining, calibrate, prepare
from qat_plugin.errors import ConfigError, PrepareError
from qat_plugin.ptq import GptqOptions, calibration_of
from qat_plugin.qat import Phase, get_phase, quantizer_state, quantizers
from qat_plugin.qat.prepare import required_layers
from tests.callbacks.subjects import Bert, Classifier, Gpt2, checkpoint, loader, quantizers_in, tokens, trainer


def callback(policy: str = "w3a16-g32-asym", **options: Any) -> QuantizationAwareTraining:
    given = {"learn_scales": True, "initial": "gptq", "calibration_batches": 3, "convert": False, **options}
    return QuantizationAwareTraining(policy, **given)


def integers(module: torch.nn.Module) -> dict[str, torch.Tensor]:
    layers = required_layers(module)
    return {name: quantizer.integers(layers[name].weight).q for name, quantizer in quantizers(module).items()}


def by_hand(module: L.LightningModule, policy: str, batches: list[Any], **options: Any) -> L.LightningModule:
    """The way that Python offers: prepare with learned scales, then calibrate."""
    prepare(module, policy, learn_scales=True, initial="mse", observer=options.pop("observer", "moving-average"))
    calibrate(module, None, batches, method="gptq", progress=False, **options)
    return module


class Look(L.Callback):
    """The module in the middle of a step, its generators and its batch."""

    def __init__(self, step: int = 0) -> None:
        self.step = step
        self.seen: list[Any] = []
        self.random: list[torch.Tensor] = []
        self.before: L.LightningModule | None = None
        self.module: L.LightningModule | None = None

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        self.seen.append(batch[0] if isinstance(batch, list) else batch)
        self.random.append(torch.get_rng_state())
        if trainer.global_step == self.step:
            self.module = copy.deepcopy(pl_module)


@pytest.mark.parametrize("policy", ["w3a16-g32-asym", "w2a16-g16-asym", "w4a16-g32", "w4a8-g32", "w8a8-static"])
def test_the_first_step_begins_where_calibrating_by_hand_ends(policy: str, tmp_path: Path) -> None:
    module, look = Classifier(), Look()
    expected = by_hand(copy.deepcopy(module), policy, list(loader())[:3])
    trainer(tmp_path, callback(policy), look, max_steps=2).fit(module, loader(), loader())
    assert look.module is not None
    assert get_phase(look.module) is Phase.FAKE_QUANTIZED, "scales are learned from there"
    found, there = integers(look.module), integers(expected)
    assert set(found) == set(there) == {"net.0", "net.3", "net.5"}
    for name, q in found.items():
        assert torch.equal(q, there[name])
    for name, weight in look.module.state_dict().items():
        assert torch.equal(weight, expected.state_dict()[name])
    assert calibration_of(module).method == "gptq"
    assert any(not torch.equal(q, there[name]) for name, q in integers(module).items()), "and then they move"


def test_its_options_are_calibrates(tmp_path: Path) -> None:
    module, look, options = Classifier(), Look(), GptqOptions(damping=0.5, correct=0.0, sweeps=0)
    expected = by_hand(copy.deepcopy(module), "w3a16-g32-asym", list(loader())[:2], gptq=options)
    chosen = callback(gptq=options, calibration_batches=2)
    trainer(tmp_path, chosen, look, max_steps=1).fit(module, loader())
    assert look.module is not None
    for name, q in integers(look.module).items():
        assert torch.equal(q, integers(expected)[name])


@pytest.mark.parametrize("family", [Gpt2, Bert])
def test_a_transformers_model_inside_a_module_without_forward(family: Any, tmp_path: Path) -> None:
    torch.manual_seed(0)
    module, look = family(), Look()
    expected = copy.deepcopy(module)
    plan = callback()._policy.plan(expected)  # type: ignore[union-attr]
    prepare(expected, plan, learn_scales=True, initial="mse")
    calibrate(expected.model, None, list(loader(tokens()))[:3], method="gptq", progress=False)
    trainer(tmp_path, callback(), look, max_steps=1).fit(module, loader(tokens()))
    assert look.module is not None
    for name, q in integers(look.module).items():
        assert torch.equal(q, integers(expected)[name]), name


@pytest.mark.parametrize("validated", [False, True])
def test_a_later_start_calibrates_the_weights_of_that_moment(validated: bool, tmp_path: Path) -> None:
    options: dict[str, Any] = {"val_check_interval": 3} if validated else {}
    torch.manual_seed(0)
    module, look = Classifier(), Look(3)
    kept = ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=1, save_top_k=-1)
    loaders = (loader(shuffle=True), loader()) if validated else (loader(shuffle=True),)
    trainer(tmp_path, callback(start=3), look, kept, **options).fit(module, *loaders)
    early, late = (checkpoint(tmp_path / f"step={step}.ckpt") for step in (3, 4))
    assert quantizers_in(early)["phase"] == "float"
    assert quantizers_in(late)["phase"] == "fake-quantized"
    assert look.module is not None
    moved = [not torch.equal(look.module.state_dict()[name], weight) for name, weight in early["state_dict"].items()]
    assert any(moved), "weights have become the numbers of GPTQ's integers"
    layer = look.module.net[0]
    assert torch.equal(layer.fake_quantizer.integers(layer.weight).dequantize(), layer.weight)


def test_data_order_and_generators_are_left_alone(tmp_path: Path) -> None:
    looks = []
    for initial in ("mse", "gptq"):
        torch.manual_seed(0)
        look = Look()
        trainer(tmp_path, callback(initial=initial), look).fit(Classifier(), loader(shuffle=True), loader())
        looks.append(look)
    for mine, theirs in zip(looks[0].seen, looks[1].seen, strict=True):
        assert torch.equal(mine, theirs)
    for mine, theirs in zip(looks[0].random, looks[1].random, strict=True):
        assert torch.equal(mine, theirs)


@pytest.mark.parametrize("start", [0, 3])
@pytest.mark.parametrize("policy", ["w3a16-g32-asym", "w8a8-static"])
def test_resumed_after_any_step_it_ends_as_if_never_stopped(policy: str, start: int, tmp_path: Path) -> None:
    torch.manual_seed(0)
    module = Classifier()
    kept = ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=1, save_top_k=-1)
    trainer(tmp_path, callback(policy, start=start), kept, max_steps=8).fit(module, loader(shuffle=True))
    for step in (1, 3, 4, 7):
        torch.manual_seed(step)  # other weights, other generators
        again = Classifier()
        path = tmp_path / f"step={step}.ckpt"
        trainer(tmp_path, callback(policy, start=start), max_steps=8).fit(again, loader(shuffle=True), ckpt_path=path)
        for name, weight in module.state_dict().items():
            assert torch.equal(weight, again.state_dict()[name])
        ours, theirs = (quantizer_state(one)["layers"] for one in (module, again))
        for name, tensors in ours.items():
            assert all(torch.equal(value, theirs[name][key]) for key, value in tensors.items())
        if step > start:
            with pytest.raises(PrepareError, match="was not calibrated"):
                calibration_of(again)
        else:
            assert calibration_of(again) == calibration_of(module)


def test_what_was_begun_by_gptq_converts(tmp_path: Path) -> None:
    module = Classifier()
    trainer(tmp_path, callback(convert=True)).fit(module, loader())
    trainer(tmp_path).test(module, loader(), verbose=False)


def test_in_bf16_it_is_what_calibrating_by_hand_finds(tmp_path: Path) -> None:
    module, look = Classifier(), Look()
    expected = copy.deepcopy(module).to(torch.bfloat16)
    by_hand(expected, "w3a16-g32-asym", [batch[0].to(torch.bfloat16) for batch in list(loader())[:3]])
    trainer(tmp_path, callback(), look, max_steps=1, precision="bf16-true").fit(module, loader())
    assert look.module is not None
    layer = look.module.net[0]
    assert torch.equal(layer.fake_quantizer.integers(layer.weight).dequantize(torch.bfloat16), layer.weight)
    for name, q in integers(look.module).items():
        assert torch.equal(q, integers(expected)[name])


def test_a_module_that_was_prepared_before_is_told(tmp_path: Path) -> None:
    module = prepare(Classifier(), "w3a16-g32-asym", learn_scales=True, initial="mse")
    with pytest.warns(UserWarning, match="initial='gptq' does nothing"):
        trainer(tmp_path, callback(), max_steps=1).fit(module, loader())


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"learn_scales": False}, "they need learn_scales=True"),
        ({"initial": "awq"}, "initial='awq' is not one of minmax, mse, gptq"),
        ({"calibration_batches": 0}, "calibration_batches=0 is not allowed"),
    ],
)
def test_arguments_are_checked(options: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        callback(**options)


def test_several_ranks_are_refused(tmp_path: Path) -> None:
    run = trainer(tmp_path, callback(), devices=2, strategy="ddp")
    with pytest.raises(ConfigError, match=r"calibrates in one process, and this trainer has 2.*initial='mse'"):
        run.callbacks[0].setup(run, Classifier(), "fit")


def test_several_loaders_are_refused_with_a_way(tmp_path: Path) -> None:
    class Two(Classifier):
        def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
            return super().training_step(batch["a"], batch_idx)

    with pytest.raises(ConfigError, match=r"2 training dataloaders.*or take initial='mse'"):
        trainer(tmp_path, callback(), max_steps=1).fit(Two(), {"a": loader(), "b": loader()})
