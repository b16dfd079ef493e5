"""BatchNorm folded into the layer before it: the same function in evaluation, and the same names."""

from __future__ import annotations

import copy
import io

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qat_plugin import convert, load_converted, prepare, save_converted, unprepare
from qat_plugin.conversion import dequantized_state_dict, reload_float
from qat_plugin.errors import ConversionError
from qat_plugin.ptq import calibrate
from qat_plugin.qat import (
    Phase,
    calibrating,
    capture_inputs,
    load_quantizer_state,
    quantizer_state,
    quantizers,
    set_phase,
)
from qat_plugin.qat.folded import FoldedNorm, folds
from qat_plugin.qat.folding import set_folds
from qat_plugin.qat.pairs import norm_pairs

from .images import Block, images, residual, trained

PAIRS = {
    "stem.0": "stem.1", "block.conv1": "block.bn1", "block.conv2": "block.bn2", "side": "side_bn",
}  # fmt: skip


def float_again(model: nn.Module) -> nn.Module:
    """A plain network with the model's numbers."""
    fresh = residual()
    fresh.load_state_dict(model.state_dict())
    return fresh.eval()


def names_of(model: nn.Module) -> dict[str, str]:
    names = {module: name for name, module in model.named_modules()}
    return {names[layer]: names[norm] for layer, norm in norm_pairs(model).items()}


def test_folding_keeps_the_function_the_names_and_the_parameters() -> None:
    model, x = residual(), images()
    expected, keys, parameters = model(x), list(model.state_dict()), dict(model.named_parameters())
    before = model.block.conv1.weight.detach().clone()
    prepare(model, "w8a8-static")
    assert {fold.names[0]: fold.names[1] for fold in folds(model)} == PAIRS
    assert not torch.equal(model.block.conv1.weight, before)
    assert list(model.state_dict()) == keys
    assert all(parameter is parameters[name] for name, parameter in model.named_parameters())
    set_phase(model, Phase.FLOAT)
    torch.testing.assert_close(model(x), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(float_again(model)(x), expected, rtol=1e-5, atol=1e-5)


def test_the_statistics_stay_frozen_in_training_mode() -> None:
    model = prepare(residual(), "w8a8-static", phase=Phase.FLOAT)
    set_phase(model, Phase.FAKE_QUANTIZED)
    model.train()
    assert not any(module.training for module in model.modules() if isinstance(module, FoldedNorm))
    before = {name: buffer.clone() for name, buffer in model.named_buffers() if "running" in name}
    loss = model(images()).square().sum()
    loss.backward()
    frozen = [name for name in before if not name.startswith("fc_bn")]
    assert all(torch.equal(model.get_buffer(name), before[name]) for name in frozen)
    assert model.block.bn1.bias.grad is not None, "the shift is trained, as a bias is"
    assert model.block.bn1.weight.grad is None, "a weight of 1 stays one"


def test_folding_twice_changes_nothing() -> None:
    model = prepare(residual(), "w8a8-static")
    state = {name: value.clone() for name, value in model.state_dict().items()}
    again = prepare(float_again(model), "w8a8-static")
    assert len(folds(again)) == len(PAIRS)
    assert all(torch.equal(value, state[name]) for name, value in again.state_dict().items())


def test_before_the_scheduled_step_norms_are_alive() -> None:
    model = prepare(residual(), "w8a8-static", phase=Phase.OBSERVING)
    assert not folds(model)
    model.train()
    mean = model.block.bn1.running_mean.clone()
    model(images())
    assert not torch.equal(model.block.bn1.running_mean, mean)


def test_a_norm_that_saw_no_batch_and_other_schemes_are_left_alone() -> None:
    assert not folds(prepare(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)), "w8a8-static"))
    assert not folds(prepare(residual(), {"fc": "w8a8-static"}))
    assert [fold.names[0] for fold in folds(prepare(residual(), {"side": "w8a8-static"}))] == ["side"]
    whole = trained(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4, track_running_stats=False)), 3, 8, 8)
    assert not folds(prepare(whole, "w8a8-static"))


