"""Below 4 bits a recipe takes asymmetric schemes, says so once, and records what it really used."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from qat_plugin.report import read_report

from .conftest import Qat

TOLD = "policy: symmetric grids lose much more than asymmetric ones below 4 bits, so this run takes "
KEEP = "; to keep what was given: policy.keep_symmetric=true"
SHORT = ("trainer.max_steps=2", "task.stages=[float,qat,converted,reloaded]")


def schemes(folder: str) -> list[str | None]:
    return [layer["scheme"] for layer in read_report(Path(folder, "report.json")).plan]


def told(text: str) -> list[str]:
    return [line for line in text.splitlines() if line.startswith(TOLD)]


@pytest.mark.parametrize("bits", [3, 2])
def test_qat_takes_the_asymmetric_scheme_and_records_it(bits: int, qat: Qat, mine: tuple[str, ...]) -> None:
    done = qat(*mine, *SHORT, "run.dir=here", f"policy.default=w{bits}a16-g16")
    assert done.code == 0, done.err
    assert told(done.out) == [f"{TOLD}w{bits}a16-g16-asym instead of w{bits}a16-g16 (policy.default){KEEP}"]
    assert f"w{bits}a16-g16-asym instead of" in Path("here", "log").read_text()
    assert schemes("here") == [f"w{bits}a16-g16-asym"] * 2
    assert OmegaConf.load("here/recipe.yaml").policy.default == f"w{bits}a16-g16-asym"
    record = json.loads(Path("here", "run.json").read_text())
    assert record["config"]["policy"]["default"] == f"w{bits}a16-g16-asym"
    assert f"policy.default=w{bits}a16-g16" in record["command"], "the command is what was given"
    plan = json.loads(Path("here", "converted", "plan.json").read_text())
    assert f"w{bits}a16-g16-asym" in json.dumps(plan)
    assert f"mlp: fit, w{bits}a16-g16-asym" in done.out
    assert "symmetric grids lose at 3 bits" not in done.out, "nothing is left to advise"


def test_the_same_command_and_resume_go_on_with_the_same_run(qat: Qat, mine: tuple[str, ...]) -> None:
    command = (*mine, *SHORT, "run.dir=here", "policy.default=w3a16-g16")
    assert qat(*command).code == 0
    again = qat(*command)
    assert again.code == 0, again.err
    assert again.out.count("done in an earlier session") == 4
    resumed = qat("resume=here", "allow=[mine_of_tests]")
    assert resumed.code == 0, resumed.err
    assert told(resumed.out) == [], "the saved recipe holds the scheme that is used"


def test_a_mixed_policy_switches_its_low_rules_alone(qat: Qat, mine: tuple[str, ...]) -> None:
    keys = ("policy=free", "policy.rules.first=w3a16-g16", "scheme@policy.rules.last=w2a16-g32")
    done = qat(*mine, "task=ptq", "run.dir=here", "task.stages=[float,ptq,converted]", *keys)
    assert done.code == 0, done.err
    [line] = told(done.out)
    assert "w3a16-g16-asym instead of w3a16-g16 (policy.rules.first)" in line
    assert "w2a16-g32-asym instead of w2a16-g32 (policy.rules.last)" in line
    assert schemes("here") == ["w3a16-g16-asym", "w2a16-g32-asym"]
    other = qat(*mine, "task=plan", "policy=free", "policy.rules.first=w3a16-g16", "policy.default=w4a16-g32")
    assert "w4a16-g32 " in other.out, "4 bits stay symmetric"
    assert "w3a16-g16-asym " in other.out


def test_candidates_of_an_automatic_policy_are_switched_too(qat: Qat, mine: tuple[str, ...]) -> None:
    candidates = "policy.auto.candidates=[w3a16-g16,w3a16-g16-asym,w8a16]"
    keys = ("policy=auto", candidates, "budget=60%", "policy.auto.calibration_batches=1", "policy.auto.measurements=2")
    done = qat(*mine, "task=ptq", "run.dir=here", "task.stages=[float,ptq]", *keys)
    assert done.code == 0, done.err
    assert told(done.out) == [f"{TOLD}w3a16-g16-asym instead of w3a16-g16 (policy.auto.candidates){KEEP}"]
    record = json.loads(Path("here", "run.json").read_text())
    assert record["config"]["policy"]["auto"]["candidates"] == ["w3a16-g16-asym", "w8a16"]
    assert set(schemes("here")) <= {"w3a16-g16-asym", "w8a16", None}


def test_a_key_keeps_what_was_given(qat: Qat, mine: tuple[str, ...]) -> None:
    keys = ("run.dir=here", "policy.default=w3a16-g16", "policy.keep_symmetric=true")
    done = qat(*mine, *SHORT, *keys)
    assert done.code == 0, done.err
    assert told(done.out) == []
    assert schemes("here") == ["w3a16-g16"] * 2
    assert "qat: symmetric grids lose at 3 bits and below" in done.out, "advised, as in Python"


def test_a_ranking_shows_the_schemes_that_were_given(qat: Qat, mine: tuple[str, ...]) -> None:
    candidates = "policy.auto.candidates=[w3a16-g16,w3a16-g16-asym]"
    keys = ("policy=auto", candidates, "policy.auto.calibration_batches=1")
    done = qat(*mine, "task=sensitivity", "run.dir=here", *keys)
    assert done.code == 0, done.err
    assert told(done.out) == []
    assert {"w3a16-g16", "w3a16-g16-asym"} <= set(done.out.replace("|", " ").split())


def test_what_merged_weights_are_converted_to_is_switched_and_what_they_are_compared_with_is_not(
    qat: Qat, alone: None
) -> None:
    keys = ("merge.scheme=w3a16-g32", "merge.compare=[w2a16-g32]")
    done = qat("recipe=qlora_tiny", "task=plan", *keys)
    assert done.code == 0, done.err
    assert told(done.out) == [f"{TOLD}w3a16-g32-asym instead of w3a16-g32 (merge.scheme){KEEP}"]


def test_a_misspelt_scheme_is_still_the_users_mistake(qat: Qat, mine: tuple[str, ...]) -> None:
    done = qat(*mine, "run.dir=here", "policy.default=w3a16-g16", "policy.rules.last=w3b16")
    assert done.code == 2
    assert "policy.rules.last: unknown scheme 'w3b16'" in done.err
    assert not Path("here").exists()
