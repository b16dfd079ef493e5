"""The CUDA kernels against float64, and a converted model that follows its device."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from qat_plugin import Scheme, convert, is_converted
from qat_plugin.kernels import LayerSpec, choose, kernel_named
from qat_plugin.kernels.weight import QuantizedWeight
from qat_plugin.numerics import round_to_nearest
from tests.kernels.test_kernels import SCHEMES, error, in_float64

needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device here")


@pytest.mark.parametrize(
    ("spelling", "dtype", "kernel"),
    [
        ("w8a8", torch.bfloat16, "cublas-int8"),
        ("w8a16", torch.bfloat16, "cuda-int8-weight-only"),
        ("w8a16", torch.float16, "dequantize"),
        ("w4a16-g32", torch.bfloat16, "tinygemm-int4"),
        ("w4a8-g128", torch.bfloat16, "tinygemm-int4"),
        ("w4a16-g32", torch.float32, "dequantize"),
        ("w4a16-g32-asym", torch.bfloat16, "dequantize"),
        ("w2a16-g32", torch.bfloat16, "dequantize"),
    ],
)
def test_a_plan_for_cuda_can_be_made_anywhere(spelling: str, dtype: torch.dtype, kernel: str) -> None:
    spec = LayerSpec(Scheme.parse(spelling), 1024, 1024, torch.device("cuda"), dtype)
    assert choose(spec).kernel == kernel


@needs_cuda
@pytest.mark.cuda
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("spelling", SCHEMES)
def test_within_its_rounding_of_float64(spelling: str, dtype: torch.dtype) -> None:
    quantized = round_to_nearest(torch.randn(128, 256, device="cuda") * 0.05, Scheme.parse(spelling))
    weight = QuantizedWeight.from_integers(quantized, dtype)
    assert torch.equal(weight.integers().q, quantized.q)
    assert torch.equal(weight.integers().scale, quantized.scale)
    for rows in (1, 8, 17, 128, 200):
        x = torch.randn(rows, 256, device="cuda").to(dtype)
        assert error(F.linear(x, weight), in_float64(x, weight)) <= kernel_named(weight.kernel_name).tolerance(dtype)


@needs_cuda
@pytest.mark.cuda
@pytest.mark.parametrize("spelling", ["w8a8", "w8a16", "w4a16-g32", "w4a8-g32"])
def test_a_converted_model_moves_to_the_device_with_its_integers(spelling: str) -> None:
    model = convert(nn.Sequential(nn.Linear(256, 256)).bfloat16(), spelling)
    before = model[0].weight.integers()
    model.cuda()
    assert is_converted(model)
    assert torch.equal(model[0].weight.integers().q.cpu(), before.q)
    x = torch.randn(4, 256, dtype=torch.bfloat16, device="cuda")
    assert error(model(x) - model[0].bias, in_float64(x, model[0].weight)) < 2e-2
