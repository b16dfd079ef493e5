"""Fake-quantized convolutions: what they compute, what they learn, what they convert to."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qat_plugin import convert, load_converted, prepare, proof_of, save_converted
from qat_plugin.errors import ConversionError, PrepareError
from qat_plugin.numerics import round_to_nearest
from qat_plugin.qat import Phase, calibrating, capture_inputs, hold, quantizers, reusing_weights
from qat_plugin.scheme import Scheme

STATIC = Scheme.parse("w8a8-static")
CASES: list[tuple[type[Any], dict[str, Any]]] = [
    (nn.Conv2d, {"padding": 1}),
    (nn.Conv2d, {"padding": 1, "stride": 2, "groups": 2, "bias": False}),
    (nn.Conv2d, {"padding": 2, "dilation": 2, "padding_mode": "reflect"}),
    (nn.Conv2d, {"padding": "same", "groups": 6}),
    (nn.Conv1d, {"padding": 1, "padding_mode": "circular"}),
    (nn.Conv1d, {"stride": 3, "groups": 3, "bias": False}),
]


def image(layer: nn.Module, batch: int = 3) -> Tensor:
    generator = torch.Generator().manual_seed(5)
    return torch.randn(
        batch, layer.in_channels, *([9, 7] if isinstance(layer, nn.Conv2d) else [20]), generator=generator
    )


def calibrated(layer: nn.Module, x: Tensor, **options: Any) -> nn.Module:
    model = prepare(nn.Sequential(layer), "w8a8-static", **options)
    with calibrating(model):
        model(x)
    return model


@pytest.mark.parametrize(("kind", "options"), CASES)
def test_the_forward_rounds_weights_per_channel_and_inputs_per_tensor(kind: type[Any], options: dict[str, Any]) -> None:
    layer = kind(6, 12, 3, **options)
    x, exact = image(layer), copy.deepcopy(layer).double()
    model = calibrated(layer, x)
    rows = exact.weight.detach().flatten(1)
    scale = (rows.abs().amax(1, keepdim=True) / 127).bfloat16().double()
    exact.weight.data = ((rows / scale + 0.5).floor().clamp(-127, 127) * scale).reshape(exact.weight.shape)
    step = x.double().abs().max() / 127
    expected = exact((x.double() / step).round().clamp(-127, 127) * step)
    torch.testing.assert_close(model(x).double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("kind", "options"), CASES)
def test_what_a_convolution_computes_it_ships(kind: type[Any], options: dict[str, Any], tmp_path) -> None:
    layer = kind(6, 12, 3, **options)
    x, fresh = image(layer), nn.Sequential(copy.deepcopy(layer))
    model = calibrated(layer, x)
    expected = model(x).detach()
    with capture_inputs(model) as inputs:
        model(x)
    assert inputs["0"].shape == x.shape
    convert(model, inputs=inputs)
    (proof,) = proof_of(model).layers
    assert (proof.kernel, proof.inputs, proof.weight_difference) == ("onednn-conv", "real", 0)
    torch.testing.assert_close(model(x), expected, rtol=1e-5, atol=1e-5)
    save_converted(model, tmp_path)
    assert torch.equal(load_converted(fresh, tmp_path)(x), model(x))


def test_gradients_pass_where_nothing_is_clipped() -> None:
    layer = nn.Conv2d(3, 4, 3)
    x = image(layer)
    model = calibrated(layer, x / 2)  # so that part of x is clipped
    given = x.clone().requires_grad_()
    model(given).sum().backward()
    float_layer, plain = copy.deepcopy(layer), x.clone().requires_grad_()
    F.conv2d(
        plain, round_to_nearest(layer.weight.detach().flatten(1), STATIC).dequantize().reshape(layer.weight.shape)
    ).sum().backward()
    inside = x.abs() <= quantizers(model)["0"].activation_scale() * 127.5
    assert not inside.all()
    torch.testing.assert_close(given.grad, plain.grad * inside)
    assert layer.weight.grad is not None and float_layer.weight.grad is not layer.weight.grad


def test_learned_scales_and_reused_weights() -> None:
    layer = nn.Conv2d(6, 8, 3, groups=2)
    x = image(layer)
    model = calibrated(layer, x, learn_scales=True)
    model(x).square().sum().backward()
    assert quantizers(model)["0"].grid.relative_scale.grad.shape == (8, 1)
    other = calibrated(nn.Conv2d(6, 8, 3), x).eval()
    expected = other(x)
    with reusing_weights(other) as reuse:
        assert torch.equal(other(x), expected) and torch.equal(other(x), expected)
    assert (reuse.quantized, reuse.reused) == (1, 1)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_integers_from_elsewhere_are_held(layout: torch.memory_format) -> None:
    layer = nn.Conv2d(6, 8, 3).to(memory_format=layout)
    x = image(layer)
    wanted = round_to_nearest(layer.weight.detach().flatten(1) * 0.5, STATIC)
    model = calibrated(layer, x)
    hold(layer, wanted)
    assert torch.equal(quantizers(model)["0"].integers(layer.weight).q, wanted.q)
    torch.testing.assert_close(layer.weight.detach().flatten(1), wanted.dequantize())


class SamePadding(nn.Conv2d):
    """Its own forward pads and then convolves, as timm's does."""

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(F.pad(x, (1, 1, 1, 1)), self.weight, self.bias, self.stride)


class Standardized(nn.Conv2d):
    """Its own forward computes the weight anew."""

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.weight - self.weight.mean(), self.bias)


def test_a_convolution_with_a_forward_of_its_own() -> None:
    layer = SamePadding(3, 4, 3)
    x = image(layer)
    model = calibrated(layer, x)
    expected = model(x)
    torch.testing.assert_close(convert(model)(x), expected, rtol=1e-5, atol=1e-5)
    with pytest.raises(PrepareError, match=r"0 \(Standardized\): its forward does not call"):
        prepare(nn.Sequential(Standardized(3, 4, 3)), "w8a8-static")(x)


def test_a_convolution_may_be_cast() -> None:
    layer = nn.Conv2d(3, 4, 3)
    x, exact = image(layer), copy.deepcopy(layer)
    exact.weight.data = exact.weight.data.bfloat16().float()
    model = convert(nn.Sequential(layer), {"type:Conv2d": "bf16"})
    torch.testing.assert_close(model(x), exact(x))


def test_mistakes_name_the_layer() -> None:
    x = torch.randn(2, 3, 8, 8)
    with pytest.raises(PrepareError, match=r"0 \(w8a8-static\) saw no activation"):
        convert(nn.Sequential(nn.Conv2d(3, 4, 3)), "w8a8-static")
    model = calibrated(nn.Conv2d(3, 4, 3), x)
    with pytest.raises(ConversionError, match=r"0: the inputs given have shape \(5, 27\), the layer takes \[batch, 3"):
        convert(model, inputs={"0": torch.randn(5, 27)})
    plan = prepare(nn.Sequential(nn.Conv2d(3, 4, 3)), "w8a8-static", phase=Phase.FLOAT)[0].fake_quantizer.plan
    edited = type(plan).from_list([{**entry, "scheme": "w4a16-g9"} for entry in plan.to_list()], plan.model)
    with pytest.raises(PrepareError, match="0 is a convolution, which cannot take w4a16-g9"):
        prepare(nn.Sequential(nn.Conv2d(3, 4, 3)), edited)
