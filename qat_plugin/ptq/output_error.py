"""How much rounding changes a layer's output, from calibration statistics alone: no forward pass."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from qat_plugin.errors import ConfigError
from qat_plugin.numerics import ACTIVATION_QMAX, Quantized
from qat_plugin.ptq.statistics import InputStatistics
from qat_plugin.scheme import Scheme

# How a weight [out_features, in_features] becomes integers of a scheme.
Rounding = Callable[[Tensor, Scheme], Quantized]


def row_errors(difference: Tensor, second_moment: Tensor) -> Tensor:
    """``diag(D H D^T)``, the squared error of each output, float32 [out_features]; see :func:`output_error`."""
    squares: Tensor = (difference @ second_moment).mul_(difference).sum(-1)
    return squares


def output_error(difference: Tensor, second_moment: Tensor) -> float:
    """Sum over all calibration rows x of ``|difference x|^2``, exactly: ``tr(D H D^T)`` with ``H = sum x x^T``.

    Args:
        difference: rounded minus true weight, float32 [out_features, in_features].
        second_moment: float32 [in_features, in_features].
    """
    return float((difference @ second_moment).mul_(difference).sum(dtype=torch.float64))


def weight_error(weight: Tensor, scheme: Scheme, second_moment: Tensor, scale: Tensor, rounding: Rounding) -> float:
    """:func:`output_error` of a layer that quantizes ``weight * scale`` and divides its input by ``scale``.

    Args:
        weight: [out_features, in_features], any float type.
        scheme: an integer scheme; activations are left alone here.
        second_moment: of the undivided inputs.
        scale: float32 [in_features], positive.
        rounding: how the weight becomes integers.
    """
    rounded = rounding(weight * scale, scheme).dequantize()
    return output_error(rounded / scale - weight.to(torch.float32), second_moment)


def activation_error(weight: Tensor, scheme: Scheme, statistics: InputStatistics, scale: Tensor) -> float:
    """What rounding ``x / scale`` to INT8 adds to the same sum, as a model; 0 where activations are left alone.

    Rounding errors are taken as uniform and independent, of steps ``max|x / scale| / 127``: the maximum over all rows
    for a static scheme; for a dynamic one the median maximum of a row whose features are Gaussian and independent.

    Args:
        weight: [out_features, in_features].
        scheme: an integer scheme.
        statistics: of the undivided inputs, with the second moment.
        scale: float32 [in_features], positive.
    """
    if not scheme.quantizes_activations:
        return 0.0
    largest = float((statistics.absmax / scale).max())
    if not scheme.static:
        largest = min(largest, _median_of_row_maxima(statistics, scale))
    step = largest / ACTIVATION_QMAX
    return statistics.rows * step**2 / 12 * float((weight * scale).square().sum(dtype=torch.float64))


def _median_of_row_maxima(statistics: InputStatistics, scale: Tensor) -> float:
    """m with ``prod_j P(|x_j / s_j| <= m) = 1/2``, by bisection."""
    deviation = (statistics.second_moment.diagonal() / max(statistics.rows, 1)).sqrt() / scale
    deviation = deviation[deviation > 0].to(torch.float64)
    if not len(deviation):
        return 0.0
    low, high = 0.0, float(deviation.max()) * 10
    for _ in range(30):
        middle = (low + high) / 2
        below = torch.erf(middle / (deviation * 2**0.5)).log().sum().exp()
        low, high = (low, middle) if below > 0.5 else (middle, high)
    return high


def second_moment_of(statistics: InputStatistics) -> Tensor:
    """The statistics' second moment.

    Raises:
        ConfigError: when it was not gathered, or no row was seen.
    """
    if not statistics.hessian:
        raise ConfigError("these input statistics lack the second moment; gather them with InputStatistics(K, True)")
    if not statistics.rows:
        raise ConfigError("these input statistics saw no row: calibrate on batches that reach the layer")
    return statistics.second_moment
