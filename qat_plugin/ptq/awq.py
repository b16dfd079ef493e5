"""AWQ: features that carry large activations get a finer share of the weight's grid (Lin et al., arXiv:2306.00978).

Multiplying a column of W by s and dividing its input by s leaves the product as it is and divides that column's
rounding error by s, as long as the scales of its groups do not grow as much. AWQ takes ``s = mean|x| ^ alpha`` and
looks for alpha; here by the layers' true squared output error on the calibration rows, which needs no forward pass.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from qat_plugin.errors import ConfigError
from qat_plugin.numerics import round_to_nearest, to_groups
from qat_plugin.ptq.output_error import Rounding, second_moment_of, weight_error
from qat_plugin.ptq.scale_search import Candidate, Constraint, best_of, centred, schemes_of
from qat_plugin.ptq.statistics import InputStatistics
from qat_plugin.scheme import Scheme

# The least magnitude counted, as a share of the largest: a nearly silent feature must not take all of the range of s.
_QUIET = 1e-4


def awq_scale(
    weights: Sequence[Tensor],
    statistics: InputStatistics,
    scheme: Scheme | Sequence[Scheme],
    *,
    grid: int = 20,
    rounding: Rounding = round_to_nearest,
    weight_magnitude: bool = True,
) -> Tensor:
    """The scale per input feature that rounds layers of one input best; ones where none is better than no scale.

    Args:
        weights: of the layers that share the input, [out_features, in_features] each, any float type.
        statistics: of that input, with its second moment.
        scheme: an integer scheme, or one per weight.
        grid: alpha is tried at 0, 1/grid, ... 1.
        rounding: how weights become integers, for example with a clip search.
        weight_magnitude: try each alpha also divided by the weights' own magnitude to the power 1 - alpha, as later
            versions of the released code do.

    Returns:
        float32 [in_features], positive; layers then quantize ``W * s`` and take ``x / s``.

    Raises:
        ConfigError: when statistics lack the second moment, or weights, schemes and grid do not fit.
    """
    return search_awq(
        weights, statistics, scheme, grid=grid, rounding=rounding, weight_magnitude=weight_magnitude
    ).scale


@torch.no_grad()
def search_awq(
    weights: Sequence[Tensor],
    statistics: InputStatistics,
    scheme: Scheme | Sequence[Scheme],
    *,
    grid: int = 20,
    rounding: Rounding = round_to_nearest,
    weight_magnitude: bool = True,
    constrain: Constraint | None = None,
) -> Candidate:
    """As :func:`awq_scale`, with the errors that decided.

    Args:
        weights, statistics, scheme, grid, rounding, weight_magnitude: as there.
        constrain: makes of any scale one that is allowed.
    """
    if grid < 1:
        raise ConfigError(f"grid={grid} is not allowed: alpha needs at least one step")
    schemes, moment = schemes_of(weights, scheme, statistics.in_features), second_moment_of(statistics)
    alive, activations = statistics.absmax > 0, _floored(statistics.mean_abs)
    magnitudes = _magnitude(weights, schemes) if weight_magnitude else None

    def error(scale: Tensor) -> float:
        pairs = zip(weights, schemes, strict=True)
        return sum(weight_error(weight.detach(), mine, moment, scale, rounding) for weight, mine in pairs)

    def candidates() -> Iterator[tuple[float, Tensor]]:
        for alpha in (step / grid for step in range(grid + 1)):
            scale = activations**alpha
            yield alpha, centred(scale, alive)
            if magnitudes is not None:
                yield alpha, centred(scale / magnitudes ** (1 - alpha), alive)

    return best_of(candidates(), error, constrain, torch.ones_like(activations))


def _floored(magnitude: Tensor) -> Tensor:
    largest = magnitude.max()
    return magnitude.clamp(min=float(largest) * _QUIET) if largest > 0 else torch.ones_like(magnitude)


def _magnitude(weights: Sequence[Tensor], schemes: Sequence[Scheme]) -> Tensor:
    """Mean over all rows of |w| as a share of its group's largest, float32 [in_features]."""
    shares = []
    for weight, scheme in zip(weights, schemes, strict=True):
        groups = to_groups(weight.detach().abs().to(torch.float32), scheme)
        shares.append((groups / groups.amax(-1, keepdim=True).clamp(min=1e-12)).reshape(weight.shape))
    return _floored(torch.cat(shares).mean(0))
