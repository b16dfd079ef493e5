"""Kernels at their edges: static scales, the row counts where they switch, every shape of input, ids that are wrong."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from qat_plugin import Scheme
from qat_plugin.errors import ConversionError
from qat_plugin.kernels import Kernel, LayerSpec, choose, kernel_named, kernels
from qat_plugin.kernels.packing import pack, packed_columns, unpack
from qat_plugin.kernels.weight import CastWeight, QuantizedWeight
from qat_plugin.numerics import fake_quantize_activation, quantize_activation, round_to_nearest

SCHEMES = [
    "w8a16", "w8a16-tensor", "w8a16-asym", "w8a16-g32", "w8a8", "w8a8-tensor", "w8a8-g32-asym", "w8a8-static",
    "w8a8-static-tensor", "w8a8-static-g32", "w4a16-g32", "w4a16", "w4a16-g32-asym", "w4a8-g32", "w4a8-static-g32",
    "w4a8-tensor-asym", "w3a16-g32", "w3a8-static-g32-asym", "w2a16-g32", "w2a8-g32-asym",
]  # fmt: skip
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
STATIC = torch.tensor(0.017)  # clips a normal sample at 2.16


def packed_weight(
    spelling: str, rows: int, columns: int, dtype: torch.dtype, kernel: str | None = None
) -> QuantizedWeight:
    scheme = Scheme.parse(spelling)
    quantized = round_to_nearest((torch.randn(rows, columns) * 0.05).to(dtype), scheme)
    return QuantizedWeight.from_integers(
        quantized, dtype, activation_scale=STATIC if scheme.static else None, kernel=kernel
    )


def exact(x: Tensor, weight: QuantizedWeight, bias: Tensor | None = None) -> Tensor:
    """The product in float64, from the integers alone."""
    integers = weight.integers()
    size = integers.q.numel() // integers.scale.numel()
    levels = integers.q.double().reshape(*integers.scale.shape, size)
    if integers.zero_point is not None:
        levels = levels - integers.zero_point.double().unsqueeze(-1)
    numbers = (levels * integers.scale.double().unsqueeze(-1)).reshape(integers.q.shape)
    values = x.double()
    if weight.scheme.quantizes_activations:
        q, scale = quantize_activation(x, weight.activation_scale)
        values = q.double() * scale.double()
    y = values @ numbers.t()
    return y if bias is None else y + bias.double()


def distance(y: Tensor, reference: Tensor) -> float:
    assert y.shape == reference.shape
    return float((y.double() - reference).norm() / reference.norm()) if reference.numel() else 0.0


@pytest.mark.parametrize("bias", [False, True], ids=["plain", "bias"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("spelling", SCHEMES)
def test_every_number_of_rows(spelling: str, dtype: torch.dtype, bias: bool) -> None:
    """The kernels switch products behind 64 and behind 128 rows."""
    weight, shift = packed_weight(spelling, 64, 128, dtype), torch.randn(64).to(dtype) if bias else None
    for rows in (0, 1, 8, 32, 64, 65, 128, 129, 200):
        x = torch.randn(rows, 128).to(dtype)
        y = F.linear(x, weight, shift)
        assert y.dtype == dtype
        tolerance = kernel_named(weight.kernel_name).tolerance(dtype)
        assert distance(y, exact(x, weight, shift)) <= tolerance, (rows, weight.kernel_name)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("spelling", SCHEMES)
def test_every_rank_and_stride(spelling: str, dtype: torch.dtype) -> None:
    weight = packed_weight(spelling, 64, 128, dtype)
    base = torch.randn(2, 3, 128, 5).to(dtype)
    inputs = {
        "rank 1": base[0, 0, :, 0].clone(),
        "rank 1, strided": base[0, 0, :, 0],
        "rank 2, transposed": base[0, 0].t(),
        "rank 2, every other row": torch.randn(10, 128).to(dtype)[::2],
        "rank 2, part of wider rows": torch.randn(5, 200).to(dtype)[:, 7:135],
        "rank 3, expanded": base[0, :1, :, 0].expand(4, 6, 128),
        "rank 4, permuted": base.permute(3, 0, 1, 2),
        "rank 3, empty": base[:, :0, :, 0],
    }
    for name, x in inputs.items():
        y = F.linear(x, weight)
        assert y.shape == (*x.shape[:-1], 64), name
        tolerance = kernel_named(weight.kernel_name).tolerance(dtype)
        assert distance(y, exact(x.contiguous(), weight)) <= tolerance, (name, weight.kernel_name)


def real_bytes(weight: QuantizedWeight) -> int:
    """What the kernel's tensors occupy; opaque ones say it themselves."""
    total = 0
    for tensor in (weight.data_, weight.scale, weight.zero_point):
        if tensor is not None:
            opaque = tensor.layout == torch._mkldnn  # type: ignore[attr-defined]
            total += torch.ops.mkldnn._nbytes(tensor) if opaque else tensor.untyped_storage().nbytes()
    return total


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("spelling", SCHEMES)
@pytest.mark.parametrize("size", [(128, 256), (72, 96), (64, 32)])
def test_the_bytes_are_those_that_are_held(spelling: str, dtype: torch.dtype, size: tuple[int, int]) -> None:
    weight = packed_weight(spelling, *size, dtype)
    spec = LayerSpec(Scheme.parse(spelling), *size, torch.device("cpu"), dtype)
    assert choose(spec).kernel == weight.kernel_name
    assert real_bytes(weight) == kernel_named(weight.kernel_name).nbytes(spec)


