"""Fused fake quantization against the plain form in numerics.py: the same bits forward, the same gradients."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from qat_plugin import fused, numerics
from qat_plugin.errors import QatError
from qat_plugin.native import available, native_disabled
from qat_plugin.scheme import EXAMPLES, Scheme

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SCHEMES = [
    *(scheme for scheme in map(Scheme.parse, EXAMPLES) if scheme.is_integer),
    *map(
        Scheme.parse, ("w4a16-g64-asym", "w8a16-g32-asym", "w8a16-asym", "w4a16", "w8a16-tensor", "w4a16-tensor-asym")
    ),
]
SPECIAL = [0.0, -0.0, 1e-45, -3e-40, 6e-8, 1e-30, 3e38, 65504.0, 8.4e6, float("inf"), -float("inf"), float("nan")]
PORTABLE = "QAT_PLUGIN_ISA"

needs_native = pytest.mark.skipif(not available(), reason="no native operators here")


def assert_same_bits(one: Tensor, other: Tensor) -> None:
    """Zeros of either sign differ; the payloads of NaN do not count."""
    assert one.dtype == other.dtype
    assert torch.equal(one.isnan(), other.isnan())
    as_bits = torch.int32 if one.itemsize == 4 else torch.int16
    assert torch.equal(*(part.nan_to_num(nan=1.0, posinf=None).contiguous().view(as_bits) for part in (one, other)))


def assert_same(x: Tensor, fast: Tensor, plain: Tensor, upstream: Tensor) -> None:
    """Numbers and gradients of two results of ``x``."""
    assert_same_bits(fast.detach(), plain.detach())
    found, expected = (torch.autograd.grad(out, x, upstream, retain_graph=True)[0] for out in (fast, plain))
    assert_same_bits(found, expected)


@st.composite
def weights(draw: st.DrawFn) -> tuple[Tensor, Scheme]:
    scheme = draw(st.sampled_from(SCHEMES))
    size = draw(st.sampled_from([1, 2, 3, 7, 8, 15, 16, 17, 31, 32, 33, 64, 100, 130]))
    if scheme.group_size is not None:
        scheme = scheme.with_group_size(size)
    shape = draw(st.integers(1, 37)), size * draw(st.integers(1, 3))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    rows = 10.0 ** draw(st.sampled_from([-44, -12, -7, -5, -4, -3, -1, 0, 3, 7, 30])) * torch.ones(shape[0], 1)
    if draw(st.booleans()):  # each row of its own magnitude
        rows = 10.0 ** torch.randint(-8, 8, (shape[0], 1), generator=generator)
    weight = torch.randn(shape, generator=generator) * rows + draw(st.sampled_from([0.0, 0.0, 0.7, -2.0])) * rows
    for _ in range(draw(st.integers(0, 3))):
        weight[draw(st.integers(0, shape[0] - 1)), draw(st.integers(0, shape[1] - 1))] = draw(st.sampled_from(SPECIAL))
    if draw(st.booleans()):
        weight[draw(st.integers(0, shape[0] - 1))] = draw(st.sampled_from([0.0, -0.0, 0.25]))
    return weight.to(draw(st.sampled_from(DTYPES))).requires_grad_(), scheme


@needs_native
@settings(deadline=None, max_examples=150)
@given(weights())
def test_weights(case: tuple[Tensor, Scheme]) -> None:
    weight, scheme = case
    upstream = torch.randn(weight.shape).to(weight.dtype)
    assert_same(weight, fused.fake_quantize(weight, scheme), numerics.fake_quantize(weight, scheme), upstream)


@needs_native
@settings(deadline=None, max_examples=80)
@given(weights(), st.sampled_from([0.3, 0.9, 1.0, 2.0]))
def test_weights_at_fixed_scales(case: tuple[Tensor, Scheme], factor: float) -> None:
    weight, scheme = case
    scale, zero = numerics.choose_qparams(weight, scheme)
    fixed = (numerics.round_scale(scale * factor), zero)
    upstream = torch.randn(weight.shape).to(weight.dtype)
    fast, plain = (form(weight, scheme, *fixed) for form in (fused.fake_quantize, numerics.fake_quantize))
    assert_same(weight, fast, plain, upstream)


@needs_native
@settings(deadline=None, max_examples=80)
@given(weights(), st.sampled_from([None, 1e-9, 3e-3, 0.05, 1.0]))
def test_activations(case: tuple[Tensor, Scheme], fixed: float | None) -> None:
    x = case[0].detach().unflatten(0, (1, -1)).requires_grad_()
    scale = None if fixed is None else torch.tensor(fixed)
    upstream = torch.randn(x.shape).to(x.dtype)
    fast, plain = (form(x, scale) for form in (fused.fake_quantize_activation, numerics.fake_quantize_activation))
    assert_same(x, fast, plain, upstream)


@needs_native
@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_scheme_at_a_layers_size(scheme: Scheme, dtype: torch.dtype) -> None:
    weight = (torch.randn(300, 384) * 0.02).to(dtype).requires_grad_()
    upstream = torch.randn(300, 384).to(dtype)
    assert_same(weight, fused.fake_quantize(weight, scheme), numerics.fake_quantize(weight, scheme), upstream)


@needs_native
@pytest.mark.parametrize("special", [0.0, float("nan"), float("inf"), -9.0])
def test_a_group_that_is_shared_among_threads(special: float) -> None:
    weight = torch.randn(257, 1031)
    weight[250, 1000] = special
    weight.requires_grad_()
    for scheme in map(Scheme.parse, ("w8a16-tensor", "w4a16-tensor", "w4a16-tensor-asym")):
        upstream = torch.randn(257, 1031)
        assert_same(weight, fused.fake_quantize(weight, scheme), numerics.fake_quantize(weight, scheme), upstream)


@needs_native
def test_a_transposed_weight_and_a_slice() -> None:
    scheme = Scheme.parse("w4a16-g32")
    weight = torch.randn(64, 20, requires_grad=True)
    for rows in (weight.t(), torch.randn(8, 128, requires_grad=True)[:, ::2]):
        upstream = torch.randn(rows.shape)
        assert_same(rows, fused.fake_quantize(rows, scheme), numerics.fake_quantize(rows, scheme), upstream)
    x = torch.randn(3, 32, 5).transpose(1, 2).requires_grad_()
    plain = numerics.fake_quantize_activation(x)
    assert_same(x, fused.fake_quantize_activation(x), plain, torch.randn(3, 5, 32))


@needs_native
def test_other_types_devices_and_empty_tensors_take_the_plain_form() -> None:
    scheme = Scheme.parse("w4a16-g32")
    for weight in (torch.randn(2, 32, dtype=torch.float64), torch.empty(0, 32), torch.empty(2, 32, device="meta")):
        assert fused.fake_quantize(weight, scheme).shape == weight.shape
    with pytest.raises(QatError, match="divisible"):
        fused.fake_quantize(torch.randn(2, 33), scheme)


def saved_bytes(weight: Tensor, scheme: Scheme) -> int:
    saved: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        saved.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        fused.fake_quantize(weight, scheme)
    return sum(tensor.nbytes for tensor in saved)


@needs_native
def test_one_bit_a_weight_is_kept_where_it_clipped_and_nothing_where_it_did_not() -> None:
    weight = torch.randn(64, 256, requires_grad=True)
    assert saved_bytes(weight, Scheme.parse("w8a8")) == 0
    assert saved_bytes(weight, Scheme.parse("w4a16-g32")) == 64 * 256 // 8
    assert saved_bytes(-weight.detach().abs().requires_grad_(), Scheme.parse("w4a16-g32")) == 0


@needs_native
def test_the_gradient_of_the_gradient() -> None:
    weight, scheme = torch.randn(4, 64, requires_grad=True), Scheme.parse("w4a16-g32")
    found = []
    for form in (fused.fake_quantize, numerics.fake_quantize):
        (first,) = torch.autograd.grad(form(weight, scheme).pow(3).sum(), weight, create_graph=True)
        found.append(torch.autograd.grad(first.square().sum(), weight)[0])
    torch.testing.assert_close(*found, rtol=0, atol=0)


@needs_native
def test_a_gradient_that_others_can_see_is_not_written_to() -> None:
    weight, scheme, upstream = torch.randn(8, 64, requires_grad=True), Scheme.parse("w2a16-g32"), torch.ones(8, 64)
    out = fused.fake_quantize(weight, scheme)
    out.retain_grad()
    (out * 1.0 + out * 2.0).backward(upstream)
    assert torch.equal(upstream, torch.ones(8, 64))
    assert torch.equal(out.grad, torch.full((8, 64), 3.0))
    assert set(weight.grad.unique().tolist()) == {0.0, 3.0}

    seen: list[Tensor] = []
    out = fused.fake_quantize(weight, scheme)
    out.register_hook(seen.append)
    (out * 2.0).sum().backward()
    assert torch.equal(seen[0], torch.full((8, 64), 2.0))


@needs_native
@pytest.mark.parametrize("scheme", ["w4a16-g32", "w8a8", "w4a16-g32-asym"])
def test_the_two_halves_are_the_whole(scheme: str) -> None:
    weight, parsed = torch.randn(16, 64, requires_grad=True), Scheme.parse(scheme)
    whole, upstream = fused.fake_quantize(weight, parsed), torch.randn(16, 64)
    assert_same(weight, fused.straight_through(weight, *fused.quantized(weight, parsed)), whole, upstream)
    with native_disabled():
        assert_same(weight, fused.straight_through(weight, *fused.quantized(weight, parsed)), whole, upstream)


@needs_native
@pytest.mark.skipif(PORTABLE in os.environ, reason="this is that process")
def test_all_of_this_on_a_processor_without_avx512() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", __file__],
        env={**os.environ, PORTABLE: "portable"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-3000:]


def test_the_form_that_runs_is_named() -> None:
    assert fused.implementation("cuda").name == "compiled"
    assert fused.implementation("meta").name == "plain"
    with native_disabled():
        assert fused.implementation("cpu") == ("plain", "the native operators are disabled")
    with fused.using("compiled"):
        assert fused.implementation("cpu").name == "compiled"
    if available():
        assert str(fused.implementation("cpu")).startswith("native: native operators (")
