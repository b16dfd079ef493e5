"""What the CUDA kernels must hold besides the usual products: static scales, shapes, bytes; and graphs on the CPU."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from qat_plugin import Scheme
from qat_plugin.kernels import LayerSpec, kernel_named
from qat_plugin.kernels.weight import QuantizedWeight
from qat_plugin.numerics import round_to_nearest
from tests.kernels.test_kernel_edges import SCHEMES, STATIC, distance, exact, packed_weight, real_bytes

needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device here")
DEVICES = ["cpu", pytest.param("cuda", marks=[needs_cuda, pytest.mark.cuda])]


@needs_cuda
@pytest.mark.cuda
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("spelling", SCHEMES)
def test_shapes_bytes_and_static_scales_on_the_device(spelling: str, dtype: torch.dtype) -> None:
    scheme = Scheme.parse(spelling)
    quantized = round_to_nearest(torch.randn(128, 256, device="cuda").to(dtype) * 0.05, scheme)
    static = STATIC.cuda() if scheme.static else None
    weight = QuantizedWeight.from_integers(quantized, dtype, activation_scale=static)
    kernel = kernel_named(weight.kernel_name)
    assert real_bytes(weight) == kernel.nbytes(LayerSpec(scheme, 128, 256, torch.device("cuda"), dtype))
    bias = torch.randn(128, device="cuda").to(dtype)
    base = torch.randn(2, 3, 256, 5, device="cuda").to(dtype)
    for x in (base[:, :0, :, 0], base[0, 0, :, 0], base[0, 0].t(), base.permute(3, 0, 1, 2)):
        assert distance(F.linear(x, weight, bias), exact(x.contiguous(), weight, bias)) <= kernel.tolerance(dtype)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("spelling", ["w8a8-static", "w4a8-static-g32", "w8a16-tensor", "w3a8-static-g32-asym"])
def test_a_graph_computes_the_same(spelling: str, dtype: torch.dtype, device: str) -> None:
    torch._dynamo.reset()
    weight, x = packed_weight(spelling, 64, 128, dtype).to(device), torch.randn(3, 128, device=device).to(dtype)
    compiled = torch.compile(lambda x: F.linear(x, weight), backend="aot_eager")
    assert torch.equal(compiled(x), F.linear(x, weight))
