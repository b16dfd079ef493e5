"""What to know of a plan before training in it."""

from __future__ import annotations

from dataclasses import replace

from qat_plugin.policy import Plan
from qat_plugin.scheme import Scheme

_FEW_BITS = 3


def with_zero_points(scheme: Scheme) -> Scheme | None:
    """The asymmetric scheme that keeps more than a symmetric one of 3 or 2 bits; ``None`` for all others."""
    if scheme.is_integer and scheme.symmetric and scheme.weight_bits <= _FEW_BITS:
        return replace(scheme, symmetric=False)
    return None


def low_bit_advice(plan: Plan) -> str:
    """One line on the symmetric schemes of 3 and 2 bits in a plan; empty without any.

    With few levels a symmetric grid spends one on each side of weights that need it on one: a pretrained Llama rounded
    to 3 bits had a perplexity of 11.4 on symmetric grids and 8.3 on asymmetric ones (float 4.66).
    """
    found: dict[Scheme, Scheme] = {}
    for layer in plan.quantized:
        better = None if layer.scheme is None else with_zero_points(layer.scheme)
        if layer.scheme is not None and better is not None:
            found[layer.scheme] = better
    if not found:
        return ""
    swaps = ", ".join(f"{better} instead of {scheme}" for scheme, better in found.items())
    return f"symmetric grids lose at 3 bits and below; asymmetric ones keep much more there: {swaps}"
