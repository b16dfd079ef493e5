"""Learned grids: gradients of scales and zero points against float64 autograd of the papers' formula."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

import qat_plugin.fused as fused
from qat_plugin.learned import fake_quantize_learned, learned_scale, learned_zero_point
from qat_plugin.numerics import choose_qparams, quantize, to_groups
from qat_plugin.scheme import Scheme

SPELLINGS = [
    "w4a16-g32", "w4a16-g32-asym", "w2a16-g16-asym", "w3a16-asym", "w8a8", "w3a16", "w4a16-tensor", "w4a16-tensor-asym",
]  # fmt: skip


def by_definition(w: Tensor, d: Tensor, z: Tensor | None, scheme: Scheme) -> Tensor:
    """LSQ's and LSQ+'s forward pass in float64; rounding passes gradients, clamping stops them."""
    groups = to_groups(w, scheme)
    position = groups / d.unsqueeze(-1)
    level = position + (torch.floor(position.detach() + 0.5) - position.detach())
    zero: Tensor | float = 0.0 if z is None else (z + (torch.floor(z.detach() + 0.5) - z.detach())).unsqueeze(-1)
    q = (level + zero).clamp(scheme.qmin, scheme.qmax)
    return ((q - zero) * d.unsqueeze(-1)).reshape(w.shape)


def subject(spelling: str, *, learn_zero: bool) -> tuple[Scheme, Tensor, Tensor, Tensor | None]:
    scheme = Scheme.parse(spelling)
    weight = (torch.randn(6, 64) + 0.1).requires_grad_()
    initial, zero = choose_qparams(weight, scheme)
    scale = (initial * 0.55).requires_grad_()  # so that both ends clip
    if zero is None or not learn_zero:
        return scheme, weight, scale, zero
    return scheme, weight, scale, (zero.float() + 0.3).clamp(0.2, scheme.qmax - 0.2).requires_grad_()


@pytest.mark.parametrize("form", ["plain", "native"])
@pytest.mark.parametrize("learn_zero", [False, True])
@pytest.mark.parametrize("spelling", SPELLINGS)
def test_gradients_are_those_of_the_formula(spelling: str, learn_zero: bool, form: fused.Form) -> None:
    scheme, weight, scale, zero = subject(spelling, learn_zero=learn_zero)
    upstream = torch.randn(6, 64)
    with fused.using(form):
        out = fused.fake_quantize_learned(weight, scale, zero, scheme)
        out.backward(upstream)
    w = weight.detach().double().requires_grad_()
    d = learned_scale(scale, scheme).double().requires_grad_()
    z = None if zero is None else zero.detach().double().requires_grad_()
    expected = by_definition(w, d, z, scheme)
    expected.backward(upstream.double())
    torch.testing.assert_close(out.double(), expected.detach(), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(weight.grad.double(), w.grad)
    balance = 1 / math.sqrt(weight.numel() / scale.numel() * scheme.qmax)
    torch.testing.assert_close(scale.grad.double(), d.grad * balance, rtol=1e-3, atol=1e-5)
    assert bool((weight.grad == 0).any()), "something clips"
    if zero is not None and zero.requires_grad:
        assert z is not None
        torch.testing.assert_close(zero.grad.double(), z.grad * balance, rtol=1e-3, atol=1e-5)
        assert bool(zero.grad.any())


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_what_is_trained_are_the_integers_that_ship(spelling: str) -> None:
    scheme, weight, scale, zero = subject(spelling, learn_zero=True)
    integer = None if zero is None else learned_zero_point(zero, scheme)
    shipped = quantize(weight, learned_scale(scale, scheme), integer, scheme)
    for trained in (
        fake_quantize_learned(weight, scale, zero, scheme),
        fused.fake_quantize_learned(weight, scale, zero, scheme),
    ):
        assert torch.equal(trained, shipped.dequantize())


def test_a_zero_point_stays_on_its_grid_and_can_come_back() -> None:
    scheme = Scheme.parse("w4a16-asym")
    weight, scale = torch.tensor([[-3.0, 0.5]]), torch.tensor([[0.1]])
    for start, towards in ((-2.0, 1.0), (17.5, -1.0)):
        zero = torch.tensor([[start]], requires_grad=True)
        assert learned_zero_point(zero, scheme).item() == (0 if start < 0 else 15)
        for sign in (1.0, -1.0):
            zero.grad = None
            # both weights clip at one end or the other: the gradient is -d * sum of the upstream ones
            clipped = torch.where(torch.tensor([[start < 0, start > 0]]), sign, 0.0)
            fake_quantize_learned(weight, scale, zero, scheme).backward(clipped)
            step = -zero.grad.item()
            assert step * towards >= 0, "it is never led further out"


def test_zeros_everywhere_have_gradients_too() -> None:
    scheme, scale = Scheme.parse("w4a16-g32"), torch.full((2, 1), 0.1, requires_grad=True)
    fake_quantize_learned(torch.zeros(2, 32), scale, None, scheme).sum().backward()
    assert torch.equal(scale.grad, torch.zeros(2, 1))
