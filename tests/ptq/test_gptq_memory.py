"""How many K x K matrices GPTQ holds at once, and that the float block beside costs only what has changed."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from qat_plugin import prepare
from qat_plugin.ptq import GptqOptions, InputStatistics, gptq
from qat_plugin.ptq.factor import lower_factor
from qat_plugin.ptq.twin import Twin
from qat_plugin.scheme import Scheme
from tests.ptq.allocations import peak_bytes
from tests.qat import models

COLUMNS, ROWS = 1024, 64


@pytest.fixture(scope="module")
def inputs() -> Tensor:
    return torch.randn(2 * COLUMNS, COLUMNS, generator=torch.Generator().manual_seed(0))


def test_a_factor_takes_one_matrix(inputs: Tensor) -> None:
    moment, order = inputs.t() @ inputs, torch.randperm(COLUMNS)
    peak = peak_bytes(lambda: lower_factor(moment, 0.1, order))
    assert moment.nbytes <= peak < 1.3 * moment.nbytes


def test_a_factor_is_that_of_the_damped_reordered_moment(inputs: Tensor) -> None:
    moment, order = inputs.t() @ inputs, torch.randperm(COLUMNS)
    lower = lower_factor(moment, 0.1, order).double()
    wanted = moment.double() + 0.1 * moment.diagonal().double().mean() * torch.eye(COLUMNS, dtype=torch.float64)
    assert torch.equal(lower, lower.tril())
    torch.testing.assert_close(lower @ lower.t(), wanted[order][:, order], rtol=1e-5, atol=1e-2)


@pytest.mark.parametrize("correct", [0.0, 0.5])
def test_gptq_adds_one_matrix_to_its_statistics(inputs: Tensor, correct: float) -> None:
    statistics = InputStatistics(COLUMNS, drifts=True)
    statistics.add(inputs, inputs.roll(1, 0) * 0.1 + inputs)
    weight, options = torch.randn(ROWS, COLUMNS) * 0.1, GptqOptions(sweeps=1, correct=correct)
    peak = peak_bytes(lambda: gptq(weight, statistics, Scheme.parse("w4a16-g32-asym"), options))
    matrix = statistics.second_moment.nbytes
    assert matrix <= peak < matrix + 16 * weight.nbytes  # 16 of a sixteenth: never a second matrix


def test_statistics_add_their_sums_and_little_else(inputs: Tensor) -> None:
    through = torch.randn(ROWS, COLUMNS)

    def gathered() -> InputStatistics:
        statistics = InputStatistics(COLUMNS, drifts=True, through=through)
        for part, beside in zip(inputs.split(64), (inputs * 1.1).split(64), strict=True):
            statistics.add(part, beside)
        return statistics

    sums = (COLUMNS + ROWS) * COLUMNS * 4
    assert peak_bytes(gathered) < sums + inputs.nbytes + sums // 4


def test_a_layer_s_own_drift_is_the_weight_times_the_drift(inputs: Tensor) -> None:
    weight, beside = torch.randn(ROWS, COLUMNS), inputs * 1.1 + inputs.roll(3, 0) * 0.1
    whole, own = InputStatistics(COLUMNS), InputStatistics(COLUMNS, through=weight)
    for statistics in (whole, own):
        statistics.add(inputs, beside)
    assert whole.drift is not None
    assert own.drift is not None
    torch.testing.assert_close(own.drift, weight @ whole.drift, rtol=1e-3, atol=1.0)


def test_the_float_form_beside_a_block_shares_what_has_not_changed() -> None:
    block = prepare(models.mlp(), "w4a16-g32")
    twin = Twin(block)
    assert all(mine is theirs for mine, theirs in zip(twin.module.parameters(), block.parameters(), strict=True))
    before, up, down = block.up.weight.detach().clone(), block.up, block.down  # type: ignore[union-attr, operator]
    twin.part_from([up])  # type: ignore[list-item]
    with torch.no_grad():
        up.weight.zero_()  # type: ignore[union-attr, operator]
    assert torch.equal(twin.module.up.weight, before)  # type: ignore[union-attr, arg-type]
    assert twin.module.down.weight is down.weight  # type: ignore[union-attr]
