"""The bugs that ended Lightning's own quantization callback, one test each, named after the issue."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch.callbacks import ModelCheckpoint, ModelPruning
from torch import Tensor, nn
from torch.nn.utils import prune

from qat_plugin.callbacks import QuantizationAwareTraining
from qat_plugin.conversion import conversion_of, is_converted, proof_of
from qat_plugin.errors import QatError
from qat_plugin.kernels.weight import QuantizedWeight
from qat_plugin.qat import is_prepared, quantizer_state
from tests.callbacks.subjects import CLASSES, WIDTH, Classifier, batch_of, loader, trainer


def test_6457_a_checkpoint_made_during_training_loads_and_resumes(tmp_path: Path) -> None:
    """load_from_checkpoint met observer entries that a plain module does not have, and resuming started them anew."""
    files = ModelCheckpoint(tmp_path, every_n_train_steps=2, filename="{step}", save_top_k=-1)
    options: dict[str, Any] = {"start": 1, "learn_scales": True, "convert": False}
    module = Classifier(dropout=0.0)
    trainer(tmp_path, QuantizationAwareTraining("w8a8-static", **options), files).fit(module, loader())
    path = tmp_path / "step=4.ckpt"

    plain = Classifier.load_from_checkpoint(path, strict=True)
    assert not is_prepared(plain)

    resumed = Classifier(dropout=0.0)
    again = trainer(tmp_path / "again", QuantizationAwareTraining("w8a8-static", **options))
    again.fit(resumed, loader(), ckpt_path=path)
    assert len(resumed.losses) == 2
    here, there = quantizer_state(resumed), quantizer_state(module)
    for name, tensors in there["layers"].items():
        assert {"scale", "absmax", "batches"} <= tensors.keys()
        assert all(torch.equal(here["layers"][name][key], value) for key, value in tensors.items())


class TwoInputs(Classifier):
    """A forward of two inputs and an option by keyword, as in the report."""

    def build(self) -> None:
        self.net = nn.Sequential(nn.Linear(WIDTH, 32), nn.ReLU(), nn.Linear(32, CLASSES))

    def forward(self, a: Tensor, b: Tensor, *, softmax: bool = False) -> Tensor:  # type: ignore[override]
        out: Tensor = self.net(a) + self.net(b)
        return out.softmax(-1) if softmax else out

    def loss(self, batch: list[Tensor]) -> Tensor:
        return F.nll_loss(self(batch[0], b=batch[0].flip(1), softmax=True).log(), batch[1])


def test_7926_forward_takes_several_inputs_and_keywords(tmp_path: Path) -> None:
    module = TwoInputs()
    trainer(tmp_path, QuantizationAwareTraining("w4a8-g32")).fit(module, loader(), loader())
    assert is_converted(module)
    x = batch_of(loader())[0]
    probabilities = module.eval()(x, b=x, softmax=True)
    torch.testing.assert_close(probabilities.sum(-1), torch.ones(len(x)))


class ByKeyword(nn.Linear):
    """A layer whose input comes by keyword, beside another argument."""

    def forward(self, *, hidden: Tensor, factor: float = 1.0) -> Tensor:  # type: ignore[override]
        return F.linear(hidden, self.weight, self.bias) * factor


def test_15862_layers_called_by_keyword(tmp_path: Path) -> None:
    class Module(Classifier):
        def build(self) -> None:
            self.up = nn.Linear(WIDTH, 32)
            self.down = ByKeyword(32, CLASSES)

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.down(hidden=torch.relu(self.up(input=x)), factor=0.5)
            return out

    module = Module()
    run = trainer(tmp_path, QuantizationAwareTraining("w8a8"))
    run.fit(module, loader(), loader())
    assert {layer.inputs for layer in proof_of(module).layers} == {"real"}
    assert len(proof_of(module).layers) == 2
    assert run.test(module, loader(), verbose=False)[0]["test_loss"] > 0


def test_8540_validation_leaves_observers_alone(tmp_path: Path) -> None:
    """Validation on inputs a thousand times larger changes no statistics, nor do test and predict."""

    class Loud(Classifier):
        def validation_step(self, batch: list[Tensor], batch_idx: int, dataloader_idx: int = 0) -> None:
            super().validation_step([batch[0] * 1000, batch[1]], batch_idx)

    def observed(validation: Any, **options: Any) -> dict[str, Any]:
        torch.manual_seed(0)
        module = Loud(dropout=0.0)
        run = trainer(tmp_path, QuantizationAwareTraining("w8a8-static", start=2, convert=False), **options)
        run.fit(module, loader(), validation)
        state = quantizer_state(module)
        run.validate(module, loader(), verbose=False)
        run.test(module, loader(), verbose=False)
        run.predict(module, loader())
        after = quantizer_state(module)
        assert all(
            torch.equal(value, after["layers"][name][key])
            for name, tensors in state["layers"].items()
            for key, value in tensors.items()
        )
        layers: dict[str, Any] = state["layers"]
        return layers

    plain, validated = observed(None), observed(loader(), val_check_interval=1)
    for name, tensors in plain.items():
        assert tensors["batches"] == 6
        assert all(torch.equal(value, validated[name][key]) for key, value in tensors.items())


@pytest.mark.parametrize("listed", ["before", "after"])
@pytest.mark.parametrize("permanent", [True, False])
def test_11047_with_model_pruning(tmp_path: Path, listed: str, permanent: bool) -> None:
    """Pruned and quantized in one run: zeros stay zeros in the integers; or an error that names pruning."""
    module = Classifier()
    qat = QuantizationAwareTraining("w4a16-g32")
    pruning = ModelPruning(
        "l1_unstructured", parameter_names=["weight"], amount=0.5, make_pruning_permanent=permanent, verbose=0
    )
    callbacks = [pruning, qat] if listed == "before" else [qat, pruning]
    run = trainer(tmp_path, *callbacks, max_steps=-1, max_epochs=1)
    try:
        run.fit(module, loader(), loader())
    except QatError as error:
        assert "prun" in str(error)  # noqa: PT017
        assert not is_converted(module)
        assert not permanent, "pruning made permanent leaves plain weights, which can be converted"
        return
    weights = [layer.weight for layer in module.modules() if isinstance(layer, nn.Linear)]
    assert all(isinstance(weight.data, QuantizedWeight) for weight in weights)
    zeros = sum(int((weight.dequantize() == 0).sum()) for weight in weights)
    assert zeros >= 0.45 * sum(weight.numel() for weight in weights)


@pytest.mark.parametrize("permanent", [True, False])
def test_11047_with_a_module_pruned_before(tmp_path: Path, permanent: bool) -> None:
    module = Classifier()
    prune.l1_unstructured(module.net[0], "weight", amount=0.5)
    if permanent:
        prune.remove(module.net[0], "weight")
    run = trainer(tmp_path, QuantizationAwareTraining("w4a16-g32"))
    run.fit(module, loader())
    assert is_converted(module)
    layer = conversion_of(module).plan["net.0"]
    if permanent:
        assert str(layer.scheme) == "w4a16-g32"
    else:  # its weight is computed by a hook: it stays, and the plan says why
        assert layer.scheme is None
        assert "pruning" in layer.reason


def test_12890_every_layer_is_converted_and_none_computes_in_float(tmp_path: Path) -> None:
    """What ships is integers wherever the plan says so, and never a float copy beside them."""
    module = Classifier()
    trainer(tmp_path, QuantizationAwareTraining("w8a8")).fit(module, loader(), loader())
    weights = {name: value for name, value in module.state_dict().items() if name.endswith("weight")}
    assert len(weights) == 3 and all(isinstance(value, QuantizedWeight) for value in weights.values())
    assert not is_prepared(module)
    assert not [name for name, _ in module.named_modules() if "fake_quantizer" in name]
    assert all(layer.kernel != "reference" and layer.weight_difference == 0 for layer in proof_of(module).layers)


@pytest.mark.parametrize("learn_scales", [False, True])
@pytest.mark.parametrize("policy", ["w4a8-g32", "w8a8-static"])
def test_12896_test_after_the_fit_with_a_checkpoint(tmp_path: Path, policy: str, learn_scales: bool) -> None:
    """trainer.test(ckpt_path="best") loads a float checkpoint into a converted module: it stays quantized, and gives
    what the same checkpoint gives when it is fake-quantized in a fresh process."""
    best = ModelCheckpoint(tmp_path, monitor="val_loss", save_top_k=-1, filename="{step}")
    qat = QuantizationAwareTraining(policy, learn_scales=learn_scales)
    module = Classifier(dropout=0.0)
    run = trainer(tmp_path, qat, best, val_check_interval=2)
    run.fit(module, loader(), loader())
    kinds = {name: type(value.data) for name, value in module.named_parameters()}
    for path in sorted(tmp_path.glob("*.ckpt")):
        (converted,) = run.test(module, loader(), ckpt_path=path, verbose=False)
        assert {name: type(value.data) for name, value in module.named_parameters()} == kinds
        fresh: L.LightningModule = Classifier(dropout=0.0)
        again = trainer(tmp_path, QuantizationAwareTraining(policy, learn_scales=learn_scales))
        (trained,) = again.test(fresh, loader(), ckpt_path=path, verbose=False)
        assert is_prepared(fresh) and not is_converted(fresh)
        assert converted["test_loss"] == pytest.approx(trained["test_loss"], abs=1e-3)
    assert run.test(ckpt_path="best", dataloaders=loader(), verbose=False)
