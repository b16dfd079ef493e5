"""The native kernels: any shape within its rounding of float64, on each instruction set, and what building says."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from qat_plugin import Scheme, convert, native
from qat_plugin.kernels import kernel_named
from qat_plugin.kernels.table import LayerSpec
from qat_plugin.kernels.weight import QuantizedWeight
from qat_plugin.numerics import Quantized, quantize_activation, round_to_nearest

pytestmark = pytest.mark.skipif(not native.available(), reason=f"no native operators: {native.native().reason}")

# Of the sums in float32 and of the output's own type; the weights' numbers and the INT8 activations are exact.
ROUNDING = {torch.float32: 1e-6, torch.bfloat16: 4e-3, torch.float16: 5e-4}
WEIGHTS = ("w8a8", "w8a16", "w8a8-tensor", "w4a8", "w4a16")
GROUPED = ("w8a8", "w8a16", "w4a8", "w4a16")


@st.composite
def layers(draw: st.DrawFn) -> tuple[str, int, int]:
    """A scheme, output channels and inputs that its groups divide."""
    rows = draw(st.integers(1, 200))
    if draw(st.booleans()):
        return draw(st.sampled_from(WEIGHTS)), rows, draw(st.integers(1, 300))
    group = 8 * draw(st.integers(1, 20))
    return f"{draw(st.sampled_from(GROUPED))}-g{group}", rows, group * draw(st.integers(1, 6))


def packed(
    spelling: str, rows: int, columns: int, dtype: torch.dtype, seed: int = 0
) -> tuple[Quantized, QuantizedWeight]:
    """Integers and the native kernel's layout of them, whatever instruction set is in force."""
    generator = torch.Generator().manual_seed(seed)
    quantized = round_to_nearest(torch.randn(rows, columns, generator=generator), Scheme.parse(spelling))
    kernel = kernel_named(f"native-int{quantized.scheme.weight_bits}")
    spec = LayerSpec(quantized.scheme, rows, columns, torch.device("cpu"), dtype)
    data = kernel.pack(quantized, spec)
    assert data.data.nbytes + data.scale.nbytes == kernel.nbytes(spec)
    return quantized, QuantizedWeight(
        data.data, data.scale, kernel.name, spelling, (rows, columns), dtype, False, "linear"
    )


def in_float64(x: Tensor, quantized: Quantized, bias: Tensor | None = None) -> Tensor:
    weight = quantized.dequantize(torch.float64)
    if quantized.scheme.quantizes_activations:
        integers, scale = quantize_activation(x)
        y = (integers.double() @ weight.t()) * scale.double()
    else:
        y = x.double() @ weight.t()
    return y if bias is None else y + bias.double()


@settings(deadline=None, max_examples=150)
@given(layer=layers(), tokens=st.integers(1, 40), dtype=st.sampled_from(list(ROUNDING)), biased=st.booleans())
def test_within_its_rounding_of_float64(
    layer: tuple[str, int, int], tokens: int, dtype: torch.dtype, biased: bool
) -> None:
    quantized, weight = packed(*layer, dtype)
    generator = torch.Generator().manual_seed(tokens)
    x = torch.randn(tokens, layer[2], generator=generator).to(dtype)
    bias = torch.randn(layer[1], generator=generator).to(dtype) if biased else None
    wanted = in_float64(x, quantized, bias)
    summed = (x.double().abs() @ quantized.dequantize(torch.float64).abs().t()).norm()  # sums may cancel
    assert (F.linear(x, weight, bias).double() - wanted).norm() <= ROUNDING[dtype] * wanted.norm() + 1e-6 * summed
    held = weight.integers()
    assert torch.equal(held.q, quantized.q) and torch.equal(held.scale, quantized.scale)
    numbers = torch.ops.qat_plugin_native.dequantize(
        weight.data_, weight.scale, layer[1], layer[2], quantized.scheme.weight_bits, dtype
    )
    assert torch.equal(numbers, quantized.dequantize(dtype))


