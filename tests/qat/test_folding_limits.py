"""What a fold of BatchNorms must not do: outdate fixed scales, change what a hook sees, take rows for features."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from qat_plugin import convert, prepare
from qat_plugin.errors import DataError, PrepareError
from qat_plugin.ptq import calibrate
from qat_plugin.qat import (
    Phase,
    fold_norms,
    folds,
    hold,
    load_quantizer_state,
    prepared_layers,
    quantizer_state,
    set_phase,
)

from .images import images, residual, trained


def held(model: nn.Module, name: str) -> Tensor:
    """Hold a layer to the integers it has; these."""
    layer = prepared_layers(model)[name]
    integers = layer.fake_quantizer.integers(layer.weight)
    hold(layer, integers)
    return integers.q


class TestFixedScales:
    @pytest.mark.parametrize("learn_scales", [False, True])
    @pytest.mark.parametrize("how", ["held", "frozen"])
    def test_they_are_not_left_to_a_weight_that_is_folded_afterwards(self, how: str, learn_scales: bool) -> None:
        model = prepare(residual(), "w8a8-static", phase=Phase.OBSERVING, learn_scales=learn_scales)
        quantizer = model.block.conv1.fake_quantizer
        if how == "frozen":
            quantizer.enter(Phase.FROZEN, model.block.conv1.weight)
        else:
            if learn_scales:
                quantizer.enter(Phase.FROZEN, model.block.conv1.weight)
            held(model, "block.conv1")
        before = {name: value.clone() for name, value in model.state_dict().items()}
        for fold in (fold_norms, lambda m: set_phase(m, Phase.FROZEN)):
            with pytest.raises(PrepareError, match=r"block\.conv1 holds fixed scales.*block\.bn1.*fake quantization"):
                fold(model)
        assert not folds(model)
        assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())

    def test_conversion_says_so_too(self) -> None:
        model = prepare(residual(), "w8a8-static", phase=Phase.OBSERVING).train()
        model(images())
        held(model.eval(), "stem.0")
        with pytest.raises(PrepareError, match=r"stem\.0 holds fixed scales"):
            convert(model)

    def test_integers_held_after_the_fold_are_those_that_ship(self) -> None:
        model = prepare(residual(), "w8a8-static", phase=Phase.OBSERVING).train()
        model(images())
        set_phase(model.eval(), Phase.FAKE_QUANTIZED)
        q = held(model, "block.conv1")
        set_phase(model, Phase.FROZEN)
        assert torch.equal(convert(model).block.conv1.weight.integers().q, q)

    def test_released_scales_are_those_of_the_folded_weight(self) -> None:
        model = prepare(residual(), "w8a8-static", phase=Phase.OBSERVING)
        held(model, "block.conv1")
        set_phase(model, Phase.FAKE_QUANTIZED)
        layer = model.block.conv1
        expected = layer.weight.detach().flatten(1).abs().amax(1, keepdim=True) / 127
        torch.testing.assert_close(layer.fake_quantizer.qparams(layer.weight)[0], expected, rtol=2**-8, atol=0)

    def test_calibration_finds_new_ones(self) -> None:
        model = prepare(residual(), "w8a8-static", phase=Phase.FROZEN, observer="mse")
        fresh = prepare(residual(), "w8a8-static", phase=Phase.OBSERVING, observer="mse")
        held(fresh, "block.conv1")
        for each in (model, fresh):
            calibrate(each, None, [images()], progress=False)
        torch.testing.assert_close(fresh(images()), model(images()))

    def test_a_calibration_that_fails_after_the_fold_does_not_bring_the_old_ones_back(self) -> None:
        model = prepare(residual(), "w8a8-static", phase=Phase.OBSERVING)
        held(model, "block.conv1")
        with pytest.raises(DataError, match="calibration batch 0"):
            calibrate(model, None, [images() * float("nan")], progress=False)
        layer = model.block.conv1
        assert layer.fake_quantizer.phase is Phase.FROZEN
        expected = layer.weight.detach().flatten(1).abs().amax(1, keepdim=True) / 127
        torch.testing.assert_close(layer.fake_quantizer.frozen_scale, expected, rtol=2**-8, atol=0)


def unbatched(kind: str = "conv") -> nn.Module:
    """A Conv1d whose output [C, L] has as many positions as channels: its norm takes these for the features."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv1d(4, 6, 3, padding=1), nn.BatchNorm1d(6))
    if kind == "trained-batched":
        return trained(model, 4, 6)
    model.train()
    for _ in range(3):
        model(torch.randn(4, 6) * torch.arange(1, 7))
    return model.eval()