@pytest.mark.parametrize("spelling", ["w8a8-static", "w8a8-static-tensor", "w4a8-static-g32", "w3a8-static-g32-asym"])
def test_a_static_scale_survives_copies_and_moves(spelling: str) -> None:
    weight, x = packed_weight(spelling, 64, 128, torch.float32), torch.randn(3, 128)
    for other in (weight.clone(), weight.to(torch.bfloat16).to(torch.float32)):
        assert other.activation_scale is not None
        assert torch.equal(other.activation_scale, STATIC)
        assert torch.equal(F.linear(x, other), F.linear(x, weight))


@pytest.mark.parametrize(("name", "spelling"), [
    ("cublas-int8", "w8a8"), ("cublas-int8", "w8a8-tensor"), ("cublas-int8", "w8a8-static"),
    ("cuda-int8-weight-only", "w8a16"),
])  # fmt: skip
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_arithmetic_of_cudas_int8_kernels_on_the_cpu(name: str, spelling: str, dtype: torch.dtype) -> None:
    """Their operators exist on CPUs too: this checks rows and scales, not what the device itself asks for."""
    weight = packed_weight(spelling, 64, 128, dtype, kernel=name)
    kernel: Kernel = kernel_named(name)
    spec = LayerSpec(Scheme.parse(spelling), 64, 128, torch.device("cuda"), dtype)
    assert kernel.refusal(spec) is None
    assert real_bytes(weight) == kernel.nbytes(spec)
    for rows in (0, 1, 16, 17, 31, 32, 33, 100):
        x = torch.randn(rows, 128).to(dtype)
        assert distance(F.linear(x, weight), exact(x, weight)) <= kernel.tolerance(dtype), rows


