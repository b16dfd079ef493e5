"""The bf16 copy that is timed: what is cast, what is not, what stays tied."""

from __future__ import annotations

import copy

import torch
from torch import nn

from qat_plugin import prepare
from qat_plugin.conversion import convert
from qat_plugin.runs.bf16 import in_bf16


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(40, 64)
        self.body = nn.Linear(64, 64)
        self.norm = nn.BatchNorm1d(64)
        self.head = nn.Linear(64, 40, bias=False)
        self.head.weight = self.embedding.weight
        self.register_buffer("frequencies", torch.linspace(0, 1, 64), persistent=False)
        self.register_buffer("steps", torch.tensor(3))

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.embedding(ids)
        x = x + self.frequencies.to(x.dtype)
        return self.head(self.norm(self.body(x)))


def test_parameters_and_saved_buffers_are_cast_and_computed_ones_kept() -> None:
    model = in_bf16(Tied().eval())
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert model.head.weight is model.embedding.weight
    assert model.norm.running_mean.dtype == torch.bfloat16
    assert model.frequencies.dtype == torch.float32
    assert model.steps.dtype == torch.int64


def test_a_converted_models_integers_are_the_same() -> None:
    model = convert(prepare(Tied().eval(), {"body": "w4a16-g32"}))
    small = in_bf16(copy.deepcopy(model))
    assert small.body.weight.dtype == torch.bfloat16
    mine, theirs = small.body.weight.integers(), model.body.weight.integers()
    assert torch.equal(mine.q, theirs.q)
    assert torch.equal(mine.scale, theirs.scale)
    ids = torch.arange(8)
    with torch.no_grad():
        expected, found = model(ids), small(ids).float()
    assert (found - expected).norm() < 0.02 * expected.norm()