class TestUnbatchedInputs:
    def test_before_the_fold_nothing_changes(self) -> None:
        model, x = unbatched(), torch.randn(4, 6)
        expected = model(x)
        prepare(model, "w8a8-static", phase=Phase.OBSERVING)
        assert torch.equal(model(x), expected)

    @pytest.mark.parametrize("kind", ["unbatched", "trained-batched"])
    @pytest.mark.parametrize("converted", [False, True])
    def test_after_it_they_are_refused_and_not_shifted_along_another_axis(self, kind: str, converted: bool) -> None:
        model = calibrate(unbatched("trained-batched"), "w8a8-static", [torch.randn(3, 4, 6)], progress=False)
        if converted:
            convert(model)
        assert model(torch.randn(3, 4, 6)).shape == (3, 6, 6)
        with pytest.raises(DataError, match=r"1: .*\[6, 6\] has no batch dimension.*unsqueeze\(0\).*keep"):
            model(torch.randn(4, 6))

    def test_calibration_on_them_says_so_and_leaves_the_model_as_it_was(self) -> None:
        model, x = unbatched(), torch.randn(4, 6)
        expected = model(x)
        with pytest.raises(DataError, match="has no batch dimension"):
            calibrate(model, "w8a8-static", [x], progress=False)
        assert torch.equal(model(x), expected)

    def test_images_without_a_batch_dimension_are_refused_as_a_batch_norm_refuses_them(self) -> None:
        model = prepare(residual(), "w8a8-static")
        with pytest.raises(DataError, match="has no batch dimension"):
            model.stem(images()[0])


Register = Callable[[nn.Module, list[Any]], Any]
HOOKS: dict[str, tuple[str, Register]] = {
    "layer, forward": ("side", lambda m, seen: m.register_forward_hook(lambda _, __, y: seen.append(y))),
    "norm, before": ("side_bn", lambda m, seen: m.register_forward_pre_hook(lambda _, x: seen.append(x[0].clone()))),
    "norm, forward": ("side_bn", lambda m, seen: m.register_forward_hook(lambda _, x, y: seen.append(x[0].clone()))),
    "layer, backward": (
        "side", lambda m, seen: m.register_full_backward_hook(lambda _, __, g: seen.append(g[0]))
    ),
    "norm, backward": ("side_bn", lambda m, seen: m.register_full_backward_hook(lambda _, g, __: seen.append(g[0]))),
}  # fmt: skip


class TestHooks:
    @pytest.mark.parametrize("hook", HOOKS)
    def test_a_pair_whose_numbers_a_hook_sees_stays_unfolded_and_is_named(self, hook: str) -> None:
        name, register = HOOKS[hook]
        model, seen, x = residual(), [], images()
        register(model.get_submodule(name), seen)

        def look() -> Tensor:
            seen.clear()
            model(x.requires_grad_()).square().sum().backward()
            return seen[0].detach().clone()

        expected = look()
        text = f"side_bn is not folded into side: {name} has a hook"
        with pytest.warns(UserWarning, match=re.escape(text)):
            prepare(model, "w8a8-static")
        assert {fold.names[0] for fold in folds(model)} == {"stem.0", "block.conv1", "block.conv2"}
        set_phase(model, Phase.FLOAT)
        torch.testing.assert_close(look(), expected, rtol=1e-4, atol=1e-5)

    def test_it_ships_as_it_was_trained(self) -> None:
        model, seen, x = residual(), [], images()
        model.block.conv1.register_forward_hook(lambda _, __, y: seen.append(y.detach().clone()))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            calibrate(model, "w8a8-static", [x], progress=False)
            expected = model(x).detach()
            trained_on = seen[-1]
            convert(model)
        torch.testing.assert_close(model(x), expected, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(seen[-1], trained_on, rtol=1e-4, atol=1e-5)

    def test_what_sees_the_input_of_the_layer_or_the_whole_does_not_matter(self) -> None:
        model, seen, x = residual(), [], images()
        model.block.conv1.register_forward_pre_hook(lambda _, given: seen.append(given[0].clone()))
        model.block.register_forward_hook(lambda _, __, y: seen.append(y))
        model(x)
        expected = [value.detach().clone() for value in seen]
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            prepare(model, "w8a8-static")
        assert "block.conv1" in {fold.names[0] for fold in folds(model)}
        set_phase(model, Phase.FLOAT)
        seen.clear()
        model(x)
        for found, wanted in zip(seen, expected, strict=True):
            torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)

    def test_a_checkpoint_that_folded_the_pair_says_whose_hook_will_see_other_numbers(self) -> None:
        source = calibrate(residual(), "w8a8-static", [images()], observer="mse", progress=False)
        model = residual()
        model.block.conv1.register_forward_hook(lambda *_: None)
        model.load_state_dict(source.state_dict())
        prepare(model, "w8a8-static", phase=Phase.FLOAT, observer="mse")
        with pytest.warns(UserWarning, match=r"block\.conv1 has a hook.*the checkpoint folded block\.bn1"):
            load_quantizer_state(model, quantizer_state(source))
        assert torch.equal(model(images()), source(images()))
