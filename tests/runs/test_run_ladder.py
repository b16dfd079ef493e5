"""The ladder end to end on a small model of the user's own: what it leaves, how it goes on, how it refuses."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open

from qat_plugin.report import read_report
from qat_plugin.runs.record import sha256_of

from .conftest import Qat

STAGES = ["float", "ptq", "fine-tuned", "fine-tuned-ptq", "qat", "converted", "reloaded", "latency"]


def record(folder: str) -> dict[str, Any]:
    return json.loads(Path(folder, "run.json").read_text())


def rows(folder: str) -> dict[str, Any]:
    return {row.name: row.metrics for row in read_report(Path(folder, "report.json")).rows}


def converted(folder: str) -> dict[str, Any]:
    """Everything in a converted model's file: it writes its header's entries in no fixed order."""
    with safe_open(Path(folder, "converted", "model.safetensors"), "pt") as file:
        return {**file.metadata(), **{name: file.get_tensor(name).tolist() for name in file.keys()}}  # noqa: SIM118


def test_the_whole_ladder(qat: Qat, mine: tuple[str, ...]) -> None:
    done = qat(*mine, "run.dir=here")
    assert done.code == 0, done.err
    assert "Traceback" not in done.err
    metrics = rows("here")
    assert list(metrics) == [
        "float", "PTQ", "fine-tuned", "fine-tuned, then PTQ", "QAT", "converted", "reloaded", "converted, bf16",
    ]  # fmt: skip
    assert metrics["fine-tuned"].loss < metrics["float"].loss
    assert metrics["QAT"].loss < metrics["PTQ"].loss
    assert metrics["converted"].loss == pytest.approx(metrics["QAT"].loss, abs=1e-6)
    assert metrics["reloaded"] == metrics["converted"]
    report = read_report(Path("here", "report.json"))
    assert report.verdict
    assert [layer["name"] for layer in report.plan] == ["layers.0", "layers.3"]
    assert {layer["weight_difference"] for layer in report.proof} == {0.0}
    assert {layer["inputs"] for layer in report.proof} == {"real"}
    assert all(10 < value < 40 for value in report.sqnr.values())
    assert {entry.model for entry in report.latency} == {"float", "bf16", "converted", "converted, bf16"}
    for text in (done.out, Path("here", "report.md").read_text()):
        assert "fine-tuned, then PTQ" in text


def test_the_folder_holds_what_it_promises(qat: Qat, mine: tuple[str, ...]) -> None:
    assert qat(*mine, "run.dir=here").code == 0
    kept = record("here")
    assert kept["status"] == "finished"
    assert list(kept["stages"]) == STAGES
    assert all(stage["seconds"] >= 0 for stage in kept["stages"].values())
    assert kept["stages"]["qat"]["metrics"]["loss"] == rows("here")["QAT"].loss
    assert kept["data_fingerprint"] == "random 256"
    assert set(kept["artifacts"]) == {
        "recipe.yaml", "report.json", "report.md", "converted/model.safetensors", "converted/plan.json",
        "checkpoints/fine-tuned/last.ckpt", "checkpoints/qat/last.ckpt", "checkpoints/qat/quantizers.pt",
    }  # fmt: skip
    for name, digest in kept["artifacts"].items():
        assert sha256_of(Path("here", name)) == digest
    weights = torch.load("here/checkpoints/qat/last.ckpt", weights_only=True)["state_dict"]
    assert set(weights) == {"layers.0.weight", "layers.0.bias", "layers.3.weight", "layers.3.bias"}
    assert "Trainer.fit" in Path("here", "log").read_text()


def test_a_finished_run_is_not_run_again(qat: Qat, mine: tuple[str, ...]) -> None:
    assert qat(*mine, "run.dir=here").code == 0
    before = {path: sha256_of(path) for path in Path("here").rglob("*") if path.is_file() and path.name != "log"}
    again = qat("resume=here", "allow=[mine_of_tests]")
    assert again.code == 0, again.err
    assert again.out.count("done in an earlier session") == len(STAGES)
    assert {path: sha256_of(path) for path in before} == before


@pytest.mark.parametrize("stage", ["fine-tuned", "qat"])
def test_ctrl_c_then_the_command_it_prints_equals_an_uninterrupted_run(
    stage: str, qat: Qat, mine: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert qat(*mine, "run.dir=whole").code == 0
    monkeypatch.setenv("PRESS_CTRL_C_AT", f"{stage} 6")
    stopped = qat(*mine, "run.dir=parts")
    assert stopped.code == 130, stopped.err
    assert "Traceback" not in stopped.err
    assert record("parts")["status"] == "interrupted"
    assert stage not in record("parts")["stages"]
    assert record("parts")["seconds_spent"][stage] > 0
    assert torch.load(f"parts/checkpoints/{stage}/last.ckpt", weights_only=True)["global_step"] == 7
    program, *command = shlex.split(stopped.err.partition("Go on with: ")[2])
    assert program == "qat"
    resumed = qat(*command)
    assert resumed.code == 0, resumed.err
    assert rows("parts") == rows("whole")
    assert converted("parts") == converted("whole")
    assert sha256_of(Path("parts/checkpoints/qat/quantizers.pt")) == sha256_of(
        Path("whole/checkpoints/qat/quantizers.pt")
    )
    states = [torch.load(f"{run}/checkpoints/qat/last.ckpt", weights_only=True) for run in ("whole", "parts")]
    for name, weight in states[0]["state_dict"].items():
        assert torch.equal(weight, states[1]["state_dict"][name])


def test_the_resolved_recipe_reproduces_the_run(qat: Qat, mine: tuple[str, ...]) -> None:
    assert qat(*mine, "run.dir=first", "trainer.seed=3").code == 0
    again = qat("--config-dir", "first", "recipe=recipe", "run.dir=second", "allow=[mine_of_tests]")
    assert again.code == 0, again.err
    assert rows("second") == rows("first")
    assert record("second")["config_hash"] == record("first")["config_hash"]


def test_a_run_killed_between_checkpoints_goes_on_from_the_last_one(
    qat: Qat, mine: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert qat(*mine, "run.dir=whole").code == 0
    from qat_plugin.runs.interruption import ResumableCheckpoint

    original = ResumableCheckpoint.on_train_batch_end

    def die(self: Any, trainer: Any, *args: Any, **kwargs: Any) -> None:
        original(self, trainer, *args, **kwargs)
        if trainer.global_step == 8:
            raise MemoryError("killed")

    with monkeypatch.context() as patched:
        patched.setattr(ResumableCheckpoint, "on_train_batch_end", die)
        with pytest.raises(MemoryError):
            qat(*mine, "run.dir=parts")
    assert record("parts")["status"] == "failed"
    assert qat(*mine, "run.dir=parts").code == 0
    assert rows("parts") == rows("whole")


def test_ptq_alone(qat: Qat, mine: tuple[str, ...]) -> None:
    assert qat(*mine, "task=ptq", "run.dir=here", "policy=int8").code == 0
    metrics = rows("here")
    assert list(metrics) == ["float", "PTQ", "converted", "reloaded", "converted, bf16"]
    assert metrics["converted"].loss == pytest.approx(metrics["PTQ"].loss, abs=1e-4)
    assert not Path("here", "checkpoints").exists()


@pytest.mark.parametrize("keys", [
    ["policy=free", "policy.default=w8a8-static"],
    ["qat=learned_scales", "qat.scale_learning_rate=0.01", "qat.monitor=2", "policy.default=w3a16-g16-asym"],
    ["qat=delayed", "trainer.accumulate=2"],
    ["trainer.precision=bf16-true", "policy=int4_a8"],
    ["trainer.precision=bf16-mixed"],
    ["optimizer=custom", "optimizer._target_=torch.optim.SGD", "+optimizer.lr=0.1", "trainer.gradient_clip_val=null"],
])  # fmt: skip
def test_variations(keys: list[str], qat: Qat, mine: tuple[str, ...]) -> None:
    done = qat(*mine, "run.dir=here", "task.stages=[float,qat,converted,reloaded]", "trainer.max_steps=4", *keys)
    assert done.code == 0, done.err
    metrics = rows("here")
    assert metrics["reloaded"] == metrics["converted"]
    tolerance = 1e-2 if "trainer.precision=bf16-true" in keys else 1e-4
    assert metrics["converted"].loss == pytest.approx(metrics["QAT"].loss, abs=tolerance)


def test_plan_prints_the_table_and_writes_nothing(qat: Qat, mine: tuple[str, ...], tmp_path: Path) -> None:
    before = sorted(tmp_path.rglob("*"))
    done = qat(*mine, "task=plan", "policy.keep=[layers.3]")
    assert done.code == 0, done.err
    assert "layers.0" in done.out
    assert "w4a16-g32" in done.out
    assert "the policy keeps it" in done.out
    assert [path for path in sorted(tmp_path.rglob("*")) if "__pycache__" not in path.parts] == before


def test_evaluate_measures_a_runs_converted_model_again(qat: Qat, mine: tuple[str, ...]) -> None:
    assert qat(*mine, "run.dir=here", "task.stages=[float,qat,converted]").code == 0
    kept = record("here")
    done = qat("task=evaluate", "run=here", "allow=[mine_of_tests]")
    assert done.code == 0, done.err
    line = next(line for line in done.out.splitlines() if line.startswith("reloaded"))
    assert f"{rows('here')['converted'].loss:.4f}" in line
    assert record("here") == kept, "evaluating changes no record"


def test_evaluate_needs_something_to_measure(qat: Qat, mine: tuple[str, ...]) -> None:
    done = qat("task=evaluate")
    assert done.code == 2
    assert "run=DIR" in done.err


def test_evaluate_without_a_run_measures_the_model_as_it_is(qat: Qat, mine: tuple[str, ...]) -> None:
    done = qat(*mine, "task=evaluate")
    assert done.code == 0, done.err
    assert "float" in done.out


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        (["policy.rules.nope=w8a8"], "policy rule 'nope' matched no module"),
        (["policy.default=w9a9"], "policy.default: 9-bit weights"),
        (["policy.default=w4a16-g0"], "group size 0"),
        (["policy.rules.first=w4a16-g3x"], "policy.rules.first: unknown scheme"),
        (["policy=free"], "the policy changes no layer"),
        (["policy.indivisible=error", "policy.default=w4a16-g48"], "48"),
        (["qat.start=-1"], "start=-1"),
        (["qat.start=13"], "training ends after 13"),
        (["qat.start=0.5", "qat.freeze=0.25"], "comes before start"),
        (["+model.depth=3"], "does not take these arguments"),
        (["model._target_=mine_of_tests.Data"], "must derive from LightningModule"),
        (["model._target_=torch.os.system"], "is not allowed"),
        (["optimizer=adamw"], "optimizer=own"),
    ],
)
def test_mistakes_leave_no_folder(keys: list[str], said: str, qat: Qat, mine: tuple[str, ...]) -> None:
    done = qat(*mine, "run.dir=here", *keys)
    assert done.code == 2
    assert said in done.err
    assert done.err.startswith("qat: ")
    assert "Traceback" not in done.err
    assert not Path("here").exists()


def test_a_task_that_trains_needs_a_recipe(qat: Qat, mine: tuple[str, ...]) -> None:
    done = qat("trainer.max_steps=3")
    assert done.code == 2
    assert "needs a recipe: recipe=NAME" in done.err
    assert "qat_int4_tiny" in done.err


def test_data_that_changed_since_is_refused(qat: Qat, mine: tuple[str, ...], tmp_path: Path) -> None:
    assert qat(*mine, "run.dir=here", "task.stages=[float]").code == 0
    module = tmp_path / "mine_of_tests.py"
    import mine_of_tests

    mine_of_tests.Data.fingerprint = "other"
    assert module.exists()
    done = qat("resume=here", "allow=[mine_of_tests]")
    assert done.code == 2
    assert "the data has changed" in done.err


def test_a_damaged_checkpoint_is_named(qat: Qat, mine: tuple[str, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PRESS_CTRL_C_AT", "qat 6")
    assert qat(*mine, "run.dir=here").code == 130
    path = Path("here/checkpoints/qat/last.ckpt")
    path.write_bytes(path.read_bytes()[:1000])
    done = qat("resume=here", "allow=[mine_of_tests]")
    assert done.code == 2
    assert "last.ckpt is damaged" in done.err
    assert "delete it" in done.err


def test_a_bug_keeps_its_traceback(qat: Qat, mine: tuple[str, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    from qat_plugin.runs.ladder import Ladder

    def broken(self: Ladder) -> None:
        raise AttributeError("a bug")

    monkeypatch.setattr(Ladder, "_float", broken)
    with pytest.raises(AttributeError, match="a bug"):
        qat(*mine, "run.dir=here")
    assert record("here")["status"] == "failed"


def test_a_sweep_goes_on_after_a_point_that_fails(qat: Qat, mine: tuple[str, ...]) -> None:
    done = qat("-m", *mine, "task=ptq", "task.stages=[float,ptq]", "policy.default=w8a8,w9,w8a16")
    assert done.code == 2
    assert done.err.count("unknown scheme 'w9'") == 1
    reports = sorted(Path("runs", "sweep").rglob("report.json"))
    assert [path.parent.name for path in reports] == ["0", "2"]


def test_doctor(qat: Qat, mine: tuple[str, ...]) -> None:
    done = qat("task=doctor")
    assert done.code == 0
    for text in ("Versions", "AVX", "avx512_vnni", "g++", "cache", "w4a16-g32", "Not tested here"):
        assert text in done.out


@pytest.mark.parametrize("method", ["gptq", "mse", "awq"])
def test_weights_are_compared_with_those_before_calibration(method: str, qat: Qat, mine: tuple[str, ...]) -> None:
    done = qat(*mine, "run.dir=here", f"ptq.method={method}", "task.stages=[float,ptq,converted]")
    assert done.code == 0, done.err
    found = read_report(Path("here", "report.json")).sqnr
    assert set(found) == (set() if method == "awq" else {"layers.0", "layers.3"})
    assert all(10 < value < 40 for value in found.values())
    assert ("without 2 of 2 layers" in done.err + done.out) == (method == "awq")
