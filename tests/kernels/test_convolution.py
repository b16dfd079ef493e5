"""INT8 convolutions against float64 convolutions of the numbers that the integers stand for."""

from __future__ import annotations

import copy
import io
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qat_plugin.errors import ConversionError
from qat_plugin.kernels import ConvShape, kernel_named
from qat_plugin.kernels.cpu_conv import to_bytes
from qat_plugin.kernels.weight import QuantizedWeight
from qat_plugin.native import native_disabled
from qat_plugin.numerics import quantize_activation, round_to_nearest
from qat_plugin.scheme import Scheme

STATIC = Scheme.parse("w8a8-static")
SCALE = torch.tensor(0.031)
SHAPES: list[tuple[type[Any], dict[str, Any]]] = [
    (nn.Conv2d, {"kernel_size": 3}),
    (nn.Conv2d, {"kernel_size": 3, "padding": 1, "stride": 2}),
    (nn.Conv2d, {"kernel_size": (3, 5), "padding": (2, 0), "stride": (1, 2), "bias": False}),
    (nn.Conv2d, {"kernel_size": 3, "padding": 2, "dilation": 2, "groups": 2}),
    (nn.Conv2d, {"kernel_size": 1, "bias": False}),
    (nn.Conv2d, {"kernel_size": 3, "groups": 12, "padding": 1}),
    (nn.Conv2d, {"kernel_size": (2, 3), "padding": "same", "dilation": (1, 2)}),
    (nn.Conv2d, {"kernel_size": 3, "padding": "valid"}),
    (nn.Conv1d, {"kernel_size": 5, "padding": 2, "stride": 3}),
    (nn.Conv1d, {"kernel_size": 4, "padding": "same", "groups": 3}),
    (nn.Conv1d, {"kernel_size": 3, "groups": 12, "dilation": 2, "padding": 2, "bias": False}),
]
MODES = ["zeros", "reflect", "replicate", "circular"]


def quantized(layer: nn.Module, dtype: torch.dtype = torch.float32, kernel: str | None = None) -> QuantizedWeight:
    weight: Tensor = layer.weight.detach()
    return QuantizedWeight.from_integers(
        round_to_nearest(weight.flatten(1), STATIC), dtype, usage="conv",
        conv=ConvShape(tuple(weight.shape), layer.groups), activation_scale=SCALE, kernel=kernel,
    )  # fmt: skip


def converted(layer: nn.Module, dtype: torch.dtype = torch.float32, kernel: str | None = None) -> nn.Module:
    made = copy.deepcopy(layer).to(dtype).requires_grad_(False)
    made._parameters["weight"] = nn.Parameter(quantized(layer, dtype, kernel), requires_grad=False)
    return made


def reference(layer: nn.Module, x: Tensor) -> Tensor:
    """The layer in float64 on the numbers that the integers stand for."""
    exact = copy.deepcopy(layer).double()
    integers = round_to_nearest(layer.weight.detach().flatten(1), STATIC)
    exact.weight.data = (integers.q.double() * integers.scale.double()).reshape(layer.weight.shape)
    q = (x.double() / SCALE.double()).round().clamp(-127, 127)
    return exact(q * SCALE.double()).detach()


def image(layer: nn.Module, batch: int = 2) -> Tensor:
    return torch.randn(batch, layer.in_channels, *([11, 9] if isinstance(layer, nn.Conv2d) else [23]))


@pytest.mark.parametrize("kernel", ["onednn-conv", "dequantize"])
@pytest.mark.parametrize(("kind", "options"), SHAPES)
def test_a_convolution_computes_what_its_integers_stand_for(
    kind: type[Any], options: dict[str, Any], kernel: str
) -> None:
    layer = kind(12, 24, **options)
    x = image(layer)
    torch.testing.assert_close(converted(layer, kernel=kernel)(x).double(), reference(layer, x), rtol=1e-5, atol=1e-5)


