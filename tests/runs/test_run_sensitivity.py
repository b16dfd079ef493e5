"""``task=sensitivity`` and ``policy=auto``: what they leave, how they go on, what they refuse."""

from __future__ import annotations

import json
import os
import re
import signal
import sys
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import pytest
import yaml

from qat_plugin.config.schema import AutoConfig
from qat_plugin.config.usage import help_text
from qat_plugin.measure import file_bytes
from qat_plugin.report import read_report
from qat_plugin.sensitivity import CANDIDATES, Measure, Sensitivity

from .conftest import Qat

AUTO = ("policy=auto", "policy.auto.measurements=12", "policy.auto.calibration_batches=2")
FEW = "policy.auto.candidates=[w8a16,w4a16-g16-asym,w2a16-g16-asym]"


def figures(folder: str) -> dict[str, Any]:
    return json.loads(Path(folder, "sensitivity.json").read_text())


def scheme_of(layer: str, rules: dict[str, str]) -> str:
    """The scheme of the first rule that matches."""
    return next(
        scheme
        for pattern, scheme in rules.items()
        if (re.match(pattern[3:], layer) if pattern.startswith("re:") else fnmatchcase(layer, pattern))
    )


def test_a_ranking_leaves_a_table_json_and_a_picture(qat: Qat, mine: tuple[str, ...]) -> None:
    done = qat(*mine, "task=sensitivity", FEW, "run.dir=here")
    assert done.code == 0, done.err
    assert Path("here/sensitivity.png").read_bytes().startswith(b"\x89PNG")
    found = Sensitivity.from_dict(figures("here"))
    assert {entry.group for entry in found.entries} == {"layers.0", "layers.3"}
    assert len(found.entries) == 6
    assert found.tokens == 8 * 32
    for text in (done.out, Path("here/sensitivity.md").read_text()):
        assert "layers.0" in text
        assert "w2a16-g16-asym" in text
    assert not Path("here/converted").exists()
    recorded = json.loads(Path("here/run.json").read_text())
    assert recorded["status"] == "finished"
    assert {"sensitivity.json", "sensitivity.md", "sensitivity.png"} <= set(recorded["artifacts"])


