from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from qat_plugin.errors import ConfigError
from qat_plugin.measure import Latency, interleaved_latency, model_latency
from qat_plugin.measure.latency import _quantile


def test_alternatives_take_turns_warmup_included() -> None:
    calls: list[str] = []
    alternatives = {name: lambda name=name: calls.append(name) for name in "ABC"}
    measured = interleaved_latency(alternatives, rounds=4, warmup=2)
    assert "".join(calls) == "ABC" * 6
    assert list(measured) == ["A", "B", "C"]
    assert {latency.rounds for latency in measured.values()} == {4}
    assert all(0 < latency.p50 <= latency.p95 for latency in measured.values())


def test_a_spent_budget_ends_after_a_whole_round() -> None:
    calls: list[str] = []
    alternatives = {name: lambda name=name: calls.append(name) for name in "AB"}
    measured = interleaved_latency(alternatives, rounds=1000, warmup=1, budget_s=1e-9)
    assert "".join(calls) == "ABAB"
    assert {latency.rounds for latency in measured.values()} == {1}


def test_a_budget_that_is_not_spent_changes_nothing() -> None:
    assert interleaved_latency({"A": lambda: None}, rounds=5, warmup=0, budget_s=600)["A"].rounds == 5


@given(st.lists(st.floats(0, 1e3), min_size=1, max_size=40), st.sampled_from([0.0, 0.5, 0.95, 1.0]))
def test_quantiles_are_those_of_numpy(samples: list[float], share: float) -> None:
    assert _quantile(samples, share) == pytest.approx(float(np.quantile(samples, share)), rel=1e-12, abs=1e-300)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"alternatives": {}}, "nothing to time"),
        ({"rounds": 0}, "rounds=0"),
        ({"warmup": -1}, "warmup=-1"),
        ({"budget_s": 0.0}, "budget_s=0.0"),
        ({"budget_s": float("nan")}, "budget_s=nan"),
    ],
)
def test_arguments_out_of_range_are_refused(arguments: dict[str, object], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        interleaved_latency(**{"alternatives": {"A": lambda: None}, **arguments})  # type: ignore[arg-type]


def test_progress_counts_rounds() -> None:
    seen: list[tuple[int, int | None]] = []
    interleaved_latency({"A": lambda: None}, rounds=2, warmup=1, progress=lambda *now: seen.append(now))
    assert seen == [(1, 3), (2, 3), (3, 3)]


class Recorder(nn.Module):
    """A linear layer that notes how it was called."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 2, dtype=dtype)
        self.calls: list[tuple[torch.dtype, tuple[int, ...], bool, bool]] = []

    def forward(self, x: torch.Tensor, ids: torch.Tensor | None = None) -> torch.Tensor:
        self.calls.append((x.dtype, tuple(x.shape), self.training, torch.is_grad_enabled()))
        assert ids is None or ids.dtype == torch.int64
        return self.linear(x)


def test_models_are_timed_in_eval_mode_without_gradients_on_inputs_of_their_dtype() -> None:
    models = {"float": Recorder(torch.float32), "bf16": Recorder(torch.bfloat16).eval()}
    workloads = {"one": torch.randn(1, 4), "many": {"x": torch.randn(9, 4), "ids": torch.zeros(3, dtype=torch.int64)}}
    measured = model_latency(models, workloads, rounds=2, warmup=1)
    assert list(measured) == ["one", "many"]
    assert all(isinstance(latency, Latency) for by_model in measured.values() for latency in by_model.values())
    for model, dtype in zip(models.values(), (torch.float32, torch.bfloat16), strict=True):
        assert model.calls == [(dtype, (1, 4), False, False)] * 3 + [(dtype, (9, 4), False, False)] * 3
    assert (models["float"].training, models["bf16"].training) == (True, False)


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_cuda_work_is_waited_for() -> None:
    matrix = torch.randn(4096, 4096, device="cuda")
    done: list[bool] = []

    def launch() -> None:
        for _ in range(50):
            matrix @ matrix
        event = torch.cuda.Event()
        event.record()
        events.append(event)

    events: list[torch.cuda.Event] = []
    interleaved_latency({"launch": launch, "look": lambda: done.append(events[-1].query())}, rounds=3, warmup=0)
    assert done == [True] * 3