@pytest.mark.parametrize("tokens", [1, 2, 4, 8, 16, 32, 64, 128, 300, 512])
@pytest.mark.parametrize("spelling", ["w8a8", "w8a16", "w4a8-g32", "w4a16-g32", "w8a16-g32"])
@pytest.mark.parametrize("dtype", list(ROUNDING), ids=str)
def test_many_rows_and_large_layers(spelling: str, dtype: torch.dtype, tokens: int) -> None:
    """More rows than a block of them, more inputs than a panel; numbers do not depend on the threads."""
    quantized, weight = packed(spelling, 130, 1376, dtype)
    x = torch.randn(tokens, 1376, generator=torch.Generator().manual_seed(7)).to(dtype)  # not the weight's numbers
    wanted = in_float64(x, quantized)
    y = F.linear(x, weight)
    assert (y.double() - wanted).norm() <= ROUNDING[dtype] * wanted.norm()
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        assert torch.equal(F.linear(x, weight), y)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("tokens", [0, 1, 3, 40])
@pytest.mark.parametrize("spelling", ["w8a8", "w8a16", "w4a8-g32", "w4a16-g32"])
@pytest.mark.parametrize("dtype", list(ROUNDING), ids=str)
def test_layers_of_one_input_compute_what_each_computes(spelling: str, tokens: int, dtype: torch.dtype) -> None:
    weights = [packed(spelling, rows, 96, dtype, seed=rows)[1] for rows in (64, 100, 1)]
    bias, x = torch.randn(100).to(dtype), torch.randn(2, tokens, 96).to(dtype)
    scheme = weights[0].scheme
    together = torch.ops.qat_plugin_native.linears(
        x, [w.data_ for w in weights], [w.scale for w in weights], [None, bias, None], None,
        [w.out_features for w in weights], 96, scheme.weight_bits, scheme.quantizes_activations,
    )  # fmt: skip
    for y, weight, added in zip(together, weights, (None, bias, None), strict=True):
        assert torch.equal(y, F.linear(x, weight, added))


@settings(deadline=None, max_examples=40)
@given(
    tokens=st.integers(1, 4), rows=st.integers(1, 70), columns=st.integers(1, 400),
    dtype=st.sampled_from(list(ROUNDING)), biased=st.booleans(),
)  # fmt: skip
def test_float_products_of_few_rows_are_as_exact(
    tokens: int, rows: int, columns: int, dtype: torch.dtype, biased: bool
) -> None:
    generator = torch.Generator().manual_seed(rows)
    x, weight = (torch.randn(n, columns, generator=generator).to(dtype) for n in (tokens, rows))
    bias = torch.randn(rows, generator=generator).to(dtype) if biased else None
    y = torch.ops.qat_plugin_native.dense(x, weight, bias)
    wanted = x.double() @ weight.double().t() + (0 if bias is None else bias.double())
    scale = (x.double().abs() @ weight.double().abs().t()).norm()  # sums may cancel
    assert (y.double() - wanted).norm() <= ROUNDING[dtype] * wanted.norm() + 1e-6 * scale


@pytest.mark.parametrize("spelling", ["w8a8", "w4a8-g32"])
def test_integer_products_are_exact(spelling: str) -> None:
    """With scales of one, outputs are integers: compared with int64, at the ends of the range."""
    quantized, _ = packed(spelling, 70, 1024, torch.float32)
    extreme = torch.where(quantized.q >= 0, quantized.scheme.qmax, quantized.scheme.qmin).to(torch.int8)
    ones = Quantized(extreme, torch.ones_like(quantized.scale), None, quantized.scheme)
    spec = LayerSpec(ones.scheme, 70, 1024, torch.device("cpu"), torch.float32)
    kernel = kernel_named(f"native-int{ones.scheme.weight_bits}")
    data = kernel.pack(ones, spec)
    weight = QuantizedWeight(data.data, data.scale, kernel.name, spelling, (70, 1024), torch.float32, False, "linear")
    x = torch.where(torch.randn(5, 1024) > 0, 127.0, -127.0)
    assert torch.equal(F.linear(x, weight).long(), x.long() @ extreme.long().t())


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("spelling", ["w8a8", "w4a8-g32", "w8a16", "w4a16-g32"])
def test_a_number_that_is_none_spoils_its_own_row_only(spelling: str, bad: float) -> None:
    _, weight = packed(spelling, 64, 64, torch.float32)
    x = torch.randn(3, 64)
    clean = F.linear(x, weight)
    x[1, 7] = bad
    y = F.linear(x, weight)
    assert torch.equal(y[0], clean[0]) and torch.equal(y[2], clean[2])
    assert not y[1].isfinite().any()


def test_a_calibrated_scale_clips_as_the_plain_form_does() -> None:
    quantized, weight = packed("w8a8-static", 64, 64, torch.float32)
    weight.activation_scale = torch.tensor(0.01)
    x = 3 * torch.randn(9, 64)
    integers, scale = quantize_activation(x, weight.activation_scale)
    wanted = integers.double() @ quantized.dequantize(torch.float64).t() * scale.double()
    torch.testing.assert_close(F.linear(x, weight).double(), wanted, rtol=1e-6, atol=1e-6)


