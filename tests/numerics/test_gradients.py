"""Gradients: straight-through, and those of learned scales, against formulas written out in float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from qat_plugin.learned import fake_quantize_learned, learned_scale
from qat_plugin.numerics import (
    choose_qparams,
    fake_cast,
    fake_quantize,
    fake_quantize_activation,
)
from qat_plugin.scheme import Scheme


@pytest.mark.parametrize("spelling", ["w8a8", "w4a16-g32", "w4a16-g32-asym", "w2a16-g32"])
def test_it_passes_inside_the_grid_and_stops_where_it_clips(spelling: str) -> None:
    scheme, weight = Scheme.parse(spelling), torch.randn(8, 64, requires_grad=True)
    upstream = torch.randn(8, 64)
    fake_quantize(weight, scheme).backward(upstream)
    scale, zero = choose_qparams(weight, scheme)
    size = 64 // scale.shape[1]
    step = np.repeat(scale.double().numpy(), size, 1)
    offset = 0 if zero is None else np.repeat(zero.double().numpy(), size, 1)
    level = np.floor(weight.detach().double().numpy() / step + 0.5) + offset
    inside = (level >= scheme.qmin) & (level <= scheme.qmax)
    np.testing.assert_array_equal(weight.grad.numpy(), np.where(inside, upstream.numpy(), 0))
    assert bool(inside.all()) == (spelling == "w8a8")


def test_a_fixed_scale_clips_and_the_gradient_stops_there() -> None:
    weight = torch.tensor([[0.1, 5.0, -5.0, 0.3]], requires_grad=True)
    fake_quantize(weight, Scheme.parse("w4a16"), torch.tensor([[0.1]])).sum().backward()
    assert weight.grad.tolist() == [[1.0, 0.0, 0.0, 1.0]]


@pytest.mark.parametrize("spelling", ["w4a16-g32", "w8a8", "w4a16-g32-asym", "w2a16-g32"])
def test_learned_scales_have_the_gradient_of_the_paper(spelling: str) -> None:
    scheme = Scheme.parse(spelling)
    weight = torch.randn(4, 64, requires_grad=True)
    initial, zero = choose_qparams(weight, scheme)
    scale = (initial * 0.6).requires_grad_()  # so that some values clip
    upstream = torch.randn(4, 64)
    fake_quantize_learned(weight, scale, zero, scheme).backward(upstream)

    step = learned_scale(scale, scheme).double().numpy()
    groups = weight.detach().double().numpy().reshape(4, step.shape[1], -1)
    offset = 0.0 if zero is None else zero.double().numpy()[..., None]
    position = groups / step[..., None]
    level = np.floor(position + 0.5) + offset
    clipped = np.clip(level, scheme.qmin, scheme.qmax)
    inside = level == clipped
    slope = np.where(inside, clipped - offset - position, clipped - offset)
    expected = (slope * upstream.double().numpy().reshape(groups.shape)).sum(-1)
    expected /= np.sqrt(groups.shape[-1] * scheme.qmax)
    np.testing.assert_allclose(scale.grad.numpy(), expected, rtol=2e-5, atol=1e-6)
    np.testing.assert_array_equal(weight.grad.numpy() == 0, ~inside.reshape(4, 64))
    assert not inside.all()


def test_learning_a_scale_lowers_the_error_it_is_charged_with() -> None:
    torch.manual_seed(0)
    scheme, weight = Scheme.parse("w2a16-g32"), torch.randn(16, 64)
    initial, _ = choose_qparams(weight, scheme)
    scale = torch.nn.Parameter(initial)
    optimizer = torch.optim.Adam([scale], lr=5e-3)
    errors = []
    for _ in range(60):
        loss = (fake_quantize_learned(weight, scale, None, scheme) - weight).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        errors.append(loss.item())
    assert errors[-1] < 0.9 * errors[0]


def test_per_token_activations_pass_everything() -> None:
    x = torch.randn(3, 5, 16, requires_grad=True)
    upstream = torch.randn(3, 5, 16)
    fake_quantize_activation(x).backward(upstream)
    assert torch.equal(x.grad, upstream)


def test_a_calibrated_activation_scale_stops_what_it_clips() -> None:
    x = torch.tensor([[0.5, 200.0, -200.0, -127.0]], requires_grad=True)
    fake_quantize_activation(x, torch.tensor(1.0)).sum().backward()
    assert x.grad.tolist() == [[1.0, 0.0, 0.0, 1.0]]


def test_a_cast_passes_everything() -> None:
    weight = torch.randn(4, 4, requires_grad=True)
    out = fake_cast(weight, torch.float16)
    out.sum().backward()
    assert torch.equal(out, weight.half().float())
    assert torch.equal(weight.grad, torch.ones(4, 4))
