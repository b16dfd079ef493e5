"""Fake quantization and torch.compile: inside a user's whole model, and compiled by itself where that is asked for."""

from __future__ import annotations

import contextlib
import shutil
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from qat_plugin import fused, numerics
from qat_plugin.native import native_disabled
from qat_plugin.qat import prepare
from qat_plugin.scheme import Scheme
from tests.numerics.test_fused import DTYPES, assert_same, assert_same_bits, needs_native

needs_compiler = pytest.mark.skipif(
    not any(map(shutil.which, ("g++", "clang++"))), reason="Inductor needs a C++ compiler on CPU"
)


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    torch.compiler.reset()
    fused._checked.cache_clear()
    yield
    torch.compiler.reset()
    fused._checked.cache_clear()


class ManyShapes(nn.Module):
    """Twenty linear layers, no two of one shape."""

    def __init__(self) -> None:
        super().__init__()
        widths = [32 * (number + 1) for number in range(21)]
        self.layers = nn.ModuleList(map(nn.Linear, widths, widths[1:]))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = torch.tanh(layer(x))
        return x


def gradients(model: nn.Module, run: Callable[[Tensor], Tensor], x: Tensor) -> list[Tensor]:
    model.zero_grad()
    x = x.clone().requires_grad_()
    out = run(x)
    out.square().sum().backward()
    return [out.detach(), x.grad, *(parameter.grad for parameter in model.parameters())]


class Graphs:
    """A backend that counts its graphs and runs them as eager PyTorch does, gradients included."""

    def __init__(self) -> None:
        self.number = 0

    def __call__(self, graph: Any, inputs: Any) -> Any:
        from torch._dynamo.backends.debugging import aot_eager

        self.number += 1
        return aot_eager(graph, inputs)


@needs_native
@pytest.mark.parametrize("scheme", ["w4a8-g32", "w8a8", "w4a16-g32-asym"])
@pytest.mark.parametrize("disabled", [False, True])
def test_a_whole_model_of_many_shapes_is_one_graph_for_every_batch(scheme: str, disabled: bool) -> None:
    with native_disabled() if disabled else contextlib.nullcontext():
        model, graphs = prepare(ManyShapes(), scheme), Graphs()
        compiled = torch.compile(model, fullgraph=True, backend=graphs)
        for rows in (4, 7, 9, 30):
            x = torch.randn(rows, 32)
            eager = gradients(model, model, x)
            for found, expected in zip(gradients(model, compiled, x), eager, strict=True):
                torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    assert graphs.number == 2  # the first batch's, and one of any size


@needs_native
@needs_compiler
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_inductor_keeps_the_native_operators(dtype: torch.dtype) -> None:
    weight = torch.randn(24, 64, dtype=dtype, requires_grad=True)
    for scheme in (Scheme.parse("w4a16-g32"), Scheme.parse("w8a8")):
        compiled = torch.compile(fused.fake_quantize, fullgraph=True)
        plain = numerics.fake_quantize(weight, scheme)
        assert_same(weight, compiled(weight, scheme), plain, torch.randn(24, 64).to(dtype))


@needs_native
@pytest.mark.parametrize("scheme", ["w4a8-g32", "w8a8"])
def test_under_autocast_and_recomputed(scheme: str) -> None:
    model, x = prepare(nn.Sequential(nn.Linear(64, 96), nn.Tanh(), nn.Linear(96, 32)), scheme), torch.randn(5, 64)
    with torch.autocast("cpu", torch.bfloat16):
        fast = gradients(model, model, x)
        recomputed = gradients(model, lambda x: checkpoint(model, x, use_reentrant=False), x)
        with native_disabled():
            plain = gradients(model, model, x)
    for found in (fast, recomputed):
        for one, other in zip(found, plain, strict=True):
            assert_same_bits(one, other)


@needs_compiler
@pytest.mark.parametrize("dtype", DTYPES)
def test_compiled_by_itself_it_gives_the_plain_bits(dtype: torch.dtype) -> None:
    with fused.using("compiled"), warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        for scheme in map(Scheme.parse, ("w4a16-g32", "w8a16-asym")):
            for rows, columns in ((5, 96), (1, 32), (64, 128), (3, 320)):  # sizes that would be versions of their own
                weight = torch.randn(rows, columns).to(dtype).requires_grad_()
                upstream = torch.randn(rows, columns).to(dtype)
                assert_same(
                    weight, fused.fake_quantize(weight, scheme), numerics.fake_quantize(weight, scheme), upstream
                )
                for scale in (None, torch.tensor(0.01)):
                    plain = numerics.fake_quantize_activation(weight, scale)
                    assert_same(weight, fused.fake_quantize_activation(weight, scale), plain, upstream)


@pytest.mark.parametrize("wrong", ["fails", "differs"])
def test_what_does_not_compile_or_gives_other_bits_is_plain_and_says_so(
    wrong: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def compile_badly(function: Callable[..., Any]) -> Callable[..., Any]:
        if wrong == "fails":
            raise RuntimeError("no compiler\nmore lines")
        return lambda *arguments: (function(*arguments)[0] * 1.5, function(*arguments)[1])

    monkeypatch.setattr(fused, "_compile", compile_badly)
    weight, scheme = torch.randn(4, 64, requires_grad=True), Scheme.parse("w4a16-g32")
    expected = {"fails": "RuntimeError: no compiler$", "differs": "its bits are not those of the plain form"}[wrong]
    with fused.using("compiled"):
        with pytest.warns(UserWarning, match=f"w4a16 weights on cpu in torch.float32 is not used.*{expected}"):
            first = fused.fake_quantize(weight, scheme)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            fused.fake_quantize(weight, scheme)  # said once
    assert_same(weight, first, numerics.fake_quantize(weight, scheme), torch.randn(4, 64))
