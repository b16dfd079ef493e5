"""Scales that bf16 does not hold: kept exactly, by kernels that compute with them exactly, in memory and in files."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qat_plugin import Scheme, load_converted, native, save_converted
from qat_plugin.conversion import Proof
from qat_plugin.conversion.convert import Conversion
from qat_plugin.conversion.files import install_converted
from qat_plugin.errors import ConversionError
from qat_plugin.kernels import LayerSpec, choose
from qat_plugin.kernels.scales import scale_dtype
from qat_plugin.kernels.weight import QuantizedWeight
from qat_plugin.numerics import Quantized, quantize_activation
from qat_plugin.policy import Policy

SCHEMES = ("w4a16-g32", "w4a16-g32-asym", "w4a8-g32", "w8a16-g32", "w8a16", "w8a8", "w3a16-g32")
ROUNDING = {torch.float32: 1e-6, torch.bfloat16: 4e-3}


def layer(spelling: str, held: torch.dtype, rows: int = 70, columns: int = 96) -> Quantized:
    """Integers with scales that only ``held`` and wider types hold."""
    scheme = Scheme.parse(spelling)
    kind = torch.int8 if scheme.symmetric else torch.uint8
    q = torch.randint(scheme.qmin, scheme.qmax + 1, (rows, columns)).to(kind)
    scale = (0.01 * (1 + torch.rand(rows, columns // (scheme.group_size or columns)))).to(held).float()
    zero_point = None if scheme.symmetric else torch.randint(0, 16, scale.shape).to(torch.uint8)
    return Quantized(q, scale, zero_point, scheme)


def in_float64(x: Tensor, quantized: Quantized) -> Tensor:
    groups = quantized.scale.shape[1]
    zero = 0 if quantized.zero_point is None else quantized.zero_point.double().unsqueeze(-1)
    levels = quantized.q.double().reshape(len(quantized.q), groups, -1) - zero
    weight = (levels * quantized.scale.double().unsqueeze(-1)).reshape(quantized.q.shape)
    if not quantized.scheme.quantizes_activations:
        return x.double() @ weight.t()
    integers, step = quantize_activation(x)
    return (integers.double() @ weight.t()) * step.double()


def test_the_narrowest_type_that_holds_a_scale_is_found() -> None:
    assert scale_dtype(torch.tensor([0.5, 1.0078125, 0.0, 2.0**127])) is torch.bfloat16
    assert scale_dtype(torch.tensor([0.5, 1.0009765625])) is torch.float16  # eleven significant bits
    assert scale_dtype(torch.tensor([2.0**-24 * 1023])) is torch.float16
    assert scale_dtype(torch.tensor([1.0009765625, 1e6])) is torch.float32
    assert scale_dtype(torch.tensor([0.1])) is torch.float32


@pytest.mark.parametrize("dtype", list(ROUNDING), ids=str)
@pytest.mark.parametrize("held", [torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("spelling", SCHEMES)
def test_products_use_the_scales_as_they_are(spelling: str, held: torch.dtype, dtype: torch.dtype) -> None:
    quantized = layer(spelling, held)
    assert scale_dtype(quantized.scale) is held
    weight = QuantizedWeight.from_integers(quantized, dtype)
    again = weight.integers()
    assert torch.equal(again.q, quantized.q) and torch.equal(again.scale, quantized.scale)
    for tokens in (1, 5, 40):
        x = torch.randn(tokens, 96).to(dtype)
        wanted = in_float64(x, quantized)
        allowed = (
            2 * ROUNDING[dtype] if "dequantize" in weight.kernel_name else ROUNDING[dtype]
        )  # the weight is rounded
        assert (F.linear(x, weight).double() - wanted).norm() <= allowed * wanted.norm()


@pytest.mark.skipif(not native.vectorized(), reason="needs AVX512-VNNI")
@pytest.mark.parametrize("spelling", ["w4a16-g32", "w4a8-g32", "w8a16-g32", "w8a8"])
def test_fp16_scales_run_on_the_native_kernels(spelling: str) -> None:
    weight = QuantizedWeight.from_integers(layer(spelling, torch.float16), torch.float32)
    assert weight.kernel_name == f"native-int{weight.scheme.weight_bits}"
    assert weight.scale.dtype is torch.float16


def test_a_kernel_that_would_round_them_says_so() -> None:
    spec = LayerSpec(
        Scheme.parse("w4a16-g32"), 64, 128, torch.device("cuda"), torch.bfloat16, scale_dtype=torch.float16
    )
    choice = choose(spec)
    assert choice.kernel == "dequantize"
    assert "tinygemm-int4 takes scales in bfloat16, which does not hold this weight's exactly" in choice.note
    with pytest.raises(ConversionError, match="aten-int4 takes scales in bfloat16"):
        QuantizedWeight.from_integers(layer("w4a16-g32", torch.float16, 64), torch.bfloat16, kernel="aten-int4")


@pytest.mark.parametrize("held", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_files_hold_them(held: torch.dtype, tmp_path: Path) -> None:
    quantized = layer("w4a16-g32", held)
    model = nn.Sequential(nn.Linear(96, 70, bias=False))
    conversion = Conversion(Policy({"0": "w4a16-g32"}).plan(model), Proof(()))
    weight = QuantizedWeight.from_integers(quantized, torch.float32)
    install_converted(model, {"0.weight": weight}, {}, conversion, tmp_path)
    save_converted(model, tmp_path)
    read = load_converted(nn.Sequential(nn.Linear(96, 70, bias=False)), tmp_path)
    found = read[0].weight.integers()
    assert torch.equal(found.q, quantized.q) and torch.equal(found.scale, quantized.scale)
    x = torch.randn(3, 96)
    assert torch.equal(read(x), model(x))


@pytest.mark.skipif(not native.vectorized(), reason="has no other instruction sets than the plain one")
@pytest.mark.parametrize("instructions", ["avx512-vnni", "portable"])
def test_each_instruction_set_reads_fp16_scales(instructions: str) -> None:
    script = (
        "import torch; from tests.kernels.test_scales import layer, in_float64; from qat_plugin.kernels import *\n"
        "from qat_plugin import native; from qat_plugin.kernels.weight import QuantizedWeight\n"
        "assert native.native().instruction_set == " + repr(instructions) + "\n"
        "for spelling in ('w4a16-g32', 'w4a8-g32', 'w8a16', 'w8a8-g32', 'w8a8'):\n"
        "    quantized = layer(spelling, torch.float16)\n"
        "    name = f'native-int{quantized.scheme.weight_bits}'\n"
        "    weight = QuantizedWeight.from_integers(quantized, torch.float32, kernel=name)\n"
        "    for tokens in (1, 7, 30):\n"
        "        x = torch.randn(tokens, 96)\n"
        "        wanted = in_float64(x, quantized)\n"
        "        assert (torch.nn.functional.linear(x, weight).double() - wanted).norm() <= 1e-6 * wanted.norm()\n"
        "    numbers = torch.ops.qat_plugin_native.dequantize(\n"
        "        weight.data_, weight.scale, 70, 96, quantized.scheme.weight_bits, torch.float32)\n"
        "    assert torch.equal(numbers, quantized.dequantize())\n"
    )
    environment = {**os.environ, "QAT_PLUGIN_ISA": instructions, "OMP_NUM_THREADS": "1"}
    root = Path(__file__).resolve().parents[2]
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, cwd=root, env=environment, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
