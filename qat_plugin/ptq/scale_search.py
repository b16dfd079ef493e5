"""Choosing among scales per input feature, by what they do to all layers that take the input."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from qat_plugin.errors import ConfigError
from qat_plugin.scheme import Scheme

# Makes of any scale one that is allowed: shared by the heads of a group, for example.
Constraint = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Candidate:
    """A scale and what it does.

    Attributes:
        scale: float32 [in_features].
        alpha: the exponent it came from; 0 for no scaling.
        error: sum over layers of the squared output error on the calibration rows.
        unscaled_error: the same without a scale.
    """

    scale: Tensor
    alpha: float
    error: float
    unscaled_error: float


def best_of(
    candidates: Iterable[tuple[float, Tensor]],
    error: Callable[[Tensor], float],
    constrain: Constraint | None,
    ones: Tensor,
) -> Candidate:
    """The candidate of the least error, no scale at all (alpha 0) among them.

    Args:
        candidates: (alpha, scale) each.
        error: of a scale.
        constrain: applied to each scale first.
        ones: the scale that does nothing.
    """
    unscaled = error(ones)
    best = Candidate(ones, 0.0, unscaled, unscaled)
    for alpha, scale in candidates:
        allowed = scale if constrain is None else constrain(scale)
        if (damage := error(allowed)) < best.error:
            best = Candidate(allowed, alpha, damage, unscaled)
    return best


def schemes_of(weights: Sequence[Tensor], scheme: Scheme | Sequence[Scheme], in_features: int) -> tuple[Scheme, ...]:
    """One integer scheme per weight.

    Raises:
        ConfigError: when numbers or shapes do not fit, or a scheme is not one of integers.
    """
    schemes = (scheme,) * len(weights) if isinstance(scheme, Scheme) else tuple(scheme)
    if not weights or len(schemes) != len(weights):
        raise ConfigError(f"{len(weights)} weights and {len(schemes)} schemes do not pair up")
    for weight, mine in zip(weights, schemes, strict=True):
        if weight.dim() != 2 or weight.shape[1] != in_features:
            raise ConfigError(f"a weight of {list(weight.shape)} does not take an input of {in_features} features")
        if not mine.is_integer:
            raise ConfigError(f"{mine} has no grid that a scale could help; give an integer scheme")
    return schemes


def centred(scale: Tensor, alive: Tensor) -> Tensor:
    """A scale over the root of its largest times its least entry, as AWQ's released code does; 1 where not alive.

    Args:
        scale: float32 [in_features], positive.
        alive: bool [in_features], which features carry anything.
    """
    if not bool(alive.any()):
        return torch.ones_like(scale)
    low, high = scale[alive].aminmax()
    return torch.where(alive, scale / (low * high).sqrt(), 1.0)