@pytest.mark.parametrize("spelling", ["w8a16", "w8a16-tensor", "w4a16-g32", "w4a16-g32-asym", "w3a16-g32"])
@pytest.mark.parametrize("usage", ["embedding", "both"])
def test_an_embedding_takes_the_ids_that_a_float_one_takes(spelling: str, usage: str) -> None:
    quantized = round_to_nearest(torch.randn(50, 64), Scheme.parse(spelling))
    weight = QuantizedWeight.from_integers(quantized, torch.float32, usage=usage)  # type: ignore[arg-type]
    table = weight.dequantize()
    ids = torch.tensor([[0, 49], [7, 7]])
    for good in (ids, ids.int(), ids[0, 0], ids[:0], ids.t()):
        assert torch.equal(F.embedding(good, weight), F.embedding(good, table))
    assert torch.equal(F.embedding(ids, weight, padding_idx=0), F.embedding(ids, table, padding_idx=0))
    for bad in (-1, 50):
        with pytest.raises(IndexError):
            F.embedding(torch.tensor([bad]), table)
        with pytest.raises(IndexError):
            F.embedding(torch.tensor([bad]), weight)
    with pytest.raises(ConversionError, match="max_norm"):
        F.embedding(ids, weight, max_norm=1.0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("spelling", ["w8a8", "w8a16", "w4a16-g32", "w4a16-g32-asym"])
def test_a_tied_weight_multiplies_and_looks_up(spelling: str, dtype: torch.dtype) -> None:
    scheme, x, ids = Scheme.parse(spelling), torch.randn(5, 64).to(dtype), torch.tensor([3, 0, 63])
    quantized = round_to_nearest(torch.randn(64, 64), scheme)
    weight = QuantizedWeight.from_integers(quantized, dtype, usage="both")
    assert distance(F.linear(x, weight), exact(x, weight)) <= kernel_named(weight.kernel_name).tolerance(dtype)
    assert torch.equal(F.embedding(ids, weight), weight.dequantize()[ids])


@pytest.mark.parametrize("spelling", ["w8a16", "w8a8", "w4a16-g32-asym"])
def test_addmm_is_bias_plus_product_and_nothing_else(spelling: str) -> None:
    quantized = round_to_nearest(torch.randn(24, 32), Scheme.parse(spelling))
    weight = QuantizedWeight.from_integers(quantized, torch.float32, transposed=True)
    bias, x = torch.randn(24), torch.randn(4, 32)
    assert weight.shape == (32, 24)
    assert distance(torch.addmm(bias, x, weight), exact(x, weight, bias)) <= 1e-5
    straight = QuantizedWeight.from_integers(quantized, torch.float32)
    for call in (
        lambda: torch.addmm(bias, x, weight, alpha=2),
        lambda: torch.addmm(bias, x, weight, beta=0),
        lambda: torch.addmm(bias, x, straight),
    ):
        with pytest.raises(ConversionError, match=r"bias \+ x @ weight"):
            call()


@pytest.mark.parametrize("spelling", SCHEMES)
def test_integers_survive_every_float_type_in_turn(spelling: str) -> None:
    weight = packed_weight(spelling, 128, 128, torch.float32)
    before = weight.integers()
    for dtype in (torch.bfloat16, torch.float16, torch.bfloat16, torch.float32):
        weight = weight.to(dtype)
        after = weight.integers()
        assert weight.dtype == dtype
        assert torch.equal(after.q, before.q)
        assert torch.equal(after.scale, before.scale)
        assert str(after.scheme) == spelling
        if before.zero_point is not None:
            assert after.zero_point is not None
            assert torch.equal(after.zero_point, before.zero_point)


@pytest.mark.parametrize("spelling", ["w8a8", "w4a8-g32", "w4a8-static-g32"])
def test_the_portable_kernel_is_the_fake_quantized_layer_to_the_bit(spelling: str) -> None:
    weight, x = packed_weight(spelling, 64, 128, torch.float32, kernel="dequantize"), torch.randn(7, 128)
    trained = F.linear(fake_quantize_activation(x, weight.activation_scale), weight.dequantize())
    assert torch.equal(F.linear(x, weight), trained)


def test_a_gradient_passes_a_cast_weight_and_not_an_integer_one() -> None:
    original, x = torch.randn(8, 16), torch.randn(3, 16, requires_grad=True)
    stored = original.to(torch.float16)
    F.linear(x, CastWeight(stored, torch.float32)).sum().backward()
    assert x.grad is not None
    torch.testing.assert_close(x.grad, stored.float().sum(0).expand(3, 16))
    bias = torch.zeros(8, requires_grad=True)
    weight = QuantizedWeight.from_integers(round_to_nearest(original, Scheme.parse("w8a16")), torch.float32)
    F.linear(x.detach(), weight, bias).sum().backward()  # a trained bias needs nothing from the integers
    assert bias.grad is not None
    assert bias.grad.tolist() == [3.0] * 8
    with pytest.raises(ConversionError, match=r"w8a16.*Train before convert"):
        F.linear(x, weight).sum().backward()


def test_every_kernel_states_what_it_costs_and_how_it_rounds() -> None:
    names = [kernel.name for kernel in kernels()]
    assert len(set(names)) == len(names)
    assert names[-1] == "dequantize"
    for kernel in kernels():
        assert (
            kernel.tolerance(torch.float32) < kernel.tolerance(torch.float16) < kernel.tolerance(torch.bfloat16) < 0.1
        )


@settings(deadline=None)
@given(st.sampled_from([8, 4, 3, 2]), st.lists(st.integers(0, 5), min_size=1, max_size=4), st.integers(0, 9999))
def test_packing_any_shape(bits: int, shape: list[int], seed: int) -> None:
    q = torch.randint(0, 1 << bits, shape, generator=torch.Generator().manual_seed(seed)).to(torch.uint8)
    packed = pack(q, bits)
    assert packed.shape == (*shape[:-1], packed_columns(shape[-1], bits))
    assert torch.equal(unpack(packed, bits, shape[-1], signed=False), q)