def test_a_ranking_that_is_stopped_loses_one_figure_at_most(
    qat: Qat, mine: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    ranking = (*mine, "task=sensitivity", FEW)
    assert qat(*ranking, "run.dir=whole").code == 0
    of, count = Measure.of, 0

    def press(self: Measure, layers: Any) -> Any:
        nonlocal count
        count += 1
        if count == 4:
            os.kill(os.getpid(), signal.SIGINT)
        return of(self, layers)

    with monkeypatch.context() as patched:
        patched.setattr(Measure, "of", press)
        stopped = qat(*ranking, "run.dir=parts")
    assert stopped.code == 130
    assert "qat resume=" in stopped.err
    assert len(Path("parts/sensitivity.jsonl").read_text().splitlines()) == 3
    with Path("parts/sensitivity.jsonl").open("a") as file:
        file.write('{"group": "layers.3", "lay')  # a line that a kill cut short
    resumed = qat("resume=parts", "allow=[mine_of_tests]")
    assert resumed.code == 0, resumed.err
    assert "3 figures are known" in resumed.out
    assert Sensitivity.from_dict(figures("parts")) == Sensitivity.from_dict(figures("whole"))


@pytest.mark.parametrize("spent", ["budget=5bpw", "max_drop=0.05", "budget=60%", "max_drop=8%"])
def test_a_policy_is_found_and_is_an_ordinary_one_from_then_on(qat: Qat, mine: tuple[str, ...], spent: str) -> None:
    done = qat(*mine, *AUTO, FEW, "task=ptq", spent, "run.dir=here")
    assert done.code == 0, done.err
    policy = yaml.safe_load(Path("here/policy.yaml").read_text())
    report = read_report(Path("here/report.json"))
    made = {layer["name"]: layer["scheme"] for layer in report.plan if layer["scheme"]}
    assert made == {name: scheme_of(name, policy["rules"]) for name in made}
    rows = {row.name: row for row in report.rows}
    assert rows["converted"].metrics.kl == pytest.approx(rows["PTQ"].metrics.kl, rel=1e-4)
    assert spent in done.out
    assert figures("here")["policy"]["target"] == spent
    recipe = Path("recipes/mlp.yaml").read_text().replace("/policy: int4", "/policy: free")
    Path("recipes/found.yaml").write_text(f"{recipe}{yaml.safe_dump({'policy': policy})}")
    again = qat(*mine[:2], "recipe=found", mine[3], "task=ptq", "run.dir=ordinary")
    assert again.code == 0, again.err
    assert Path("ordinary/converted/model.safetensors").stat().st_size == file_bytes("here/converted/model.safetensors")


def test_training_and_resuming_keep_the_policy_that_was_found(
    qat: Qat, mine: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PRESS_CTRL_C_AT", "qat 6")
    stopped = qat(*mine, *AUTO, FEW, "budget=5bpw", "task.stages=[float,qat,converted]", "run.dir=here")
    assert stopped.code == 130
    policy = Path("here/policy.yaml").read_text()
    monkeypatch.setattr(Measure, "of", lambda *_: pytest.fail("the policy was found already"))
    done = qat("resume=here", "allow=[mine_of_tests]")
    assert done.code == 0, done.err
    assert "policy: found in an earlier session" in done.out
    assert Path("here/policy.yaml").read_text() == policy
    rules = yaml.safe_load(policy)["rules"]
    plan = {layer["name"]: layer["scheme"] for layer in read_report(Path("here/report.json")).plan if layer["scheme"]}
    assert plan == {name: scheme_of(name, rules) for name in ("layers.0", "layers.3")}


def test_a_plan_shows_the_bytes_between_which_it_will_choose(qat: Qat, mine: tuple[str, ...]) -> None:
    done = qat(*mine, *AUTO, FEW, "task=plan", "budget=5bpw")
    assert done.code == 0, done.err
    assert "budget=5bpw can be met" in done.out
    for word in ("w8a16", "w4a16-g16-asym", "w2a16-g16-asym", "measuring on data"):
        assert word in done.out


def test_without_matplotlib_the_figures_are_written_all_the_same(
    qat: Qat, mine: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in [name for name in sys.modules if name.split(".")[0] == "matplotlib"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    done = qat(*mine, "task=sensitivity", FEW, "run.dir=here")
    assert done.code == 0, done.err
    assert 'pip install "qat-plugin[plots]"' in done.out
    assert Path("here/sensitivity.md").is_file()
    assert figures("here")["entries"]
    assert not Path("here/sensitivity.png").exists()


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ([*AUTO, "task=ptq"], "needs to know what to spend"),
        ([*AUTO, "task=ptq", "budget=1bpw"], "The least budget is"),
        ([*AUTO, "task=ptq", "budget=40"], "budget=40 is not a budget"),
        ([*AUTO, "task=ptq", "budget=5bpw", "max_drop=1%"], "exclude each other"),
        ([*AUTO, "task=ptq", "max_drop=-1"], "max_drop=-1 is not allowed"),
        ([*AUTO, "task=ptq", "budget=5bpw", "policy.default=w8a8"], "finds the rules itself"),
        ([*AUTO, "task=ptq", "budget=5bpw", "policy.auto.candidates=[w4a16-32]"], "policy.auto.candidates: unknown"),
        ([*AUTO, "task=ptq", "budget=5bpw", "policy.auto.candidates=[]"], "policy.auto.candidates is empty"),
        ([*AUTO, "task=ptq", "budget=5bpw", "policy.auto.method=hessian"], "policy.auto.method=hessian"),
        (["budget=5bpw"], "is for policy=auto"),
        (["max_drop=1%"], "is for policy=auto"),
        (["task=sensitivity", "policy.keep=[layers.*]"], "all are kept"),
    ],
)
def test_mistakes_are_told_before_anything_is_written(
    keys: list[str], said: str, qat: Qat, mine: tuple[str, ...]
) -> None:
    done = qat(*mine, *keys, "run.dir=here")
    assert done.code == 2
    assert said in done.err
    assert "Traceback" not in done.err
    assert not Path("here").exists()


def test_the_command_and_the_function_choose_from_the_same() -> None:
    assert tuple(AutoConfig().candidates) == CANDIDATES
    assert "budget=4.6bpw" in help_text()
