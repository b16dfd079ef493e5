"""``ptq=ladder``: it stops at the first rung that is good enough, keeps what it measured, and converts that rung."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from qat_plugin.report import read_report

from .conftest import Qat
from .test_run_recipes import QUICK, small_model

pytestmark = pytest.mark.usefixtures("alone")
LADDER = (
    "recipe=ptq_ladder", *QUICK, "run.dir=here", "policy.auto.measurements=4", "policy.auto.calibration_batches=2",
)  # fmt: skip


def rungs(folder: str = "here") -> list[str]:
    names = [row.name for row in read_report(Path(folder, "report.json")).rows]
    return [name.removeprefix("PTQ, ") for name in names if name.startswith("PTQ, ")]


def test_the_first_rung_will_do_where_little_is_asked(qat: Qat) -> None:
    done = qat(*LADDER, *small_model(), "max_drop=50%")
    assert done.code == 0, done.err
    assert rungs() == ["rtn"]
    assert "rtn: the first within max_drop=50%" in done.out
    rows = {row.name: row for row in read_report(Path("here", "report.json")).rows}
    assert rows["PTQ"].metrics == rows["PTQ, rtn"].metrics
    assert rows["converted"].metrics.perplexity == pytest.approx(rows["PTQ"].metrics.perplexity, rel=2e-5)


def test_every_rung_is_climbed_where_none_will_do(qat: Qat) -> None:
    done = qat(*LADDER, *small_model(), "max_drop=1e-9", "policy.default=w3a16-g32-asym")
    assert done.code == 0, done.err
    assert rungs()[:4] == ["rtn", "mse", "awq", "gptq"]
    assert "none is within max_drop=1e-09" in done.out
    rows = {row.name: row for row in read_report(Path("here", "report.json")).rows}
    tried = [rows[f"PTQ, {name}"].metrics for name in rungs()]
    assert rows["PTQ"].metrics.kl == min(metrics.kl for metrics in tried)
    assert rows["converted"].metrics.perplexity == pytest.approx(rows["PTQ"].metrics.perplexity, rel=2e-5)
    found = json.loads(Path("here", "ladder.json").read_text())
    assert rows["PTQ"].metrics == rows[f"PTQ, {found['method']}"].metrics


def test_mixed_schemes_are_the_last_rung(qat: Qat) -> None:
    asked = ["max_drop=0.00002", "policy.default=w2a16-g32-asym", "policy.auto.candidates=[w8a16-g16,w4a16-g16-asym]"]
    done = qat(*LADDER, *small_model(), *asked)
    assert done.code == 0, done.err
    assert rungs() == ["rtn", "mse", "awq", "gptq", "mixed"]
    assert Path("here", "policy.yaml").is_file()
    schemes = {layer["scheme"] for layer in json.loads(Path("here", "converted", "plan.json").read_text())}
    assert schemes <= {None, "w8a16-g16", "w4a16-g16-asym", "w2a16-g32-asym"}


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        (["max_drop=null"], "ptq.method=ladder needs to know when to stop"),
        (["max_drop=much"], "max_drop=much is not allowed"),
        (["task=fit"], "ptq.method=ladder is for task=ptq"),
        (["budget=4bpw", "max_drop=null"], "budget=4bpw is for policy=auto"),
    ],
)
def test_what_does_not_go_together_is_said_at_once(qat: Qat, keys: list[str], message: str) -> None:
    done = qat(*LADDER, *small_model(), *keys)
    assert done.code == 2
    assert message in done.err
    assert not Path("here").exists()
