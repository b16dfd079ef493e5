"""GPTQ against a float64 reference written from the paper, and what it promises of its own."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from qat_plugin.errors import ConfigError, QatError
from qat_plugin.numerics import choose_qparams, round_to_nearest
from qat_plugin.ptq import GptqOptions, InputStatistics, gptq
from qat_plugin.ptq.factor import lower_factor
from qat_plugin.ptq.gptq import aim
from qat_plugin.ptq.output_error import output_error
from qat_plugin.scheme import Scheme

PAPER = {"clip": False, "sweeps": 0, "correct": 0.0}
SCHEMES = ("w4a16-g32-asym", "w4a16-g32", "w3a16-g16-asym", "w2a16-g32-asym", "w8a16", "w4a16-tensor")


def problem(rows: int = 24, columns: int = 64, samples: int = 400, seed: int = 0) -> tuple[Tensor, Tensor]:
    """A weight and correlated inputs of very different sizes."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(columns, columns, generator=generator) * 0.3 + torch.eye(columns)
    x = torch.randn(samples, columns, generator=generator) @ mix * torch.logspace(-1, 0.7, columns)
    return torch.randn(rows, columns, generator=generator) * 0.1, x


def seen(x: Tensor, float_x: Tensor | None = None) -> InputStatistics:
    statistics = InputStatistics(x.shape[1])
    for start in range(0, len(x), 100):
        beside = None if float_x is None else float_x[start : start + 100]
        statistics.add(x[start : start + 100], beside)
    return statistics


