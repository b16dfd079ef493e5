"""Image nets with calibrated INT8 activations: QuantizeLinear, DequantizeLinear and Conv."""

from __future__ import annotations

from pathlib import Path

import onnx
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qat_plugin import convert, prepare
from qat_plugin.errors import ExportError
from qat_plugin.exporting import export_model
from qat_plugin.exporting.contents import Exportable
from qat_plugin.exporting.onnx import Options, verify
from tests.exporting.onnx.runtime import run


class Convolutions(nn.Module):
    """Groups, depthwise, strides, dilation, one and two dimensions, and three ways to pad."""

    def __init__(self) -> None:
        super().__init__()
        self.reflect = nn.Conv2d(3, 8, 3, padding=1, padding_mode="reflect")
        self.uneven = nn.Conv2d(8, 8, (4, 3), padding="same", groups=4)
        self.depthwise = nn.Conv2d(8, 8, 3, dilation=2, stride=(2, 1), groups=8, bias=False)
        self.point = nn.Conv2d(8, 4, 1, padding="valid")
        self.line = nn.Conv1d(4, 6, 3, padding=2)
        self.classes = nn.Linear(6, 5)

    def forward(self, images: Tensor) -> Tensor:
        """Logits."""
        x = self.point(torch.tanh(self.depthwise(torch.relu(self.uneven(self.reflect(images))))))
        logits: Tensor = self.classes(self.line(x.flatten(2)).mean(-1))
        return logits


def calibrated(network: nn.Module, shape: tuple[int, ...]) -> nn.Module:
    prepared = prepare(network, "w8a8-static").train()
    with torch.no_grad():
        for seed in range(3):
            prepared(torch.randn(8, *shape, generator=torch.Generator().manual_seed(seed)))
    return convert(prepared.eval()).eval()


