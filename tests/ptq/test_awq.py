"""AWQ's scales: their error is the forward pass's own, they help where they should and never hurt."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from qat_plugin.errors import ConfigError
from qat_plugin.numerics import round_to_nearest
from qat_plugin.ptq.awq import awq_scale, search_awq
from qat_plugin.ptq.output_error import weight_error
from qat_plugin.ptq.statistics import InputStatistics
from qat_plugin.scheme import Scheme
from tests.qat.arithmetic import grid

SCHEMES = ["w4a16-g32", "w4a16-g32-asym", "w3a16-g32", "w8a16", "w4a16"]


def outlying(rows: int = 200, features: int = 64) -> Tensor:
    """Inputs of which a few features are far larger than the others."""
    return torch.randn(rows, features) * torch.logspace(-1, 1.5, features)[torch.randperm(features)]


def statistics_of(x: Tensor) -> InputStatistics:
    seen = InputStatistics(x.shape[1])
    for part in x.split(64):
        seen.add(part)
    return seen


def forward_error(x: Tensor, weights: list[Tensor], scheme: str, s: Tensor) -> float:
    """By running every row in float64 on the README's grid."""
    inputs, scale, total = x.double().numpy(), s.double().numpy(), 0.0
    for weight in weights:
        rounded = grid((weight * s), scheme).weight
        total += np.square(inputs / scale @ rounded.T - inputs @ weight.double().numpy().T).sum()
    return float(total)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_the_error_is_that_of_the_forward_pass(scheme: str) -> None:
    x, weight, s = outlying(), torch.randn(48, 64), torch.rand(64) + 0.5
    parsed = Scheme.parse(scheme)
    computed = weight_error(weight, parsed, statistics_of(x).second_moment, s, round_to_nearest)
    assert computed == pytest.approx(forward_error(x, [weight], scheme, s), rel=1e-3)


@pytest.mark.parametrize("magnitude", [True, False])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_the_scale_is_the_best_of_the_published_ones(scheme: str, magnitude: bool) -> None:
    x, weights = outlying(), [torch.randn(48, 64), torch.randn(16, 64)]
    found = search_awq(weights, statistics_of(x), Scheme.parse(scheme), grid=10, weight_magnitude=magnitude)
    mean = x.abs().mean(0)
    candidates = [mean ** (step / 10) for step in range(11)]
    candidates = [s / (s.max() * s.min()).sqrt() for s in candidates]
    errors = [forward_error(x, weights, scheme, s) for s in candidates]
    mine = forward_error(x, weights, scheme, found.scale)
    assert found.error == pytest.approx(mine, rel=1e-2)
    assert found.unscaled_error == pytest.approx(errors[0], rel=1e-2)
    if magnitude:
        assert mine <= min(errors) * 1.001
    else:
        assert mine == pytest.approx(min(errors), rel=1e-3)
        torch.testing.assert_close(found.scale, candidates[round(found.alpha * 10)], rtol=1e-4, atol=0)
    assert mine <= errors[0]


def test_outlying_features_are_rounded_better() -> None:
    x, weights = outlying(), [torch.randn(48, 64)]
    found = search_awq(weights, statistics_of(x), Scheme.parse("w4a16-g32"))
    assert found.alpha > 0
    assert found.error < 0.6 * found.unscaled_error


def test_equal_features_are_left_alone() -> None:
    x = torch.randn(4096, 64).sign()
    scale = awq_scale([torch.randn(48, 64)], statistics_of(x), Scheme.parse("w4a16-g32"), weight_magnitude=False)
    assert torch.equal(scale, torch.ones(64))


def test_silent_features_take_no_part() -> None:
    x = outlying()
    x[:, 5] = 0
    x[:, 9] *= 1e-30
    scale = awq_scale([torch.randn(48, 64)], statistics_of(x), Scheme.parse("w4a16-g32"))
    assert scale[5] == 1
    assert bool(((scale > 0) & scale.isfinite()).all())
    assert float(scale.max() / scale.min()) <= 1e8


def test_the_caller_s_rounding_decides() -> None:
    seen = []

    def counting(weight: Tensor, scheme: Scheme) -> object:
        seen.append(weight.shape)
        return round_to_nearest(weight, scheme)

    awq_scale([torch.randn(8, 64)], statistics_of(outlying()), Scheme.parse("w8a16"), grid=3, rounding=counting)  # type: ignore[arg-type]
    assert set(seen) == {(8, 64)}


def test_what_it_cannot_work_with_is_said() -> None:
    weight, seen, scheme = torch.randn(8, 64), statistics_of(outlying()), Scheme.parse("w8a16")
    with pytest.raises(ConfigError, match="lack the second moment"):
        awq_scale([weight], InputStatistics(64, False), scheme)
    with pytest.raises(ConfigError, match="saw no row"):
        awq_scale([weight], InputStatistics(64), scheme)
    with pytest.raises(ConfigError, match="input of 64 features"):
        awq_scale([torch.randn(8, 32)], seen, scheme)
    with pytest.raises(ConfigError, match="do not pair up"):
        awq_scale([weight], seen, [scheme, scheme])
    with pytest.raises(ConfigError, match="bf16 has no grid"):
        awq_scale([weight], seen, Scheme.parse("bf16"))
    with pytest.raises(ConfigError, match="grid=0"):
        awq_scale([weight], seen, scheme, grid=0)
