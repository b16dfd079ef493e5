from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch

from qat_plugin.measure import Latency, LMMetrics
from qat_plugin.report import (
    BF16,
    CONVERTED,
    FINE_TUNED,
    FINE_TUNED_PTQ,
    FLOAT,
    PTQ,
    QAT,
    RELOADED,
    LatencyRow,
    Report,
    Row,
)

WINDOWS = 40


def metrics(loss: float, *, noise: float = 0.0, seed: int = 0, **more: Any) -> LMMetrics:
    """Metrics around a mean loss: windows differ a lot from each other, models by ``noise`` from one another."""
    shared = torch.randn(WINDOWS, generator=torch.Generator().manual_seed(99), dtype=torch.float64)
    own = torch.randn(WINDOWS, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    own = noise * (own - own.mean())
    losses = (loss + 0.5 * (shared - shared.mean()) + own).tolist()
    mean = sum(losses) / WINDOWS
    return LMMetrics(
        mean, math.exp(min(mean, 700.0)), WINDOWS * 100, losses=tuple(losses), counts=(100,) * WINDOWS, **more
    )


LOSSES = {
    FLOAT: 1.54,
    PTQ: 1.65,
    FINE_TUNED: 1.36,
    FINE_TUNED_PTQ: 1.466,
    QAT: 1.389,
    CONVERTED: 1.389,
    RELOADED: 1.389,
}
MEMORY = {FLOAT: 4_000_000, PTQ: 700_000, FINE_TUNED: 4_000_000, FINE_TUNED_PTQ: 700_000, QAT: 4_000_000,
          CONVERTED: 700_000, RELOADED: 700_000}  # fmt: skip


def ladder(**losses: Any) -> tuple[Row, ...]:
    """The seven rows; a keyword names a row (spaces and commas as underscores) and gives its loss, metrics or None."""
    rows = []
    for name, loss in LOSSES.items():
        key = name.replace(", then ", "_").replace("-", "_")
        given = losses.get(key, loss)
        if isinstance(given, float):
            given = metrics(given, kl=0.01, top1_agreement=0.97)
        rows.append(Row(name, given, MEMORY[name], MEMORY[name] + 5000))
    return tuple(rows)


def layer(name: str, scheme: str | None, before: int, after: int, **more: Any) -> dict[str, Any]:
    """One entry of Plan.to_list()."""
    return {
        "name": name, "type": "Linear", "roles": [], "shape": [64, 64], "scheme": scheme, "rule": "default",
        "reason": "" if scheme else "the output head stays float", "kernel": "int4" if scheme else "float",
        "note": "", "bytes_before": before, "bytes_after": after, "tied_to": None, **more,
    }  # fmt: skip


PLAN = (
    layer("model.embed_tokens", None, 200_000, 200_000, reason="embeddings stay float"),
    *(layer(f"model.layers.{i}.mlp.up_proj", "w4a8-g32", 800_000, 112_500) for i in range(3)),
    layer("model.layers.3.mlp.up_proj", "w8a8", 800_000, 200_500, reason="172 is not divisible by 32"),
    layer("lm_head", None, 0, 0, tied_to="model.embed_tokens"),
)


def proof(name: str, **more: Any) -> dict[str, Any]:
    """One entry of Proof.to_list()."""
    return {"name": name, "scheme": "w4a8-g32", "kernel": "int4", "weight_difference": 0.0,
            "output_error": 1e-6, "tolerance": 1e-3, "inputs": "real", **more}  # fmt: skip


def timed(**p50: float) -> tuple[LatencyRow, ...]:
    """Latency at batch 1, 1 token, in seconds."""
    return tuple(LatencyRow("batch 1, 1 token", name, Latency(value, 1.5 * value, 30)) for name, value in p50.items())


@pytest.fixture
def make_report() -> Callable[..., Report]:
    """A full report; keywords replace its fields."""

    def make(*, rows: Sequence[Row] | None = None, **changes: Any) -> Report:
        fields: dict[str, Any] = {
            "title": "qat_int4_tiny",
            "recipe": "qat_int4_tiny",
            "command": "qat recipe=qat_int4_tiny seed=7",
            "rows": ladder() if rows is None else rows,
            "parameters": 1_000_000,
            "plan": PLAN,
            "proof": (proof("model.layers.0.mlp.up_proj"), proof("model.layers.1.mlp.up_proj")),
            "latency": timed(**{FLOAT: 0.004, BF16: 0.002, CONVERTED: 0.001}),
            "sqnr": {"model.layers.0.mlp.up_proj": 20.25, "model.layers.1.mlp.up_proj": 0.1 + 0.2},
            "environment": {"device": "cpu", "torch": "2.13.0"},
        }
        return Report(**{**fields, **changes})

    return make
