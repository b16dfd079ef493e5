"""What cannot work is refused, before training where that is possible, in words that say what to do."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import EMAWeightAveraging, ModelCheckpoint, StochasticWeightAveraging
from lightning.pytorch.strategies import FSDPStrategy, SingleDeviceStrategy
from torch import Tensor, nn

from qat_plugin.callbacks import MixedPrecision, QuantizationAwareTraining, Schedule
from qat_plugin.callbacks.guards import check_strategy
from qat_plugin.conversion import is_converted, proof_of
from qat_plugin.errors import CheckpointError, ConfigError, PolicyError, PrepareError, QatError, SchemeError
from qat_plugin.qat import is_prepared
from tests.callbacks.subjects import Classifier, loader, trainer


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"policy": "w4a7-g32"}, SchemeError, "7-bit activations are not supported"),
        ({"policy": "w4a8-g0"}, SchemeError, "g0|group"),
        ({"start": -1}, ConfigError, "start=-1 is not allowed"),
        ({"start": -0.1}, ConfigError, "start=-0.1 is not allowed"),
        ({"start": 1.5}, ConfigError, "start=1.5 is not allowed: .* fraction of training"),
        ({"start": float("nan")}, ConfigError, "start=nan is not allowed"),
        ({"start": True}, ConfigError, "start=True is not allowed"),
        ({"start": "10%"}, ConfigError, "start='10%' is not allowed"),
        ({"freeze": -3}, ConfigError, "freeze=-3 is not allowed"),
        ({"start": 10, "freeze": 5}, ConfigError, "freeze=5 comes before start=10"),
        ({"start": 0.5, "freeze": 0.25}, ConfigError, "freeze=0.25 comes before start=0.5"),
        ({"weights": "ema"}, ConfigError, "weights='ema' is not one of last, best"),
        ({"dtype": "int8"}, ConfigError, "dtype='int8' is not one of fp32, bf16, fp16"),
    ],
    ids=lambda value: str(value) if isinstance(value, dict) else "",
)
def test_arguments(arguments: dict[str, Any], error: type[QatError], message: str) -> None:
    with pytest.raises(error, match=message):
        QuantizationAwareTraining(**arguments)


@pytest.mark.parametrize(
    ("arguments", "limit", "message"),
    [
        ({"start": 6}, {"max_steps": 6}, "start=6 is step 6, and training ends after 6"),
        ({"start": 12}, {"max_epochs": 2, "max_steps": -1}, "start=12 is step 12, and training ends after 12"),
        ({"start": 3}, {"max_epochs": 1, "max_steps": -1, "accumulate_grad_batches": 2}, "training ends after 3"),
        ({"start": 1.0}, {"max_steps": 6}, "start=1.0 is step 6"),
        ({"start": 0.5, "freeze": 2}, {"max_steps": 6}, "freeze=2 is step 2, before start=0.5, which is step 3"),
        ({"start": 0.5}, {"max_epochs": -1, "max_steps": -1}, "fraction of training, whose length is not known"),
        ({"freeze": 0.5}, {"max_epochs": -1, "max_steps": -1}, "freeze=0.5 is a fraction"),
    ],
)
def test_a_schedule_that_does_not_fit_the_run(
    tmp_path: Path, arguments: dict[str, Any], limit: dict[str, Any], message: str
) -> None:
    module = Classifier()
    with pytest.raises(ConfigError, match=message):
        trainer(tmp_path, QuantizationAwareTraining("w8a8", **arguments), **limit).fit(module, loader())
    assert not module.losses


def test_the_schedule_alone() -> None:
    steps = Schedule(0.25, 6).resolve(8)
    assert (steps.start, steps.freeze) == (2, 6)
    with pytest.raises(ConfigError, match="length is not known"):
        Schedule(0.25).resolve(float("inf"))


def refused(folder: Path, module: L.LightningModule, *callbacks: L.Callback, error: type[QatError], match: str) -> None:
    """A fit is refused before its first step."""
    with pytest.raises(error, match=match):
        trainer(folder, *callbacks).fit(module, loader(), loader())
    assert not is_converted(module) and not getattr(module, "losses", [])


def test_best_weights_need_a_monitoring_checkpoint(tmp_path: Path) -> None:
    qat = QuantizationAwareTraining("w8a8", weights="best")
    refused(tmp_path, Classifier(), qat, error=ConfigError, match=r"needs a ModelCheckpoint\(monitor=")
    last = ModelCheckpoint(tmp_path)
    refused(tmp_path, Classifier(), qat, last, error=ConfigError, match=r"needs a ModelCheckpoint\(monitor=")
    bare = ModelCheckpoint(tmp_path, monitor="val_loss", save_weights_only=True)
    refused(tmp_path, Classifier(), qat, bare, error=ConfigError, match="save_weights_only=False")


def test_best_weights_that_were_never_saved(tmp_path: Path) -> None:
    """Without a validation loop nothing is monitored; the trained float weights are still there."""
    module = Classifier()
    best = ModelCheckpoint(tmp_path, monitor="val_loss")
    run = trainer(tmp_path, QuantizationAwareTraining("w8a8", weights="best"), best)
    with pytest.raises(CheckpointError, match="ModelCheckpoint saved nothing; did validation run"):
        run.fit(module, loader())
    assert is_prepared(module) and not is_converted(module)


def test_a_converted_module_is_not_trained_on(tmp_path: Path) -> None:
    module = Classifier()
    trainer(tmp_path, QuantizationAwareTraining("w8a8")).fit(module, loader())
    proof = proof_of(module)
    for callback in (QuantizationAwareTraining("w8a8"), MixedPrecision("bf16")):
        with pytest.raises(ConfigError, match="was converted .* cannot be trained on"):
            trainer(tmp_path, callback).fit(module, loader())
    assert proof_of(module) is proof


@pytest.mark.parametrize("make", [EMAWeightAveraging, lambda: StochasticWeightAveraging(1e-3)], ids=["ema", "swa"])
def test_averaging_listed_first(tmp_path: Path, make: Any) -> None:
    match = "copies the module when it is set up: list QuantizationAwareTraining before it"
    refused(tmp_path, Classifier(), make(), QuantizationAwareTraining("w8a8"), error=ConfigError, match=match)


def test_averaging_listed_after_is_averaged_and_converted(tmp_path: Path) -> None:
    module = Classifier()
    trainer(tmp_path, QuantizationAwareTraining("w8a8"), EMAWeightAveraging()).fit(module, loader(), loader())
    assert is_converted(module) and len(proof_of(module).layers) == 3


class Normed(Classifier):
    def build(self) -> None:
        self.net = nn.Sequential(
            nn.Unflatten(1, (4, 16)), nn.Conv1d(4, 8, 3), nn.BatchNorm1d(8), nn.ReLU(), nn.Flatten(), nn.Linear(112, 4)
        )
        self.net[:3](torch.randn(16, 64))  # statistics, so that start=0 folds


@pytest.mark.parametrize("make", [EMAWeightAveraging, lambda: StochasticWeightAveraging(1e-3)], ids=["ema", "swa"])
def test_averaging_over_a_fold_of_batch_norms(tmp_path: Path, make: Any) -> None:
    static = QuantizationAwareTraining("w8a8-static", start=2)
    match = r"start=2.* BatchNorm behind net.1 \(w8a8-static\) is folded .* start=0, or leave weight averaging out"
    refused(tmp_path, Normed(), static, make(), error=ConfigError, match=match)


@pytest.mark.parametrize(("policy", "start"), [("w8a8-static", 0), ("w8a8", 2)])
def test_averaging_where_nothing_is_folded_on_the_way(tmp_path: Path, policy: str, start: int) -> None:
    module = Normed()
    trainer(tmp_path, QuantizationAwareTraining(policy, start=start), EMAWeightAveraging()).fit(module, loader())
    assert is_converted(module)


def test_two_policies_in_one_run(tmp_path: Path) -> None:
    both = QuantizationAwareTraining("w8a8"), QuantizationAwareTraining("w4a8-g32")
    refused(tmp_path, Classifier(), *both, error=PrepareError, match="already prepared")


@pytest.mark.parametrize("first", [0, 1])
def test_mixed_precision_beside_quantization(tmp_path: Path, first: int) -> None:
    both = [QuantizationAwareTraining("w8a8"), MixedPrecision({"net.5": "bf16"})]
    refused(tmp_path, Classifier(), both[first], both[1 - first], error=ConfigError, match="one policy")


def test_another_policy_on_a_prepared_module(tmp_path: Path) -> None:
    module = Classifier()
    trainer(tmp_path, QuantizationAwareTraining("w8a8", convert=False)).fit(module, loader())
    with pytest.raises(ConfigError, match=r"net\.0 .*w8a8.*w4a8-g32"):
        trainer(tmp_path, QuantizationAwareTraining("w4a8-g32")).fit(module, loader())
    with pytest.raises(ConfigError, match="learn_scales"):
        trainer(tmp_path, QuantizationAwareTraining("w8a8", learn_scales=True)).fit(module, loader())
    assert not is_converted(module)


def test_sharding_strategies() -> None:
    """A stand-in that only carries a real strategy: a Trainer with one wants as many devices."""
    with pytest.raises(ConfigError, match=r"FSDPStrategy shards .* qat_plugin\.prepare\(self, policy\)"):
        check_strategy(SimpleNamespace(strategy=FSDPStrategy()))  # type: ignore[arg-type]


def test_a_subclass_of_a_sharding_strategy(tmp_path: Path) -> None:
    class ModelParallelStrategy(SingleDeviceStrategy):
        """By name one that shards; it runs on one device here."""

    class Own(ModelParallelStrategy):
        pass

    run = trainer(tmp_path, QuantizationAwareTraining("w8a8"), strategy=Own(torch.device("cpu")))
    with pytest.raises(ConfigError, match="ModelParallelStrategy shards"):
        run.fit(Classifier(), loader())


def test_an_unmatched_rule_says_what_there_is(tmp_path: Path) -> None:
    qat = QuantizationAwareTraining({"encoder.*": "w8a8"})
    refused(tmp_path, Classifier(), qat, error=PolicyError, match=r"encoder\.\*(.|\n)*net\.0")


def test_a_module_without_layers_to_quantize(tmp_path: Path) -> None:
    class Convolution(Classifier):
        def build(self) -> None:
            self.net = nn.Sequential(nn.Unflatten(1, (1, 8, 8)), nn.Conv2d(1, 4, 8), nn.Flatten())

    refused(tmp_path, Convolution(), QuantizationAwareTraining("w8a8"), error=QatError, match="Convolution")


def test_nan_weights(tmp_path: Path) -> None:
    module = Classifier()
    with torch.no_grad():
        module.net[3].weight[2, 5] = float("nan")
    refused(tmp_path, module, QuantizationAwareTraining("w8a8"), error=PrepareError, match=r"net\.3: 1 of its 2048")


def test_weights_that_turn_nan_in_training_are_not_converted(tmp_path: Path) -> None:
    class Exploding(Classifier):
        def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
            return super().training_step(batch, batch_idx) * (float("inf") if batch_idx == 4 else 1.0)

    module = Exploding()
    with pytest.raises(QatError, match=r"net\.0: .* are NaN or infinite"):
        trainer(tmp_path, QuantizationAwareTraining("w8a8")).fit(module, loader())
    assert is_prepared(module) and not is_converted(module)


def saved(folder: Path, policy: Any = "w8a8", **options: Any) -> Path:
    files = ModelCheckpoint(folder, save_last=True)
    trainer(folder, QuantizationAwareTraining(policy, **options), files, max_steps=3).fit(Classifier(), loader())
    return Path(files.last_model_path)


@pytest.mark.parametrize("kind", ["truncated", "text", "empty"])
def test_a_corrupt_checkpoint(tmp_path: Path, kind: str) -> None:
    path = saved(tmp_path)
    whole = path.read_bytes()
    path.write_bytes({"truncated": whole[: len(whole) // 2], "text": b"not a checkpoint", "empty": b""}[kind])
    module = Classifier()
    with pytest.raises(Exception) as caught:
        trainer(tmp_path, QuantizationAwareTraining("w8a8")).fit(module, loader(), ckpt_path=path)
    assert type(caught.value).__module__.split(".")[0] in {"builtins", "_pickle", "pickle", "zipfile", "torch"}
    assert not module.losses and not is_converted(module)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda q: q["layers"].pop("net.3"), "net.3"),
        (lambda q: q.update(version=99), "version 99"),
        (lambda q: q["layers"]["net.0"].update(frozen_scale=torch.ones(2, 2)), r"net\.0.*frozen_scale"),
        (lambda q: q.pop("phase"), "not a quantizer state"),
    ],
    ids=["layer", "version", "shape", "phase"],
)
def test_a_checkpoint_with_damaged_scales(tmp_path: Path, damage: Any, message: str) -> None:
    path = saved(tmp_path)
    content = torch.load(path, weights_only=True)
    (state,) = [s for key, s in content["callbacks"].items() if key.startswith("QuantizationAwareTraining")]
    damage(state["quantizers"])
    torch.save(content, path)
    module = Classifier()
    with pytest.raises(CheckpointError, match=message):
        trainer(tmp_path, QuantizationAwareTraining("w8a8")).fit(module, loader(), ckpt_path=path)
    assert not module.losses


def test_a_checkpoint_of_another_policy(tmp_path: Path) -> None:
    """Lightning would only warn that a callback's state was not used; scales and phase would start anew, silently."""
    path = saved(tmp_path, "w8a8")
    module = Classifier()
    with pytest.raises(CheckpointError, match="w8a8"):
        trainer(tmp_path, QuantizationAwareTraining("w4a8-g32")).fit(module, loader(), ckpt_path=path)
    assert not module.losses


def test_a_checkpoint_of_plain_training_starts_quantization(tmp_path: Path) -> None:
    """Fine-tuning from a checkpoint that knew nothing of the callback is a legitimate start."""
    files = ModelCheckpoint(tmp_path, save_last=True)
    trainer(tmp_path, files, max_steps=3).fit(Classifier(), loader())
    module = Classifier()
    trainer(tmp_path, QuantizationAwareTraining("w8a8")).fit(module, loader(), ckpt_path=files.last_model_path)
    assert is_converted(module) and len(module.losses) == 3


def test_a_checkpoint_with_learned_scales(tmp_path: Path) -> None:
    path = saved(tmp_path, "w8a8", learn_scales=True)
    with pytest.raises((QatError, ValueError), match="learn_scales|parameter group|doesn't match"):
        trainer(tmp_path, QuantizationAwareTraining("w8a8")).fit(Classifier(), loader(), ckpt_path=path)