def test_what_does_not_fit_is_refused() -> None:
    _, weight = packed("w8a8", 64, 64, torch.float32)
    linear = torch.ops.qat_plugin_native.linear
    with pytest.raises(RuntimeError, match="input has shape"):
        linear(torch.zeros(2, 63), weight.data_, weight.scale, None, None, 64, 64, 8, True)
    with pytest.raises(RuntimeError, match="is not \\[128, 64\\]"):
        linear(torch.zeros(2, 64), weight.data_, weight.scale, None, None, 128, 64, 8, True)
    with pytest.raises(RuntimeError, match="bias has 3 elements"):
        linear(torch.zeros(2, 64), weight.data_, weight.scale, torch.zeros(3), None, 64, 64, 8, True)
    with pytest.raises(RuntimeError, match="fp32, bf16 or fp16"):
        linear(torch.zeros(2, 64).double(), weight.data_, weight.scale, None, None, 64, 64, 8, True)


@pytest.mark.parametrize("scheme", ["w8a8", "w4a16-g32"])
def test_torch_export(scheme: str) -> None:
    model = convert(nn.Sequential(nn.Linear(64, 96), nn.ReLU(), nn.Linear(96, 64)), scheme).eval()
    x = torch.randn(4, 64)
    rows = torch.export.Dim("rows", min=2, max=64)
    with torch.no_grad():
        exported = torch.export.export(model, (x,), dynamic_shapes=({0: rows},))
        other = torch.randn(7, 64)
        assert torch.equal(exported.module()(other), model(other))


@pytest.mark.slow
@pytest.mark.parametrize("isa", ["portable", "avx512-vnni"])
def test_other_instruction_sets(isa: str) -> None:
    code = "import torch; from qat_plugin import native; print(native.native().instruction_set)"
    environment = {**os.environ, "QAT_PLUGIN_ISA": isa}
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=True)
    if shown.stdout.split()[-1] != isa:
        pytest.skip(f"this CPU has no {isa}")
    exact = ("within_its_rounding", "exact", "none_spoils", "calibrated", "many_rows", "attends", "compute_what_each")
    chosen = " or ".join(exact)
    files = [__file__, str(Path(__file__).parents[1] / "test_inference.py")]
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *files, "-k", chosen]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stdout[-3000:]


def found(**environment: str) -> str:
    code = "from qat_plugin import native; print(native.native())"
    done: Any = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env={**os.environ, **environment}, check=True
    )
    return str(done.stdout.strip())


def test_why_there_are_none_is_said(tmp_path: Path) -> None:
    assert found(QAT_PLUGIN_NATIVE="0") == "no native operators: QAT_PLUGIN_NATIVE=0"
    assert "no-such-compiler does not run" in found(CXX="no-such-compiler", QAT_PLUGIN_CACHE=str(tmp_path / "empty"))
    broken = tmp_path / "compiler"
    broken.write_text(
        '#!/bin/sh\n[ "$1" = --version ] && echo broken 1.0 && exit 0\necho "x.cpp:1: error: oh" >&2; exit 1\n'
    )
    broken.chmod(0o755)
    assert "failed: x.cpp:1: error: oh" in found(CXX=str(broken), QAT_PLUGIN_CACHE=str(tmp_path / "cache"))
    assert [file.suffix for file in (tmp_path / "cache" / "native").iterdir()] == [".failed"]
    broken.write_text('#!/bin/sh\necho broken 1.0\n[ "$1" = --version ] || touch "$0.was-run"\n')
    again = found(CXX=str(broken), QAT_PLUGIN_CACHE=str(tmp_path / "cache"))
    assert "failed: x.cpp:1: error: oh (remembered; delete" in again
    assert not (tmp_path / "compiler.was-run").exists()


def test_a_library_that_others_can_write_is_not_loaded(tmp_path: Path) -> None:
    folder = tmp_path / "native"
    folder.mkdir()
    folder.chmod(0o777)
    assert f"{folder} can be written by other users" in found(QAT_PLUGIN_CACHE=str(tmp_path))


def test_a_compiler_that_was_stopped_is_asked_again(tmp_path: Path) -> None:
    killed = tmp_path / "compiler"
    said = "g++: fatal error: Killed signal terminated program cc1plus"
    killed.write_text(f'#!/bin/sh\n[ "$1" = --version ] && echo 1.0 && exit 0\necho "{said}" >&2; exit 1\n')
    killed.chmod(0o755)
    assert "Killed signal" in found(CXX=str(killed), QAT_PLUGIN_CACHE=str(tmp_path / "cache"))
    assert not list((tmp_path / "cache" / "native").iterdir())


def test_a_model_converts_without_them() -> None:
    model = nn.Sequential(nn.Linear(64, 64))
    with native.native_disabled():
        convert(model, "w8a8")
        assert model[0].weight.kernel_name != "native-int8"
