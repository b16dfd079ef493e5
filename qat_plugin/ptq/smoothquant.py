"""SmoothQuant: large activation features are divided, their weights multiplied (Xiao et al., arXiv:2211.10438).

INT8 activations have one step for all features of a token (or of the tensor): a feature a hundred times larger than
the others leaves them a few levels. ``s_j = max|x_j| ^ alpha / max|W_j| ^ (1 - alpha)`` (equation 4) moves a part of
its range into the weight, which has a step per row or group.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from qat_plugin.errors import ConfigError
from qat_plugin.numerics import round_to_nearest
from qat_plugin.ptq.output_error import Rounding, activation_error, second_moment_of, weight_error
from qat_plugin.ptq.scale_search import Candidate, Constraint, best_of, schemes_of
from qat_plugin.ptq.statistics import InputStatistics
from qat_plugin.scheme import Scheme


@torch.no_grad()
def smoothquant_scale(weights: Sequence[Tensor], statistics: InputStatistics, *, alpha: float = 0.5) -> Tensor:
    """The scale per input feature of layers that share one input.

    Args:
        weights: of those layers, [out_features, in_features] each, any float type.
        statistics: of that input.
        alpha: how much of the activations' range moves into the weights, 0 to 1.

    Returns:
        float32 [in_features], positive; 1 where a feature or its weights are all zero. Layers then quantize ``W * s``
        and take ``x / s``.

    Raises:
        ConfigError: when alpha is not in [0, 1], or a weight does not fit the input.
    """
    if not 0 <= alpha <= 1:
        raise ConfigError(f"alpha={alpha} is not in 0 to 1, the share of the activations' range that weights take")
    for weight in weights:
        if weight.dim() != 2 or weight.shape[1] != statistics.in_features:
            raise ConfigError(
                f"a weight of {list(weight.shape)} does not take an input of {statistics.in_features} features"
            )
    activations = statistics.absmax
    largest = torch.stack([weight.detach().abs().amax(0).to(activations) for weight in weights]).amax(0)
    scale = activations**alpha / largest ** (1 - alpha)
    return torch.where((activations > 0) & (largest > 0), scale, 1.0)


@torch.no_grad()
def search_smoothquant(
    weights: Sequence[Tensor],
    statistics: InputStatistics,
    scheme: Scheme | Sequence[Scheme],
    *,
    alpha: float | None = None,
    grid: int = 20,
    rounding: Rounding = round_to_nearest,
    constrain: Constraint | None = None,
) -> Candidate:
    """As :func:`smoothquant_scale`, with the error that it makes or, for ``alpha=None``, the alpha of the least.

    That error is the weights' own on the calibration rows, plus a model of the activations'
    (:func:`~qat_plugin.ptq.output_error.activation_error`). It is the error on the rows seen: for static schemes and
    heavy-tailed inputs the search brings every feature to the edge of the range, where unseen rows clip. 0.5 is safer.

    Args:
        weights, statistics: as there, with the second moment.
        scheme: an integer scheme, or one per weight.
        alpha: fixed; ``None`` tries 1/grid, ... 1 and no scale at all.
        grid: steps of that search.
        rounding: how weights become integers.
        constrain: makes of any scale one that is allowed.

    Raises:
        ConfigError: as there, and when statistics lack the second moment.
    """
    schemes, moment = schemes_of(weights, scheme, statistics.in_features), second_moment_of(statistics)
    ones = torch.ones_like(statistics.absmax)

    def error(scale: Tensor) -> float:
        pairs = [(weight.detach(), mine) for weight, mine in zip(weights, schemes, strict=True)]
        return sum(
            weight_error(weight, mine, moment, scale, rounding) + activation_error(weight, mine, statistics, scale)
            for weight, mine in pairs
        )

    if alpha is not None:
        scale = smoothquant_scale(weights, statistics, alpha=alpha)
        scale = scale if constrain is None else constrain(scale)
        return Candidate(scale, alpha, error(scale), error(ones))
    alphas = [step / grid for step in range(1, grid + 1)]
    candidates = ((each, smoothquant_scale(weights, statistics, alpha=each)) for each in alphas)
    return best_of(candidates, error, constrain, ones)
