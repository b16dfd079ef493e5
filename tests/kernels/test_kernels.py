"""Kernels: each within its stated rounding of float64, for every scheme, type and number of rows."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from qat_plugin import Scheme, native
from qat_plugin.errors import ConversionError
from qat_plugin.kernels import Kernel, LayerSpec, choose, kernel_named, kernels, register, table
from qat_plugin.kernels.table import Packed
from qat_plugin.kernels.weight import QuantizedWeight
from qat_plugin.measure import model_bytes
from qat_plugin.numerics import Quantized, quantize_activation, round_to_nearest

SCHEMES = [
    "w8a16", "w8a16-g32", "w8a16-asym", "w8a8", "w8a8-tensor", "w8a8-g32", "w8a8-asym",
    "w4a16-g32", "w4a16-g64", "w4a16-g128", "w4a16", "w4a16-g32-asym", "w4a8-g32", "w4a8-g32-asym",
    "w3a16-g32", "w3a8-g32-asym", "w2a16-g32", "w2a16-g32-asym",
]  # fmt: skip
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.fixture(autouse=True, params=[True, False], ids=["native", "torch"])
def with_native(request: pytest.FixtureRequest) -> Iterator[bool]:
    """Every test runs on the package's own kernels (where they are built) and on those of torch alone."""
    if request.param:
        yield native.available()
        return
    with native.native_disabled():
        yield False


def weight_of(spelling: str, rows: int, columns: int, dtype: torch.dtype, **options: object) -> QuantizedWeight:
    weight = (torch.randn(rows, columns) * 0.05).to(dtype)
    return QuantizedWeight.from_integers(round_to_nearest(weight, Scheme.parse(spelling)), dtype, **options)  # type: ignore[arg-type]


def in_float64(x: Tensor, weight: QuantizedWeight) -> Tensor:
    """The product of the integers' numbers, nothing rounded but the activation's own integers."""
    quantized = weight.integers()
    q = quantized.q.double().unflatten(1, (quantized.scale.shape[1], -1)) if quantized.scale.shape != (1, 1) else None
    if q is None:
        numbers = quantized.q.double() * quantized.scale.double()
    else:
        zero = 0 if quantized.zero_point is None else quantized.zero_point.double().unsqueeze(-1)
        numbers = ((q - zero) * quantized.scale.double().unsqueeze(-1)).flatten(1)
    if weight.scheme.quantizes_activations:
        integers, scale = quantize_activation(x)
        return (integers.double() @ numbers.t()) * scale.double()
    return x.double() @ numbers.t()


def error(output: Tensor, reference: Tensor) -> float:
    return float((output.double() - reference).norm() / reference.norm())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("spelling", SCHEMES)
def test_within_its_rounding_of_float64(spelling: str, dtype: torch.dtype) -> None:
    weight = weight_of(spelling, 128, 256, dtype)
    tolerance = kernel_named(weight.kernel_name).tolerance(dtype)
    for rows in (1, 8, 32, 128, 200):
        x = torch.randn(rows, 256).to(dtype)
        y = F.linear(x, weight)
        assert y.dtype == dtype
        assert error(y, in_float64(x, weight)) <= tolerance, (rows, weight.kernel_name)


