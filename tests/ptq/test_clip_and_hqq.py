"""The search for grids against brute force, and the refinement of zero points."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from qat_plugin.numerics import choose_qparams, quantize, round_scale, round_to_nearest
from qat_plugin.ptq import clip_search, hqq
from qat_plugin.scheme import Scheme

SCHEMES = ("w8a16", "w4a16-g32", "w4a16-g32-asym", "w3a16-g16-asym", "w2a16-g32", "w2a16-g32-asym", "w4a16-tensor")


def heavy(rows: int = 16, columns: int = 64, seed: int = 0) -> Tensor:
    """Weights with outliers."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, columns, generator=generator)
    return weight * (1 + 4 * (torch.rand(rows, columns, generator=generator) > 0.97))


def error(weight: Tensor, found: Tensor, importance: Tensor | None = None) -> float:
    squares = (found.double() - weight.double()) ** 2
    return float((squares if importance is None else squares * importance.double()).sum())


@pytest.mark.parametrize("spelling", SCHEMES)
@pytest.mark.parametrize("weighted", [False, True])
def test_the_search_is_never_worse_than_min_max(spelling: str, weighted: bool) -> None:
    scheme, weight = Scheme.parse(spelling), heavy()
    importance = torch.linspace(0.1, 10, 64) if weighted else None
    found, plain = clip_search(weight, scheme, importance), round_to_nearest(weight, scheme)
    assert error(weight, found.dequantize(), importance) <= error(weight, plain.dequantize(), importance)
    if scheme.weight_bits < 8:
        assert error(weight, found.dequantize(), importance) < 0.99 * error(weight, plain.dequantize(), importance)


@pytest.mark.parametrize("spelling", ["w3a16-g16-asym", "w2a16-g16-asym"])
def test_the_search_comes_near_the_best_of_all_grids(spelling: str) -> None:
    scheme, weight = Scheme.parse(spelling), heavy(4, 16, seed=3)
    found = clip_search(weight, scheme)
    assert found.zero_point is not None
    for row in range(len(weight)):
        widest = float(weight[row].max() - weight[row].min()) / scheme.qmax
        least = min(
            error(weight[row], quantize(weight[row : row + 1], d, z, scheme).dequantize())
            for share, zero in itertools.product(torch.linspace(0.1, 1.05, 96), range(scheme.qmax + 1))
            for d in [round_scale(torch.full((1, 1), float(share) * widest), significant_bits=7)]
            for z in [torch.full((1, 1), zero, dtype=torch.uint8)]
        )
        assert error(weight[row], found.dequantize()[row]) <= 1.15 * least


def test_importance_moves_the_grid_to_what_matters() -> None:
    weight, scheme = heavy(), Scheme.parse("w3a16-g32-asym")
    importance = torch.ones(64)
    importance[::2] = 100.0
    weighted, plain = clip_search(weight, scheme, importance), clip_search(weight, scheme)
    assert error(weight, weighted.dequantize(), importance) < error(weight, plain.dequantize(), importance)


def test_groups_of_zeros_stay_zeros() -> None:
    weight = heavy()
    weight[:, :32] = 0
    for spelling in ("w4a16-g32", "w4a16-g32-asym"):
        for method in (clip_search, hqq):
            assert bool((method(weight, Scheme.parse(spelling)).dequantize()[:, :32] == 0).all())


def test_refined_zero_points_forgive_outliers() -> None:
    """In the l_0.7 norm that HQQ minimises it is at least as good as the searched grid it starts from."""
    weight, scheme = heavy(64, 64), Scheme.parse("w2a16-g32-asym")
    refined, searched = hqq(weight, scheme), clip_search(weight, scheme)
    distances = [((found.dequantize() - weight).abs() ** 0.7).sum() for found in (refined, searched)]
    assert float(distances[0]) < float(distances[1])
    assert refined.zero_point is not None
    assert refined.zero_point.dtype == torch.uint8
    assert torch.equal(refined.q, quantize(weight, refined.scale, refined.zero_point, scheme).q)


def test_symmetric_schemes_have_no_zero_point_to_refine() -> None:
    weight, scheme = heavy(), Scheme.parse("w4a16-g32")
    assert torch.equal(hqq(weight, scheme).q, clip_search(weight, scheme).q)


def test_the_grid_of_min_max_wins_where_nothing_can_be_gained() -> None:
    scheme = Scheme.parse("w4a16-g16")
    weight = torch.arange(-8.0, 8.0).repeat(4, 1)  # exactly the grid's numbers
    assert torch.equal(clip_search(weight, scheme).scale, choose_qparams(weight, scheme)[0])