@pytest.mark.filterwarnings("ignore:Using padding='same'")
def test_every_kind_of_convolution_is_exported(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = calibrated(Convolutions(), (3, 14, 12))
    images = 3 * torch.randn(4, 3, 14, 12)  # far outside what was calibrated: it clips
    made = export_model(model, "onnx", tmp_path / "out", sample=(images,), progress=False)
    assert made.verification is not None
    assert (made.verification.tensors, made.verification.integers, made.verification.scales) == (6, 0, 0)
    (found,) = run(made.path, images[:1])
    with torch.no_grad():
        torch.testing.assert_close(found, model(images[:1]), rtol=1e-4, atol=1e-4)


def test_clipping_ends_where_training_ended_it(tmp_path: Path) -> None:
    network = calibrated(nn.Sequential(nn.Conv2d(1, 2, 1, bias=False)), (1, 4, 4))
    (layer,) = Exportable(network, ()).layers.values()
    step, held = float(layer.weight.activation_scale), layer.integers  # type: ignore[arg-type]
    images = torch.tensor([-1000.0, -127.5, -126.5, -2.5, -1.5, 0.5, 126.5, 127.5, 1000.0]).reshape(1, 1, 3, 3) * step
    made = export_model(network, "onnx", tmp_path / "out", sample=(images.expand(2, 1, 3, 3),), progress=False)
    (found,) = run(made.path, images)
    q = torch.tensor([-127.0, -127, -126, -2, -2, 0, 126, 127, 127]).reshape(1, 1, 3, 3)  # half to even, -127 to 127
    wanted = F.conv2d(q.double() * step, (held.q.double() * held.scale.double()).reshape(2, 1, 1, 1))
    torch.testing.assert_close(found.double(), wanted, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("target", ["onnxruntime", "tensorrt"])
def test_a_residual_net_is_exported_with_its_batch_norms_folded(tmp_path: Path, target: str) -> None:
    from qat_plugin.models.resnet import SmallResNet

    torch.manual_seed(0)
    network = SmallResNet(width=4)
    with torch.no_grad():
        network.train()(torch.randn(8, 1, 16, 16))
    model = calibrated(network, (1, 16, 16))
    made = export_model(
        model, "onnx", tmp_path / "out", sample=(torch.randn(2, 1, 16, 16),), options={"target": target},
        progress=False,
    )  # fmt: skip
    assert made.verification is not None and made.verification.integers == 0
    file = onnx.load(made.path / "model.onnx")
    kinds = [node.op_type for node in file.graph.node]
    assert "BatchNormalization" not in kinds
    assert made.verification.error is not None and made.verification.error < 1e-5
    assert {entry.domain for entry in file.opset_import} == {""}
    zeros = [entry for entry in file.graph.initializer if entry.data_type == onnx.TensorProto.INT8 and not entry.dims]
    assert all(int(onnx.numpy_helper.to_array(entry)) == 0 for entry in zeros)  # symmetric, as TensorRT asks
    readers = {name: node.op_type for node in file.graph.node for name in node.input}
    large = [entry.name for entry in file.graph.initializer if entry.data_type == onnx.TensorProto.INT8 and entry.dims]
    assert large and all(readers[name] == "DequantizeLinear" for name in large)


class Chain(nn.Module):
    """conv -> ReLU -> conv -> conv -> addition: two of the convolutions hand INT8 to the next one."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 16, 3, padding=1), nn.Conv2d(16, 16, 3, padding=1, groups=2)
        self.third = nn.Conv2d(16, 16, 1)

    def forward(self, images: Tensor) -> Tensor:
        """[batch, 16, height, width]."""
        x = torch.relu(self.first(images))
        return images.sum(1, keepdim=True) + self.third(self.second(x))


def test_convolutions_hand_on_integers_where_the_next_layer_rounds(tmp_path: Path) -> None:
    import onnxruntime

    torch.manual_seed(0)
    model = calibrated(Chain(), (3, 12, 12))
    images = 3 * torch.randn(4, 3, 12, 12)  # it clips
    made = export_model(model, "onnx", tmp_path / "out", sample=(images,), progress=False)
    found = made.verification
    assert found is not None and found.error is not None and found.error < 1e-5
    assert any("biases between layers" in note for note in found.notes)
    options = onnxruntime.SessionOptions()
    options.log_severity_level, options.optimized_model_filepath = 3, str(tmp_path / "optimized.onnx")
    onnxruntime.InferenceSession(str(made.path / "model.onnx"), options, providers=["CPUExecutionProvider"])
    kinds = [node.op_type for node in onnx.load(tmp_path / "optimized.onnx").graph.node]
    assert (kinds.count("QLinearConv"), kinds.count("Conv"), kinds.count("Relu")) == (2, 1, 0)
    # independently: integers in float64, biases of the first two in steps of the integer products
    x, relu = images.double(), {"first"}
    for name in ("first", "second", "third"):
        module = getattr(model, name)
        weight = module._parameters["weight"]
        held, step = weight.integers(), float(weight.activation_scale)
        q = torch.round(x / step).clamp(-127, 127)
        unit = held.scale.double().reshape(-1) * step
        bias = module.bias.detach().double() / unit
        bias = bias if name == "third" else bias.round()
        sums = F.conv2d(q, held.q.double().reshape(weight.logical_shape), bias, padding=module.padding,
                        groups=module.groups)  # fmt: skip
        x = sums * unit.reshape(-1, 1, 1)
        x = x.relu() if name in relu else x
    wanted = images.double().sum(1, keepdim=True) + x
    (given,) = run(made.path, images)
    assert float((given - wanted).norm() / wanted.norm()) < 1e-5


def test_a_bias_is_added_as_trained_where_the_output_is_float(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = calibrated(nn.Sequential(nn.Conv2d(3, 8, 3)), (3, 6, 6))
    images = torch.randn(2, 3, 6, 6)
    made = export_model(model, "onnx", tmp_path / "out", sample=(images,), progress=False)
    (found,) = run(made.path, images)  # ONNX Runtime would round the bias of a Conv on integers to INT32
    with torch.no_grad():
        torch.testing.assert_close(found, model(images), rtol=1e-6, atol=1e-6)


def test_another_activation_scale_in_the_file_is_seen(tmp_path: Path) -> None:
    model = calibrated(nn.Sequential(nn.Conv2d(3, 8, 3)), (3, 6, 6))
    images = torch.randn(2, 3, 6, 6)
    made = export_model(model, "onnx", tmp_path / "out", sample=(images,), verify=False, progress=False)
    file = onnx.load(made.path / "model.onnx")
    (scale,) = (entry for entry in file.graph.initializer if entry.name == "0.weight.activation_scale")
    scale.CopyFrom(onnx.numpy_helper.from_array(onnx.numpy_helper.to_array(scale) * 1.0001, scale.name))
    onnx.save(file, made.path / "model.onnx")
    with pytest.raises(ExportError, match="0: the file lacks its activation_scale, or has another"):
        verify(Exportable(model, (images,)), made.path, Options())
