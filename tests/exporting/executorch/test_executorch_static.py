"""Calibrated INT8 as ``.pte``: what is chained, what has a float output, what is refused."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

pytest.importorskip("executorch")

from qat_plugin import convert
from qat_plugin.errors import ExportError
from qat_plugin.exporting import export_model
from qat_plugin.exporting.executorch.payload import read
from qat_plugin.ptq import calibrate

IMAGES = torch.rand(6, 3, 8, 8)


class Net(nn.Module):
    """A chain over a depthwise convolution, a residual addition and a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.bn = nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.depthwise = nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.second = nn.Conv2d(8, 8, 3, padding="same", dilation=2)
        self.head = nn.Linear(8, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.bn(self.first(x)))
        x = x + self.second(torch.relu(self.depthwise(x)))
        logits: torch.Tensor = self.head(x.mean((2, 3)))
        return logits


def calibrated(net: nn.Module, x: torch.Tensor) -> nn.Module:
    return convert(calibrate(net, {"*": "w8a8-static"}, [(x,)], progress=False))


def test_an_image_net_runs_in_integers(tmp_path: Path) -> None:
    net = Net()
    net(IMAGES)
    made = export_model(calibrated(net.eval(), IMAGES), "executorch", tmp_path / "net", sample=(IMAGES[:3],))
    found = made.verification
    assert found is not None and found.error is not None
    assert (found.tensors, found.integers, found.scales) == (4, 0, 0)
    assert found.error < 1e-3
    weights = {(stored.kind, tuple(stored.q.shape)): stored for stored in read(made.path).weights}
    # behind the depthwise convolution lie a ReLU and one layer: its output has that layer's scale
    assert isinstance(weights["depthwise", (8, 1, 3, 3)].input, float)
    # the others' outputs are float, and two channels of constants fix the grid of their inputs
    assert weights["conv", (8, 5, 3, 3)].input == weights["conv", (8, 10, 3, 3)].input == "token"
    assert weights["linear", (5, 10)].input == "token"


def test_linear_layers_are_chained_through_a_relu(tmp_path: Path) -> None:
    net = nn.Sequential(nn.Linear(16, 24), nn.ReLU(), nn.Linear(24, 9), nn.SiLU(), nn.Linear(9, 4))
    x = torch.randn(12, 16)
    made = export_model(calibrated(net, x), "executorch", tmp_path / "mlp", sample=(x,))
    assert made.verification is not None and made.verification.error is not None
    assert made.verification.error < 1e-3 and made.verification.tensors == 3
    inputs = {tuple(stored.q.shape): stored.input for stored in read(made.path).weights}
    assert isinstance(inputs[24, 16], float)
    assert inputs[9, 26] == inputs[4, 11] == "token"


def test_a_depthwise_convolution_without_a_scale_for_its_output_is_refused(tmp_path: Path) -> None:
    net = nn.Sequential(nn.Conv2d(3, 3, 3, groups=3), nn.SiLU(), nn.Conv2d(3, 4, 1))
    with pytest.raises(ExportError, match=r"0 \(w8a8-static\): in groups, and not followed by a ReLU"):
        export_model(calibrated(net, IMAGES), "executorch", tmp_path / "net", sample=(IMAGES,))
    assert list(tmp_path.iterdir()) == []
