"""Weights in XNNPACK's columns: the same product, the same integers back."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

pytest.importorskip("executorch")

from qat_plugin import convert
from qat_plugin.exporting.executorch.columns import Columns
from qat_plugin.exporting.executorch.layers import LoweredLinear
from qat_plugin.exporting.executorch.rounding import Rounding, register_operators
from qat_plugin.kernels.weight import QuantizedWeight
from qat_plugin.numerics import Quantized
from qat_plugin.scheme import Scheme

register_operators()


def integers(spelling: str, rows: int, columns: int) -> Quantized:
    scheme = Scheme.parse(spelling)
    q = torch.randint(scheme.qmin, scheme.qmax + 1, (rows, columns), dtype=torch.int8)
    q[:, 0] = scheme.qmin  # which a negated group could not hold
    scale = torch.rand(rows, columns // (scheme.group_size or columns)) * 0.02 + 0.001
    if scheme.weight_bits < 8:
        scale = scale * torch.where(torch.rand_like(scale) < 0.5, -1.0, 1.0)
    return Quantized(q, scale.bfloat16().float(), None, scheme)


@pytest.mark.parametrize("spelling", ["w4a8-g32", "w4a8-g43", "w4a8", "w8a8", "w3a8-g32"])
def test_a_weight_is_read_back_from_its_columns(spelling: str) -> None:
    held = integers(spelling, 12, 172 if "43" in spelling else 96)
    columns = Columns.of(held.scheme, held.q.shape[1])
    q, scale = columns.of_weight(held)
    assert q.shape == (12, columns.total) and bool((scale > 0).all())
    assert held.scheme.group_size is None or columns.padded % 32 == 0
    assert held.scheme.weight_bits == 8 or bool(((q >= -8) & (q <= 7)).all())
    back, scales, stray = columns.weight_of(q, scale, held.scale < 0)
    assert torch.equal(back, held.q) and torch.equal(scales, held.scale) and stray == 0
    q[3, -1] = 5
    assert columns.weight_of(q, scale, held.scale < 0)[2] == 5


@pytest.mark.parametrize("spelling", ["w4a8-g32", "w4a8-g43", "w4a8", "w8a8", "w3a8-g32"])
def test_a_lowered_layer_computes_the_trained_product(spelling: str) -> None:
    held = integers(spelling, 12, 172 if "43" in spelling else 96)
    layer = LoweredLinear(QuantizedWeight.from_integers(held, torch.float32), torch.randn(12), Rounding())
    x = torch.randn(3, 5, held.q.shape[1])
    x[0, 0] = 0.0
    step = x.abs().amax(-1, keepdim=True) / 127
    rounded = torch.round(x / torch.where(step == 0, 1.0, step)).double() * step.double()
    groups = held.q.double().reshape(*held.scale.shape, -1)
    weight = (groups * held.scale.double().unsqueeze(-1)).reshape(held.q.shape)
    assert layer.bias is not None
    torch.testing.assert_close(layer(x), F.linear(rounded, weight, layer.bias.double()).float(), rtol=1e-4, atol=1e-4)


def test_constants_fix_the_grid_of_the_runtime() -> None:
    from qat_plugin.exporting.executorch.rounding import per_token

    x = torch.randn(7, 30) * torch.logspace(-3, 3, 7).unsqueeze(1)
    q = x / (x.abs().amax(-1, keepdim=True) / 127)
    columns = Columns.of(Scheme.parse("w8a8"), 30)
    assert torch.equal(per_token(columns.of_input(q))[:, :30], torch.round(q))
    assert not torch.equal(per_token(q), torch.round(q))


def test_an_odd_row_of_int4_is_padded_to_whole_bytes() -> None:
    model = convert(nn.Sequential(nn.Linear(33, 8)), "w4a8")
    weight = model.get_parameter("0.weight")
    assert isinstance(weight, QuantizedWeight)
    assert Columns.of(weight.scheme, 33).total == 36