@pytest.mark.parametrize("shape", [(64,), (1, 64), (3, 5, 64), (2, 3, 4, 64), (0, 64), (2, 0, 64)])
@pytest.mark.parametrize("spelling", ["w8a8", "w8a16", "w4a16-g32", "w4a8-g32", "w2a16-g32"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_any_number_of_dimensions_with_and_without_bias(
    shape: tuple[int, ...], spelling: str, dtype: torch.dtype
) -> None:
    weight, bias, x = weight_of(spelling, 64, 64, dtype), torch.randn(64).to(dtype), torch.randn(shape).to(dtype)
    assert F.linear(x, weight).shape == (*shape[:-1], 64)
    rows = x.reshape(-1, 64)
    assert torch.equal(F.linear(x, weight, bias).reshape(-1, 64), F.linear(rows, weight, bias))
    if x.numel():
        expected, tolerance = (
            in_float64(rows, weight) + bias.double(),
            kernel_named(weight.kernel_name).tolerance(dtype),
        )
        assert error(F.linear(rows, weight, bias), expected) <= tolerance


@pytest.mark.parametrize("spelling", SCHEMES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_inputs_need_not_be_contiguous(spelling: str, dtype: torch.dtype) -> None:
    weight = weight_of(spelling, 64, 128, dtype)
    x = torch.randn(128, 6).to(dtype).t()
    assert torch.equal(F.linear(x, weight), F.linear(x.contiguous(), weight))


@pytest.mark.parametrize("size", [(10, 33), (3, 172), (64, 31), (1, 1), (200, 100)])
@pytest.mark.parametrize("spelling", ["w8a8", "w8a16", "w4a16", "w3a16", "w2a16-asym"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_odd_sizes(size: tuple[int, int], spelling: str, dtype: torch.dtype) -> None:
    weight, x = weight_of(spelling, *size, dtype), torch.randn(5, size[1]).to(dtype)
    assert error(F.linear(x, weight), in_float64(x, weight)) <= kernel_named(weight.kernel_name).tolerance(dtype)


@pytest.mark.parametrize("spelling", SCHEMES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", [(64, 128), (172, 128), (130, 256)])
def test_integers_come_back_and_take_the_bytes_that_were_promised(
    spelling: str, dtype: torch.dtype, size: tuple[int, int]
) -> None:
    scheme = Scheme.parse(spelling)
    quantized = round_to_nearest(torch.randn(size).to(dtype), scheme)
    weight = QuantizedWeight.from_integers(quantized, dtype)
    back = weight.integers()
    assert torch.equal(back.q, quantized.q)
    assert torch.equal(back.scale, quantized.scale)
    assert (back.zero_point is None) or torch.equal(back.zero_point, quantized.zero_point)  # type: ignore[arg-type]
    layer = torch.nn.Linear(1, 1, bias=False)
    layer.weight = torch.nn.Parameter(weight, requires_grad=False)
    spec = LayerSpec(scheme, *size, torch.device("cpu"), dtype)
    assert model_bytes(layer) == kernel_named(weight.kernel_name).nbytes(spec)


def test_int4_takes_half_a_byte() -> None:
    layer = torch.nn.Linear(1, 1, bias=False)
    for dtype in DTYPES:
        layer.weight = torch.nn.Parameter(weight_of("w4a16-g128", 128, 1024, dtype), requires_grad=False)
        assert model_bytes(layer) <= 128 * 1024 * (0.5 + 4 / 128)


@pytest.mark.parametrize("spelling", ["w8a16", "w4a16-g32", "w4a16-g32-asym", "w2a16-g32", "w8a16-tensor"])
def test_an_embedding_is_looked_up_row_by_row(spelling: str) -> None:
    weight = weight_of(spelling, 50, 64, torch.float32, usage="embedding")
    ids = torch.randint(50, (3, 4))
    assert torch.equal(F.embedding(ids, weight), weight.dequantize()[ids])


def test_the_choice_says_why_a_better_kernel_was_missed(with_native: bool) -> None:
    spec = LayerSpec(Scheme.parse("w4a16-g32"), 64, 64, torch.device("cpu"), torch.float32)
    fast = with_native and native.native().instruction_set != "portable"
    assert choose(spec).kernel == ("native-int4" if fast else "dequantize")
    assert fast or ("needs a bf16 model" in choose(spec).note and "native-int4" in choose(spec).note)
    asymmetric = LayerSpec(Scheme.parse("w4a16-g32-asym"), 64, 64, torch.device("cpu"), torch.float32)
    assert choose(asymmetric).kernel == "dequantize"
    assert "QLoRA" in str(choose(LayerSpec(Scheme.parse("nf4"), 64, 64, torch.device("cpu"), torch.float32)).refusal)


def test_an_unknown_kernel_is_named() -> None:
    with pytest.raises(
        ConversionError, match="no kernel is called 'fast'; there are native-int8, native-int4, onednn-int8"
    ):
        kernel_named("fast")


class Toy(Kernel):
    """Keeps w3a16 weights as plain integers: a kernel is one class in one file."""

    name = "toy"

    def serves(self, scheme: Scheme, device: torch.device) -> bool:
        return scheme.weight_bits == 3

    def nbytes(self, spec: LayerSpec) -> int:
        return spec.out_features * spec.in_features

    def pack(self, quantized: Quantized, spec: LayerSpec) -> Packed:
        return Packed(quantized.q, quantized.scale, quantized.zero_point)

    def unpack(self, weight: QuantizedWeight) -> Quantized:
        return Quantized(weight.data_, weight.scale, weight.zero_point, weight.scheme)

    def linear(self, x: Tensor, weight: QuantizedWeight) -> Tensor:
        return F.linear(x, self.unpack(weight).dequantize(x.dtype))


@pytest.fixture
def toy_first() -> Iterator[None]:
    before = dict(table._KERNELS)
    register(Toy())
    yield
    table._KERNELS.clear()
    table._KERNELS.update(before)


@pytest.mark.usefixtures("toy_first")
def test_a_kernel_can_be_added() -> None:
    weight, x = weight_of("w3a16-g32", 32, 64, torch.float32), torch.randn(4, 64)
    assert weight.kernel_name == "toy"
    assert [kernel.name for kernel in kernels()][-2:] == ["toy", "dequantize"]
    assert error(F.linear(x, weight), in_float64(x, weight)) < 1e-6
    assert weight_of("w4a16-g32", 32, 64, torch.float32).kernel_name != "toy"
