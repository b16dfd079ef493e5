"""What cannot be written is refused before, and what was written wrong is found after."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from torch import Tensor, nn

from qat_plugin import Policy, convert
from qat_plugin.errors import ConfigError, ExportError
from qat_plugin.exporting import export_model
from qat_plugin.exporting.contents import Exportable
from qat_plugin.exporting.onnx import Options, refusals, verify, write

SAMPLE = (torch.linspace(-1, 1, 128).reshape(2, 64),)


def exportable(scheme: str | dict[str, str] = "w4a16-g32", network: nn.Module | None = None) -> Exportable:
    torch.manual_seed(0)
    network = network or nn.Sequential(nn.Linear(64, 96), nn.ReLU(), nn.Linear(96, 32))
    return Exportable(convert(network, Policy(scheme) if isinstance(scheme, dict) else scheme).eval(), SAMPLE)


@pytest.mark.parametrize(
    ("scheme", "nearest"),
    [
        ("w4a16-g32-asym", "w4a16-g32"), ("w8a8", "w8a8-static"), ("w4a8-g32", "w4a16-g32"), ("w8a16-g32", "w8a16"),
        ("w8a8-g32", "w8a16"),
    ],
)  # fmt: skip
def test_tensorrt_refuses_what_it_cannot_hold_and_says_what_fits(scheme: str, nearest: str) -> None:
    found = refusals(exportable(scheme), Options(target="tensorrt"))
    assert [(entry.layer, entry.nearest) for entry in found] == [("0", nearest), ("2", nearest)]
    assert not refusals(exportable(nearest if nearest != "w8a8-static" else "w8a16"), Options(target="tensorrt"))
    assert not refusals(exportable(scheme), Options())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"int4": "awq"}, "int4 of format=onnx is one of auto, matmulnbits, dequantize"),
        ({"opset": 17}, "opset 17 has neither INT4 nor blocks"),
        ({"target": "tensorrt", "int4": "matmulnbits"}, "target=tensorrt reads DequantizeLinear alone"),
    ],
)
def test_options_say_what_is_allowed(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Options(**options)


def test_a_layer_that_the_call_does_not_reach_is_an_error(tmp_path: Path) -> None:
    class Partly(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used, self.unused = nn.Linear(64, 32), nn.Linear(64, 32)

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.used(x)
            return y

    with pytest.raises(ExportError, match="does not use unused"):
        export_model(exportable(network=Partly()).network, "onnx", tmp_path / "out", sample=SAMPLE, progress=False)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("method", [True, False])
def test_a_weight_that_is_read_in_another_way_is_refused_by_its_name(tmp_path: Path, method: bool) -> None:
    class Penalized(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(64, 32)

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.layer(x) + (self.layer.weight.sum() if method else torch.sum(self.layer.weight))
            return y

    with pytest.raises(ExportError, match=r"layer\.weight .* read .*sum, which has no quantized form"):
        export_model(exportable(network=Penalized()).network, "onnx", tmp_path / "out", sample=SAMPLE, progress=False)


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> tuple[Exportable, Path]:
    model = exportable({"0": "w4a16-g32", "2": "w8a8"})
    folder = tmp_path_factory.mktemp("onnx")
    write(model, folder, Options(), lambda made: None)
    return model, folder


@pytest.fixture
def copied(written: tuple[Exportable, Path], tmp_path: Path) -> tuple[Exportable, Path, Any]:
    model, folder = written
    shutil.copytree(folder, tmp_path / "copy")
    return model, tmp_path / "copy", onnx.load(tmp_path / "copy" / "model.onnx")


def change(file: Any, name: str, index: int, step: float) -> None:
    (entry,) = (entry for entry in file.graph.initializer if entry.name == name)
    array = onnx.numpy_helper.to_array(entry).copy()
    array.reshape(-1)[index] += np.asarray(step).astype(array.dtype)
    entry.CopyFrom(onnx.numpy_helper.from_array(array, name))


def test_the_file_as_written_is_verified(written: tuple[Exportable, Path]) -> None:
    model, folder = written
    found = verify(model, folder, Options())
    assert (found.tensors, found.integers, found.scales) == (2, 0, 0)
    assert found.error is not None and found.error < 1e-6
    assert "1 x MatMulNBits, 1 x MatMulInteger" in str(found)


@pytest.mark.parametrize("name", ["0.weight.q", "0.weight.scale", "2.weight.q", "2.weight.scale"])
def test_one_changed_number_is_found(copied: tuple[Exportable, Path, Any], name: str) -> None:
    model, folder, file = copied
    change(file, name, 7, 1)
    onnx.save(file, folder / "model.onnx")
    with pytest.raises(ExportError, match="does not hold the model's integers and scales"):
        verify(model, folder, Options()).check("file")


def test_another_bias_is_found(copied: tuple[Exportable, Path, Any]) -> None:
    model, folder, file = copied
    change(file, "2.bias", 0, 3.0)
    onnx.save(file, folder / "model.onnx")
    with pytest.raises(ExportError, match=r"2\.bias: the file holds other numbers"):
        verify(model, folder, Options()).check("file")


def test_a_layer_that_became_float_is_found(copied: tuple[Exportable, Path, Any]) -> None:
    model, folder, file = copied
    (node,) = (node for node in file.graph.node if node.op_type == "MatMulNBits")
    weight = model.layers["0.weight"].weight.dequantize().t().contiguous().numpy()
    file.graph.initializer.append(onnx.numpy_helper.from_array(weight, "float"))
    node.CopyFrom(onnx.helper.make_node("MatMul", [node.input[0], "float"], list(node.output), name=node.name))
    onnx.save(file, folder / "model.onnx")
    with pytest.raises(ExportError, match=r"0 \(w4a16-g32\) is in the file 0 times as a quantized operator"):
        verify(model, folder, Options())


def test_tensors_in_a_file_of_their_own_are_the_same(copied: tuple[Exportable, Path, Any]) -> None:
    model, folder, inside = copied
    apart = folder.parent / "apart"
    apart.mkdir()
    seen: list[int] = []
    write(model, apart, Options(external_data=True), seen.append)
    assert (apart / "model.onnx.data").stat().st_size > (apart / "model.onnx").stat().st_size
    assert verify(model, apart, Options()).check("file").integers == 0
    assert seen[-1] == 4
    outside = {
        entry.name: onnx.numpy_helper.to_array(entry) for entry in onnx.load(apart / "model.onnx").graph.initializer
    }
    for entry in inside.graph.initializer:
        np.testing.assert_array_equal(onnx.numpy_helper.to_array(entry), outside[entry.name])