def test_one_scale_for_the_whole_weight() -> None:
    from qat_plugin import convert, prepare
    from qat_plugin.qat import calibrating

    model = nn.Sequential(nn.Conv2d(6, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3, groups=4)).eval()
    x = torch.randn(2, 6, 9, 9)
    prepare(model, "w8a8-static-tensor")
    with calibrating(model):
        model(x)
    expected = model(x)
    convert(model)
    assert model[2].weight.integers().scale.shape == (1, 1)
    torch.testing.assert_close(model(x), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("kind", [nn.Conv1d, nn.Conv2d])
def test_each_way_of_padding(kind: type[Any], mode: str) -> None:
    layer = kind(6, 8, kernel_size=3, padding=2, stride=2, padding_mode=mode)
    x = image(layer)
    torch.testing.assert_close(converted(layer)(x).double(), reference(layer, x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("batch", [0, 1, 3])
def test_batches_and_layouts(batch: int) -> None:
    layer = nn.Conv2d(6, 8, 3, padding=1)
    x, small = image(layer, batch), converted(layer)
    expected = reference(layer, x).float()
    assert small(x).shape == expected.shape
    strided = torch.randn(batch, 6, 22, 9)[:, :, ::2]
    strided.copy_(x)
    for given in (x, x.contiguous(memory_format=torch.channels_last), strided):
        torch.testing.assert_close(small(given), expected, rtol=1e-5, atol=1e-5)
    if batch:
        torch.testing.assert_close(small(x[0]), expected[0], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sixteen_bit_models_round_their_output_alone(dtype: torch.dtype) -> None:
    layer = nn.Conv2d(6, 8, 3, padding=1)
    x = image(layer).to(dtype)
    y = converted(layer, dtype)(x)
    assert y.dtype == dtype
    layer.bias.data = layer.bias.data.to(dtype).float()
    expected = reference(layer, x)
    assert (y.double() - expected).norm() / expected.norm() < (3e-3 if dtype is torch.bfloat16 else 4e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_bytes_are_the_integers_of_the_grid(dtype: torch.dtype) -> None:
    x = torch.cat([torch.randn(5000) * 2, torch.arange(-140, 140) * 0.031 / 2]).to(dtype).reshape(4, -1, 2, 5)
    expected = quantize_activation(x, SCALE)[0] + 128
    for laid_out in (x, x.contiguous(memory_format=torch.channels_last)):
        assert torch.equal(to_bytes(laid_out, SCALE).float(), expected)
    assert torch.equal(to_bytes(x.transpose(0, 1), SCALE).float(), expected.transpose(0, 1))
    with native_disabled():
        assert torch.equal(to_bytes(x, SCALE).float(), expected)


def test_integers_come_back_and_their_bytes_are_counted() -> None:
    from qat_plugin.kernels import LayerSpec
    from qat_plugin.measure import model_bytes

    for layer in (nn.Conv2d(12, 20, 3), nn.Conv2d(12, 12, 3, groups=12), nn.Conv1d(6, 8, 5, groups=2)):
        weight = quantized(layer)
        expected = round_to_nearest(layer.weight.detach().flatten(1), STATIC)
        assert torch.equal(weight.integers().q, expected.q)
        assert torch.equal(weight.dequantize(), expected.dequantize().reshape(layer.weight.shape))
        assert weight.shape == layer.weight.shape
        spec = LayerSpec(
            STATIC, weight.out_features, weight.in_features, weight.device, weight.dtype, "conv", weight.conv
        )
        holder = nn.Module()
        holder.weight = nn.Parameter(weight, requires_grad=False)
        assert kernel_named(weight.kernel_name).nbytes(spec) + SCALE.nbytes == model_bytes(holder)


def test_copies_and_pickles_compute_the_same() -> None:
    layer = nn.Conv2d(6, 8, 3, groups=2)
    small, x = converted(layer), image(layer)
    file = io.BytesIO()
    torch.save(small, file)
    file.seek(0)
    for other in (copy.deepcopy(small), torch.load(file, weights_only=False)):
        assert torch.equal(other(x), small(x))
        assert other.weight.groups == 2


def test_what_an_integer_convolution_refuses() -> None:
    layer = nn.Conv2d(6, 8, 3)
    small = converted(layer)
    with pytest.raises(RuntimeError, match="takes 6 channels"):
        small(torch.randn(2, 5, 9, 9))
    with pytest.raises(ConversionError, match="cannot be trained"):
        small(image(layer).requires_grad_()).sum().backward()
    with pytest.raises(ConversionError, match="packed for 1 groups"):
        F.conv2d(image(layer), small.weight, groups=2)


def test_a_compiled_model_takes_other_batches() -> None:
    layer = nn.Conv2d(6, 8, 3, padding=1, stride=2)
    small = converted(layer)
    compiled = torch.compile(small, dynamic=True, backend="aot_eager")
    for batch in (2, 5):
        x = image(layer, batch)
        torch.testing.assert_close(compiled(x), small(x))
