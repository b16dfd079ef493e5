"""SmoothQuant's scales: the published formula, an equal function, and a model of the error that orders alphas."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from qat_plugin.errors import ConfigError
from qat_plugin.numerics import round_to_nearest
from qat_plugin.ptq.output_error import activation_error, second_moment_of, weight_error
from qat_plugin.ptq.smoothquant import search_smoothquant, smoothquant_scale
from qat_plugin.ptq.statistics import InputStatistics
from qat_plugin.scheme import Scheme
from tests.ptq.test_awq import outlying, statistics_of
from tests.qat.arithmetic import grid, per_tensor, per_token


def forward_error(x: Tensor, weight: Tensor, scheme: str, s: Tensor) -> float:
    """By rounding every activation and weight in float64."""
    divided = x / s
    rounded = per_tensor(divided, float(divided.abs().max())) if "static" in scheme else per_token(divided)
    made = rounded @ grid(weight * s, scheme).weight.T
    return float(np.square(made - x.double().numpy() @ weight.double().numpy().T).sum())


@pytest.mark.parametrize("alpha", [0.0, 0.3, 0.5, 1.0])
def test_the_scale_is_the_published_formula(alpha: float) -> None:
    x, weights = outlying(), [torch.randn(48, 64), torch.randn(16, 64) * 3]
    largest = np.maximum(*(w.abs().amax(0).double().numpy() for w in weights))
    expected = x.abs().amax(0).double().numpy() ** alpha / largest ** (1 - alpha)
    actual = smoothquant_scale(weights, statistics_of(x), alpha=alpha)
    np.testing.assert_allclose(actual.double().numpy(), expected, rtol=1e-5)


def test_the_function_is_the_same_without_rounding() -> None:
    x, weight = outlying(), torch.randn(48, 64)
    s = smoothquant_scale([weight], statistics_of(x)).double()
    torch.testing.assert_close((x / s) @ (weight * s).t(), x.double() @ weight.double().t())


def test_dead_features_and_dead_columns_get_one() -> None:
    x, weight = outlying(), torch.randn(48, 64)
    x[:, 3], weight[:, 7] = 0, 0
    scale = smoothquant_scale([weight], statistics_of(x))
    assert scale[3] == scale[7] == 1
    assert bool(((scale > 0) & scale.isfinite()).all())


@pytest.mark.parametrize("scheme", ["w8a8", "w8a8-static"])
def test_the_modelled_error_is_near_the_true_one(scheme: str) -> None:
    x, weight, parsed = outlying(1000), torch.randn(48, 64), Scheme.parse(scheme)
    seen = statistics_of(x)
    for alpha in (0.3, 0.5, 0.7, 0.9):
        s = smoothquant_scale([weight], seen, alpha=alpha)
        modelled = weight_error(weight, parsed, second_moment_of(seen), s, round_to_nearest)
        modelled += activation_error(weight, parsed, seen, s)
        assert modelled == pytest.approx(forward_error(x, weight, scheme, s), rel=0.25)


@pytest.mark.parametrize("scheme", ["w8a8", "w8a8-static"])
def test_outlying_features_are_smoothed_and_the_search_does_as_well(scheme: str) -> None:
    x, weight = outlying(), torch.randn(48, 64)
    seen, parsed = statistics_of(x), Scheme.parse(scheme)
    plain = forward_error(x, weight, scheme, torch.ones(64))
    half = forward_error(x, weight, scheme, smoothquant_scale([weight], seen))
    found = search_smoothquant([weight], seen, parsed)
    assert half < 0.5 * plain
    assert forward_error(x, weight, scheme, found.scale) < 1.1 * half
    fixed = search_smoothquant([weight], seen, parsed, alpha=0.5)
    assert torch.equal(fixed.scale, smoothquant_scale([weight], seen))
    assert found.error <= fixed.error


def test_weight_only_schemes_have_no_activation_error() -> None:
    seen = statistics_of(outlying())
    assert activation_error(torch.randn(4, 64), Scheme.parse("w8a16"), seen, torch.ones(64)) == 0


def test_statistics_of_divided_inputs_are_the_statistics_divided() -> None:
    x, s = outlying(), torch.rand(64) + 0.2
    seen, expected = statistics_of(x), statistics_of(x / s)
    seen.divide(s)
    torch.testing.assert_close(seen.second_moment, expected.second_moment, rtol=1e-4, atol=1e-3)
    torch.testing.assert_close(seen.mean_abs, expected.mean_abs)
    torch.testing.assert_close(seen.absmax, expected.absmax)
    assert seen.rows == expected.rows


def test_what_it_cannot_work_with_is_said() -> None:
    seen = statistics_of(outlying())
    with pytest.raises(ConfigError, match="alpha=1.5"):
        smoothquant_scale([torch.randn(4, 64)], seen, alpha=1.5)
    with pytest.raises(ConfigError, match="input of 64 features"):
        smoothquant_scale([torch.randn(4, 32)], seen)
    with pytest.raises(ConfigError, match="lack the second moment"):
        search_smoothquant([torch.randn(4, 64)], InputStatistics(64, False), Scheme.parse("w8a8"))