class Shared(nn.Module):
    """Nothing here can be folded: the norm's input has another reader, or the norm another source."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = (nn.Conv2d(3, 3, 1) for _ in range(3))
        self.read_twice, self.fed_twice, self.plain = (nn.BatchNorm2d(3) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        y = self.a(x)
        y = self.read_twice(y) + y
        y = self.fed_twice(self.b(y)) + self.fed_twice(y)
        return self.plain(F.relu(self.c(y)))


class Branching(nn.Module):
    """Cannot be traced as a whole; its block can."""

    def __init__(self) -> None:
        super().__init__()
        self.block = Block(3)
        self.conv, self.norm = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)

    def forward(self, x: Tensor) -> Tensor:
        if x.mean() > 100:
            return x
        y = self.conv(self.block(x))
        return self.norm(y) if self.training else y


def test_only_a_norm_that_is_alone_behind_its_layer_is_folded() -> None:
    assert names_of(Shared()) == {}
    assert names_of(residual()) == PAIRS | {"fc": "fc_bn"}
    assert names_of(Branching()) == {"block.conv1": "block.bn1", "block.conv2": "block.bn2"}
    model = residual()
    model.block.conv1.eval()
    modes = [module.training for module in model.modules()]
    norm_pairs(model)
    assert [module.training for module in model.modules()] == modes


def test_a_linear_whose_norm_may_stand_along_another_axis_is_left_alone() -> None:
    torch.manual_seed(0)
    model = trained(nn.Sequential(nn.Linear(8, 6), nn.BatchNorm1d(6)), 6, 8)
    x = torch.randn(3, 6, 8)
    expected = model(x)
    prepare(model, "w8a8-static")
    set_phase(model, Phase.FLOAT)
    torch.testing.assert_close(model(x), expected, rtol=1e-5, atol=1e-5)


class Rectified(nn.Conv2d):
    """A convolution and what is not linear, in one layer."""

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(F.conv2d(x, self.weight, self.bias))


class Bent(nn.Conv2d):
    """The stock forward, but not the stock product."""

    def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return F.relu(super()._conv_forward(input, weight, bias))


@pytest.mark.parametrize("kind", [Rectified, Bent])
def test_a_layer_that_is_more_than_its_product_is_not_folded(kind: type[nn.Conv2d]) -> None:
    torch.manual_seed(0)
    model, x = trained(nn.Sequential(kind(3, 4, 3), nn.BatchNorm2d(4)), 3, 8, 8), images()
    expected = model(x)
    prepare(model, "w8a8-static")
    assert not folds(model)
    set_phase(model, Phase.FLOAT)
    assert torch.equal(model(x), expected)


@pytest.mark.parametrize("kind", [Rectified, Bent])
def test_no_shift_is_added_inside_such_a_layer_where_a_checkpoint_folded_it(kind: type[nn.Conv2d]) -> None:
    torch.manual_seed(0)
    x = images()
    model = calibrate(nn.Sequential(kind(3, 4, 3), nn.BatchNorm2d(4)).eval(), "w8a8-static", [x], progress=False)
    with torch.no_grad():
        model[1].running_var.fill_(1 - model[1].eps)
        model[1].bias.fill_(0.5)
    set_folds(model, [["0", "1"]])
    expected = model(x).detach()
    convert(model)
    assert not folds(model)[0].absorbed
    torch.testing.assert_close(model(x), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("learn_scales", [False, True])
def test_what_is_trained_is_what_ships(learn_scales: bool, tmp_path) -> None:
    model, x = residual(), images()
    prepare(model, "w8a8-static", phase=Phase.OBSERVING, learn_scales=learn_scales).train()
    model(x)
    set_phase(model, Phase.FAKE_QUANTIZED)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    for _ in range(3):
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()
    model.eval()
    expected = model(x).detach()
    with capture_inputs(model) as inputs:
        model(x)
    convert(model, inputs=inputs)
    assert all(fold.absorbed for fold in folds(model))
    torch.testing.assert_close(model(x), expected, rtol=1e-4, atol=1e-5)
    save_converted(model, tmp_path)
    other = load_converted(residual(), tmp_path)
    assert torch.equal(other(x), model(x))
    other.train().fc_bn.eval()
    assert torch.equal(other(x), model(x)), "frozen here too"
    for copied in (copy.deepcopy(model), pickled(model)):
        assert torch.equal(copied(x), model(x))
    half = model.bfloat16()(x.bfloat16()).float()
    assert (half - expected).norm() / expected.norm() < 0.1


def pickled(model: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def test_a_converted_model_takes_float_checkpoints_of_before_and_after_the_fold() -> None:
    before, x = residual(), images()
    state = {name: value.clone() for name, value in before.state_dict().items()}
    model = calibrate(residual(), "w8a8-static", [x], progress=False)
    after = {name: value.clone() for name, value in model.state_dict().items()}
    quantizer = quantizer_state(model)
    convert(model)
    expected = model(x)
    for weights in (state, after):
        model.load_state_dict(weights)
        torch.testing.assert_close(model(x), expected, rtol=1e-4, atol=1e-4)
        reload_float(model, weights, quantizer)
        assert torch.equal(model(x), expected)
    plain = residual()
    plain.load_state_dict(dequantized_state_dict(model))
    assert (plain(x) - expected).norm() / expected.norm() < 0.05


def test_a_checkpoint_says_what_is_folded() -> None:
    x, model = images(), residual()
    calibrate(model, "w8a8-static", [x], progress=False)
    state, weights = quantizer_state(model), {k: v.clone() for k, v in model.state_dict().items()}
    other = residual()
    other.load_state_dict(weights)
    prepare(other, "w8a8-static", phase=Phase.FLOAT, observer=state["observer"])
    load_quantizer_state(other, state)
    assert [fold.names for fold in folds(other)] == [fold.names for fold in folds(model)]
    assert torch.equal(other(x), model(x))
    alive = prepare(residual(), "w8a8-static", phase=Phase.OBSERVING, observer=state["observer"])
    load_quantizer_state(other, quantizer_state(alive))
    assert not folds(other)


def test_a_checkpoint_fits_a_compiled_model_and_back() -> None:
    plain = calibrate(residual(), "w8a8-static", [images()], progress=False)
    state = quantizer_state(plain)
    compiled = torch.compile(prepare(residual(), "w8a8-static", phase=Phase.OBSERVING, observer=state["observer"]))
    load_quantizer_state(compiled, state)
    assert len(folds(compiled)) == len(PAIRS)
    assert quantizer_state(compiled)["folded"] == state["folded"]
    load_quantizer_state(plain, quantizer_state(compiled))
    assert len(folds(plain)) == len(PAIRS)


def test_learned_scales_start_from_the_folded_weight() -> None:
    model = prepare(residual(), "w8a8-static", learn_scales=True)
    quantizer = quantizers(model)["block.conv1"]
    expected = model.block.conv1.weight.flatten(1).abs().amax(1, keepdim=True) / 127
    torch.testing.assert_close(quantizer.qparams(model.block.conv1.weight)[0], expected, rtol=2**-8, atol=0)


@pytest.mark.parametrize("reversible", [True, False])
def test_a_conversion_that_fails_takes_the_fold_back_to_the_bit(reversible: bool) -> None:
    model, x = residual(), images()
    state = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(Exception, match="saw no activation"):
        convert(model, "w8a8-static", reversible=reversible)
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert not folds(model)
    prepare(model, "w8a8-static")
    with calibrating(model):
        model(x)
    expected = model(x)
    with pytest.raises(ConversionError, match=r"stem\.0: the inputs given have shape"):
        convert(model, inputs={"stem.0": torch.randn(4, 27)}, reversible=reversible)
    assert torch.equal(model(x), expected)
    unprepare(model)
    assert not any(isinstance(module, FoldedNorm) for module in model.modules())