def reference(weight: Tensor, x: Tensor, scheme: Scheme, damping: float, act_order: bool) -> np.ndarray:
    """Algorithm 1 of arXiv:2210.17323 in float64: one column at a time, the inverse updated by elimination."""
    w, hessian = weight.double().numpy().copy(), (x.double().t() @ x.double() / len(x)).numpy()
    scale, zero = choose_qparams(weight, scheme)
    columns, size = w.shape[1], w.shape[1] // scale.shape[1]
    hessian = hessian + damping * np.mean(np.diag(hessian)) * np.eye(columns)
    order = np.argsort(-np.diag(hessian), kind="stable") if act_order else np.arange(columns)
    inverse, left, q = np.linalg.inv(hessian), list(order), np.zeros_like(w)
    while left:
        k = left.pop(0)
        d = scale[:, k // size].double().numpy()
        z = 0.0 if zero is None else zero[:, k // size].double().numpy()
        levels = np.clip(np.floor(w[:, k] / np.where(d == 0, 1, d) + 0.5) + z, scheme.qmin, scheme.qmax)
        q[:, k] = levels
        error = (w[:, k] - (levels - z) * d) / inverse[k, k]
        w[:, left] -= np.outer(error, inverse[k, left])
        inverse = inverse - np.outer(inverse[:, k], inverse[k]) / inverse[k, k]
    return q


@pytest.mark.parametrize("spelling", [s for s in SCHEMES if "tensor" not in s])
@pytest.mark.parametrize("act_order", [False, True])
def test_the_paper_s_algorithm_gives_the_reference_s_integers(spelling: str, act_order: bool) -> None:
    weight, x = problem()
    scheme = Scheme.parse(spelling)
    expected = reference(weight, x, scheme, 0.05, act_order)
    found = gptq(weight, seen(x), scheme, GptqOptions(damping=0.05, act_order=act_order, **PAPER))
    plain = round_to_nearest(weight, scheme)
    rows = (found.q != plain.q).any(-1)  # the others were better off rounded to nearest
    same = (found.q.double().numpy() == expected)[rows.numpy()]
    assert same.mean() > 0.995  # float32 against float64: a tie here and there
    assert int(rows.sum()) > len(rows) // 2


@pytest.mark.parametrize("spelling", SCHEMES)
@pytest.mark.parametrize("options", [GptqOptions(), GptqOptions(**PAPER), GptqOptions(clip=False, sweeps=1)])
@pytest.mark.parametrize("seed", [0, 1])
def test_no_row_ends_above_rounding_to_nearest(spelling: str, options: GptqOptions, seed: int) -> None:
    weight, x = problem(seed=seed)
    scheme, inputs = Scheme.parse(spelling), x.double()
    found, plain = gptq(weight, seen(x), scheme, options), round_to_nearest(weight, scheme)
    errors = [((inputs @ (q.dequantize().double() - weight.double()).t()) ** 2).sum(0) for q in (found, plain)]
    if scheme.per_tensor:
        errors = [error.sum(0, keepdim=True) for error in errors]
    assert bool((errors[0] <= errors[1] * (1 + 1e-4)).all())
    assert float(errors[0].sum()) < float(errors[1].sum())


@pytest.mark.parametrize("spelling", ["w4a16-g32-asym", "w3a16-g32", "w2a16-g16-asym"])
def test_search_and_sweeps_each_lower_the_error(spelling: str) -> None:
    weight, x = problem(rows=64)
    scheme, moment = Scheme.parse(spelling), (x.t() @ x) / len(x)
    steps = [
        GptqOptions(**PAPER),
        GptqOptions(correct=0.0, sweeps=0),
        GptqOptions(correct=0.0, sweeps=1),
        GptqOptions(correct=0.0, sweeps=8),
    ]
    errors = [output_error(gptq(weight, seen(x), scheme, o).dequantize() - weight, moment) for o in steps]
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 0.9 * errors[0]


def test_scales_and_zero_points_are_those_that_files_hold() -> None:
    weight, x = problem()
    found = gptq(weight, seen(x), Scheme.parse("w4a16-g32-asym"))
    assert found.q.dtype == torch.uint8
    assert int(found.q.max()) <= 15
    assert torch.equal(found.scale.bfloat16().float(), found.scale)
    assert torch.equal(found.scale.half().float(), found.scale)
    assert found.zero_point is not None
    product = found.zero_point.float() * found.scale
    assert torch.equal(product.half().float(), product)


def test_dead_inputs_are_rounded_to_nearest() -> None:
    weight, x = problem()
    x[:, 10:14] = 0
    scheme = Scheme.parse("w4a16-g32-asym")
    found = gptq(weight, seen(x), scheme, GptqOptions(clip=False, sweeps=2, correct=0.0))
    assert bool(torch.isfinite(found.dequantize()).all())
    plain = round_to_nearest(weight, scheme)
    levels = (found.dequantize()[:, 10:14] - weight[:, 10:14]).abs() / found.scale[:, :1]
    assert float(levels.max()) < 1.0
    assert found.q.shape == plain.q.shape


def test_inputs_that_are_all_zero_change_nothing() -> None:
    weight, _ = problem()
    scheme = Scheme.parse("w4a16-g32")
    found = gptq(weight, seen(torch.zeros(10, 64)), scheme)
    assert torch.equal(found.q, round_to_nearest(weight, scheme).q)


def test_no_rows_at_all_mean_rounding_to_nearest() -> None:
    weight, _ = problem()
    scheme = Scheme.parse("w4a16-g32")
    assert torch.equal(gptq(weight, InputStatistics(64), scheme).q, round_to_nearest(weight, scheme).q)


def test_fewer_samples_than_inputs_need_damping_and_get_it() -> None:
    x = problem(samples=5)[1]
    factor = lower_factor(x.t() @ x / len(x), damping=1e-12)  # singular to float32: more is added until it works
    assert bool(torch.isfinite(factor).all())


def test_a_moment_with_nan_says_so() -> None:
    moment = torch.eye(8)
    moment[2, 3] = float("nan")
    with pytest.raises(QatError, match="NaN or infinity"):
        lower_factor(moment, 0.01)


def test_the_aim_makes_up_for_what_predecessors_changed() -> None:
    weight, x = problem()
    drifted = x + 0.2 * torch.randn(x.shape, generator=torch.Generator().manual_seed(1)) + 0.1 * x.roll(1, -1)
    aimed = aim(weight, seen(drifted, x))
    wanted = x.double() @ weight.double().t()
    before, after = (((drifted.double() @ w.double().t() - wanted) ** 2).mean() for w in (weight, aimed))
    best = torch.linalg.lstsq(drifted.double(), wanted).solution.t()
    least = ((drifted.double() @ best.t() - wanted) ** 2).mean()
    assert after < 0.5 * before
    assert after < 1.3 * least  # damping keeps it from the least squares solution itself


@pytest.mark.parametrize(
    ("options", "message"), [({"damping": 0}, "above 0"), ({"sweeps": -1}, "negative"), ({"correct": 2}, "share")]
)
def test_options_out_of_range_are_refused(options: dict[str, float], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        GptqOptions(**options)  # type: ignore[arg-type]
